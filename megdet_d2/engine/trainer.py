"""The trainer: Detectron2's, with MegDet's norm and schedule, exact resumes and roll-backs."""

import contextlib
import faulthandler
import logging
import os
import sys
import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn
from torch.utils.data import DataLoader

from megdet_d2._moved import renamed
from megdet_d2.data.coco import forget_parsed, refuse_unreadable
from megdet_d2.data.finding import raise_findings
from megdet_d2.data.mapping import Mapper
from megdet_d2.data.stream import build_train_loader
from megdet_d2.memory import checkpoint_stages
from megdet_d2.modeling.tta import build_tta
from megdet_d2.norm.batch_norm import bare_model, cgbn_layers
from megdet_d2.norm.configure import configure_cgbn, describe_norms, group_ranks
from megdet_d2.norm.keys import find_missing_norms
from megdet_d2.norm.running_statistics import averaged_statistics
from megdet_d2.schedule.build import build_lr_scheduler, images_per_epoch, images_per_micro_batch

from .accumulation import accumulate
from .check_evaluation import CLASS_FAULTS, inspect_evaluation
from .checkpoint import Checkpointer, GatherStatistics, adopt_checkpointer, claim_run
from .ddp import ddp_without_device_ids, finalize_ddp_buckets
from .disk import naming_output_dir
from .divergence import DivergenceError, DivergenceGuard, ScheduleBackoff
from .early_log import write_kept_log
from .evaluation import build_evaluator, build_test_loader
from .frozen import find_frozen_at_random
from .hooks import (
    BatchScalars,
    CountSkippedImages,
    StopOutOfStep,
    insert_before_savers,
    observed_step,
)
from .launch import find_launcher, limit_waiting, may_restart
from .metrics import cut_metrics
from .minibatch import MiniBatchCheck
from .model_classes import check_model_classes
from .model_reads import ModelReads
from .overrides import LearningRateCheck, can_be_lowered, check_base_lr, overrides
from .progress import Layout, TrainingProgress
from .sample_ratio import SampleRecorder
from .signals import StopOnSignal

logger = logging.getLogger(__name__)

_OWN_DATA = ("build_train_loader", "build_mapper")
_STDERR = sys.__stderr__ or 2  # a notebook's sys.stderr has no file descriptor


class Trainer(DefaultTrainer):
    """A ``DefaultTrainer`` with the ``MODEL.CGBN`` and ``MEGDET`` keys, on GPUs and on CPUs.

    A resumed run continues as if it had not stopped (docs/resume.md). Without ``MEGDET`` keys the
    schedule is Detectron2's. COCO, LVIS and Pascal VOC data sets are evaluated.

    Args:
        cfg: a config that ``prepare_config`` has resolved.

    Attributes:
        progress: a ``TrainingProgress``: images seen, place in the data, changes by roll-backs.

    Raises:
        ValueError: a BN size that no whole number of processes gives, and other invalid keys.
    """

    start_iter: int
    _hooks: list[HookBase]
    _last_eval_results: dict[str, Any]
    _trainer: SimpleTrainer

    def __init__(self, cfg: CfgNode):
        if "MEGDET" not in cfg:
            raise ValueError("cfg has no MEGDET keys: call megdet_d2.add_megdet_config(cfg) first")
        write_kept_log()
        name = type(self).__name__
        self._rolled_back_to = ""
        self._warned_unguarded = False
        self._rolls_back = False  # whether ``train`` has been called, and not an override alone
        self._completed = 0  # updates, with those before a resume
        self._observing = contextlib.ExitStack()  # of an update
        if cfg.MEGDET.POLICY and overrides(type(self), Trainer, "build_lr_scheduler"):
            self.build_lr_scheduler = build_lr_scheduler  # type: ignore[method-assign]
            logger.warning(
                f"MEGDET.POLICY {cfg.MEGDET.POLICY!r} decides the learning rate, so "
                f'{name}.build_lr_scheduler is not called; set MEGDET.POLICY "" to use it'
            )
        # Detectron2's constructor builds the hooks, before there is all that ours need.
        self.build_hooks = list  # type: ignore[method-assign]  # for this call alone
        model_reads = ModelReads(self.build_model)
        self.build_model = model_reads  # type: ignore[method-assign]  # for this call alone
        with ddp_without_device_ids(cfg):
            super().__init__(cfg)
        del self.build_hooks, self.build_model
        cfg = self.cfg  # Detectron2 may have scaled the batch to the workers
        own_data = overrides(type(self), Trainer, *_OWN_DATA)
        check_model_classes(cfg, model_reads.keys, refuse=not own_data)
        self.check_evaluators(cfg)
        forget_parsed()  # also where the loader is another one than ours
        if not overrides(
            type(self), Trainer, "build_test_loader"
        ):  # before the training, not after it
            refuse_unreadable(cfg.DATASETS.TEST, self.build_mapper(cfg, False))
        check_base_lr(cfg, self.optimizer, name)
        self.progress = TrainingProgress(self)
        if cfg.MODEL.DEVICE == "cpu":
            finalize_ddp_buckets(self.model)
        # Again, since an overridden build_model may not have. One forward is one micro-batch.
        configure_cgbn(self.model, cfg, self.layout.images_per_gpu)
        if cfg.MODEL.SUBLINEAR.ENABLED:
            checkpoint_stages(bare_model(self.model), cfg.MODEL.SUBLINEAR.STAGES)
        self._mini_batch = MiniBatchCheck(self.layout, name)
        self._learning_rate = LearningRateCheck(cfg.MEGDET.POLICY, name)
        self._guard = DivergenceGuard(self.model)
        self._prepared: SimpleTrainer | None = None
        self._prepare_inner_trainer()
        if overrides(type(self), Trainer, "test"):
            self.test = self._test_with_averages  # type: ignore[method-assign]
        self.checkpointer = self.build_checkpointer(cfg, self.model, trainer=weakref.proxy(self))
        self._register_built_hooks()
        limit_waiting(cfg.MEGDET.TIMEOUT)
        logger.info(describe_norms(self.model, self.layout.images_per_gpu, model_reads.norms))
        for fault in find_missing_norms(self.model, model_reads.norms):
            logger.warning(fault)

    @property
    def layout(self) -> Layout:
        """The processes, micro-batches and images that make up a mini-batch."""
        return self.progress.layout

    @property
    def images_seen(self) -> int:
        """The images that all updates so far have taken."""
        return self.progress.images_seen

    @property
    def has_finished(self) -> bool:
        """Returns True if all updates have been made, with the hooks after each."""
        return self._completed >= self.max_iter

    @property
    def relief(self) -> ScheduleBackoff:
        """The former name of ``progress.backoff``."""
        warnings.warn(
            "Trainer.relief is now Trainer.progress.backoff", DeprecationWarning, stacklevel=2
        )
        return self.progress.backoff

    # --- training --------------------------------------------------------------------------------

    def train(self) -> dict[str, Any] | None:
        """Trains to the end; after a divergence does what ``MEGDET.ON_DIVERGENCE`` says.

        Returns:
            the results of the last evaluation, where TEST.EXPECTED_RESULTS is set.

        Raises:
            DivergenceError: in every process, if no roll-back is allowed or left.
        """
        self._rolls_back = True
        while True:
            try:
                return super().train()
            except DivergenceError as error:
                self._roll_back(error)

    def run_step(self) -> None:
        """Makes one update.

        If it takes longer than twice ``MEGDET.TIMEOUT``, prints all stacks and ends the process.

        Raises:
            DivergenceError: a loss or a gradient is not finite, in any process.
        """
        # A last resort for waits that no other limit ends, such as a stopped loader worker.
        faulthandler.dump_traceback_later(2 * self.cfg.MEGDET.TIMEOUT, exit=True, file=_STDERR)
        try:
            super().run_step()
        except DivergenceError:
            raise
        except FloatingPointError as error:  # of a forward, such as the RPN's
            self._guard.join(error)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def before_step(self) -> None:
        """Calls the hooks, and prepares the update that ``run_step`` makes, also an overridden one.

        All random numbers of an update follow from the seed, the images and the process.
        """
        super().before_step()
        self._mini_batch.begin(self._trainer)
        self._checks = self._guard.checks
        self.progress.seed_step()
        self._observing.enter_context(observed_step([self._guard, *self._hooks]))

    def after_step(self) -> None:
        """Counts the update's images, and calls the hooks.

        Raises:
            ValueError: in the first updates, if one has taken other images than the config says, or
                another learning rate than that of MEGDET.POLICY.
        """
        self._observing.close()
        self._mini_batch.end()
        self._learning_rate.check(self)
        if self._guard.checks == self._checks:
            self._warn_unguarded()
        self.progress.count_step()
        with naming_output_dir(self.cfg.OUTPUT_DIR):
            super().after_step()
        self._completed = self.iter + 1

    def before_train(self) -> None:
        """Calls the hooks, and saves a checkpoint for roll-backs that come before any other."""
        self._completed = self.start_iter
        self._check_overrides()
        self._check_frozen()
        loaded = self.progress.loaded_iteration
        if loaded is not None and comm.is_main_process():
            metrics = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
            cut_metrics(metrics, loaded, self.images_seen)
        super().before_train()
        self.progress.restore_scalars()
        if self.start_iter == 0 and self.cfg.MEGDET.ON_DIVERGENCE != "stop":
            self.iter = -1  # the last completed iteration: none
            self.checkpointer.gather()
            self.checkpointer.save("model_start", iteration=self.iter)
            self.iter = 0

    def after_train(self) -> None:
        """Calls the hooks, but evaluates nothing where a step failed, perhaps in one process."""
        self._observing.close()
        if not self.has_finished:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        try:
            with naming_output_dir(self.cfg.OUTPUT_DIR):
                super().after_train()
        finally:
            for hook in self._hooks:
                if isinstance(hook, StopOnSignal):
                    hook.put_handlers_back()

    def _prepare_inner_trainer(self) -> None:
        """Gives Detectron2's inner trainer the accumulation and the guards, if it is a new one."""
        if self._trainer is self._prepared:
            return
        if type(self._trainer) in (SimpleTrainer, AMPTrainer):
            self._trainer = accumulate(self._trainer, self.layout.accumulation_steps)
        self._trainer.register_hooks([StopOutOfStep(), self._guard])
        self._prepared = self._trainer

    def _check_overrides(self) -> None:
        """Checks what a subclass may have changed since the constructor."""
        self._prepare_inner_trainer()
        action = self.cfg.MEGDET.ON_DIVERGENCE
        if action != "stop" and not self._rolls_back:
            raise ValueError(
                f"MEGDET.ON_DIVERGENCE is {action!r}, but {type(self).__name__} trains without a "
                "call of megdet_d2.Trainer.train, which rolls back; override run_step or hooks in "
                'place of train, or set MEGDET.ON_DIVERGENCE "stop"'
            )
        if action != "stop" and not can_be_lowered(self.scheduler):
            raise ValueError(
                f"MEGDET.ON_DIVERGENCE is {action!r}, but the learning rates of "
                f"{type(self.scheduler).__name__} do not follow from its base_lrs, so that a "
                'roll-back cannot lower them; set MEGDET.ON_DIVERGENCE "stop"'
            )

    def _check_frozen(self) -> None:
        """Refuses to train on frozen layers that have random weights; warns after a resume."""
        layers = find_frozen_at_random(self.model)
        if not layers:
            return
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        said = (
            f"{', '.join(layers[:3])}{more} are frozen with random weights, since "
            f"MODEL.WEIGHTS {self.cfg.MODEL.WEIGHTS!r} has none for them, and "
            f"MODEL.BACKBONE.FREEZE_AT is {self.cfg.MODEL.BACKBONE.FREEZE_AT}. Set "
            "MODEL.BACKBONE.FREEZE_AT 0, or MODEL.WEIGHTS to a file that has them"
        )
        if self.start_iter == 0:
            raise ValueError(said)
        logger.warning(said)

    def _warn_unguarded(self) -> None:
        action = self.cfg.MEGDET.ON_DIVERGENCE
        said = (
            f"{type(self).__name__}.run_step does not call self._trainer.after_backward() after "
            "its backward, so losses and gradients that are not finite are not noticed"
        )
        if action != "stop":
            raise ValueError(
                f'{said}; call it, or set MEGDET.ON_DIVERGENCE "stop", which is {action!r}'
            )
        if not self._warned_unguarded:
            self._warned_unguarded = True
            logger.warning(f"{said}; call it")

    def _roll_back(self, error: DivergenceError) -> None:
        keys, done = self.cfg.MEGDET, self.progress.backoff.rollbacks
        if keys.ON_DIVERGENCE == "stop":
            raise error
        if done >= keys.MAX_ROLLBACKS:
            raise DivergenceError(
                f"{error}. MEGDET.MAX_ROLLBACKS, {keys.MAX_ROLLBACKS}, are used up"
            ) from error
        warmup_images = self.cfg.SOLVER.WARMUP_ITERS * self.layout.batch_size
        backoff = self.progress.backoff.next(keys.ON_DIVERGENCE, warmup_images, self.images_seen)
        self.progress.backoff = backoff
        loader, diverged = self.data_loader, self.iter
        added = [hook for hook in self._hooks if hook not in self._built]
        self._hooks = []  # the writers of the built ones are closed
        self._register_built_hooks()
        self.register_hooks(list(filter(_works_again, added)))
        last = self.checkpointer.get_checkpoint_file()
        if comm.is_main_process() and last == self._rolled_back_to:
            # The second time from here: training may have begun to diverge before it was saved.
            if os.path.basename(last) != "model_start.pth":  # older ones are from another run
                self.checkpointer.step_back()
        comm.synchronize()
        self.resume_or_load(resume=True)
        self._rolled_back_to = self.checkpointer.get_checkpoint_file()
        self._trainer.reset_data_loader(lambda: loader)
        logger.warning(
            f"MEGDET.ON_DIVERGENCE {keys.ON_DIVERGENCE}: roll-back {done + 1} of "
            f"{keys.MAX_ROLLBACKS}, from iteration {diverged} to {self.start_iter}. The learning "
            f"rate is now {backoff.lr_factor:g} x the config's; the warm-up takes at least "
            f"{backoff.warmup_images} images. Reason: {error}"
        )

    # --- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def build_checkpointer(
        cls, cfg: CfgNode, model: nn.Module, **checkpointables: Any
    ) -> FvcoreCheckpointer:
        """Builds the checkpointer. Override it to use another.

        Args:
            cfg: a config.
            model: as it is called in training, with its DDP.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``, by their keys in
                the file: trainer, which also saves the optimizer and the scheduler.

        Returns:
            a ``megdet_d2.engine.checkpoint.Checkpointer`` for OUTPUT_DIR. Another of Detectron2's
            becomes a subclass of ours, see ``adopt_checkpointer``.
        """
        return Checkpointer(model, cfg.OUTPUT_DIR, **checkpointables)

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the newest good checkpoint, and continues at the image where it stopped.

        With another mini-batch the iteration follows from the images, and the learning rate from
        the config; the log says what changed. Processes that torchrun has restarted resume even
        without ``resume``.

        Args:
            resume: False, or a folder without a checkpoint: loads MODEL.WEIGHTS only.

        Raises:
            RuntimeError: there are checkpoints, and none of them is good.
            ValueError: ``resume`` differs between processes, as it may between machines.
        """
        asked = comm.all_gather(resume)
        if len(set(asked)) > 1:
            ranks = ", ".join(str(rank) for rank, said in enumerate(asked) if not said)
            raise ValueError(f"--resume is not given on ranks {ranks}; give it on all, or on none")
        if not resume and may_restart() and self._has_begun():
            logger.info("Restarted by torchrun: resuming")
            resume = True
        self.progress.clear_loaded()
        super().resume_or_load(resume)
        if self.progress.loaded_iteration is None and self.start_iter > 0:
            self.progress.load_state_dict({})  # a file of another trainer has none
            self.start_iter = self.iter + 1

    def _has_begun(self) -> bool:
        # torchrun's count of restarts is not enough. Each machine's agent has another count, and a
        # start that failed before this line has left an older run's checkpoint where it was.
        launchers = comm.all_gather(find_launcher())
        begun = comm.is_main_process() and claim_run(launchers, self.cfg.OUTPUT_DIR)
        return comm.all_gather(begun)[0]

    @property
    def checkpointer(self) -> Checkpointer:
        """The checkpointer; one of another class that is set becomes one of ours too."""
        return self._checkpointer

    @checkpointer.setter
    def checkpointer(self, other: FvcoreCheckpointer) -> None:
        if not hasattr(self, "progress"):  # Detectron2's constructor sets one that is replaced
            self._checkpointer = other
            return
        if not isinstance(other, FvcoreCheckpointer):
            raise TypeError(
                f"{type(self).__name__} sets a {type(other).__name__} as its checkpointer, which "
                "saves no BN group's statistics and no progress; use a subclass of "
                "megdet_d2.engine.checkpoint.Checkpointer or of Detectron2's DetectionCheckpointer"
            )
        if not isinstance(other, Checkpointer):
            logger.info(
                f"{type(other).__name__} also saves and loads what megdet_d2's checkpointer does"
            )
        self._checkpointer = adopt_checkpointer(other)
        saved = self._checkpointer.checkpointables
        # The progress is loaded after the trainer.
        for key, part in (("trainer", weakref.proxy(self)), ("progress", self.progress)):
            if key not in saved:
                self._checkpointer.add_checkpointable(key, part)

    # --- hooks -----------------------------------------------------------------------------------

    def build_hooks(self) -> list[HookBase | None]:
        """Builds Detectron2's hooks, and one that evaluates with ``TEST.AUG`` after training.

        The trainer adds those of ``build_megdet_hooks`` by itself.
        """
        built = [hook for hook in super().build_hooks() if hook is not None]
        if self.cfg.TEST.AUG.ENABLED:
            # Only once, since it takes many times as long. It comes before the writers close.
            after = next(i for i, h in enumerate(built) if isinstance(h, hooks.EvalHook)) + 1
            built.insert(after, hooks.EvalHook(0, self._test_with_tta))
        return built

    def build_megdet_hooks(self) -> list[HookBase]:
        """Builds the hooks that count, prepare checkpoints and stop on signals.

        The trainer inserts them before the first hook of ``build_hooks`` that saves, evaluates or
        writes. So they stay where ``build_hooks`` is overridden without a call of its parent.
        """
        cfg, layout = self.cfg, self.layout
        checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
        recorder = SampleRecorder(
            cfg.OUTPUT_DIR, layout.batch_size, images_per_epoch(cfg), checkpoint_period
        )
        built: list[HookBase] = [BatchScalars(layout.batch_size, layout.images_per_gpu), recorder]
        if cfg.MEGDET.SKIP_BAD_IMAGES:
            built.insert(0, CountSkippedImages(self.model))
        gather, period = self.checkpointer.gather, cfg.TEST.EVAL_PERIOD
        return [
            *built,
            GatherStatistics(self.checkpointer, checkpoint_period, period, recorder.reduce),
            StopOnSignal(self.checkpointer, recorder.reduce, gather),
        ]

    def _register_built_hooks(self) -> None:
        theirs = [hook for hook in self.build_hooks() if hook is not None]
        self.register_hooks(insert_before_savers(theirs, self.build_megdet_hooks()))
        self._built = list(self._hooks)  # a user of the trainer may add more

    # --- builders --------------------------------------------------------------------------------

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the model with every ``MODEL.CGBN`` and ``MODEL.SUBLINEAR`` key applied.

        Every process has to call it. Where the processes cannot form groups of BN_SIZE images, as
        in an evaluation on fewer GPUs, it warns and leaves one group per machine. The constructor
        of a ``Trainer`` raises there.
        """
        model = super().build_model(cfg)
        if cgbn_layers(model):
            configured, images_per_gpu = _fit_bn_size(cfg)
            configure_cgbn(model, configured, images_per_gpu)
        if cfg.MODEL.SUBLINEAR.ENABLED:
            checkpoint_stages(model, cfg.MODEL.SUBLINEAR.STAGES)
        return model

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds the scheduler; see ``megdet_d2.build_lr_scheduler``."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool) -> Mapper:
        """Builds the mapper, which turns an entry of a data set into an input of the model.

        A subclass with its own mapper or augmentations overrides this method. Resumes stay exact.

        Args:
            cfg: a config.
            is_train: True for the training set, False for a test set.
        """
        return DatasetMapper(cfg, is_train=is_train)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Mapper | None = None) -> DataLoader:
        """Builds Detectron2's loader over a stream of images whose place a checkpoint has.

        Args:
            cfg: a config.
            mapper: in place of that of ``build_mapper``.
        """
        images_per_gpu = images_per_micro_batch(cfg, comm.get_world_size())
        return build_train_loader(cfg, images_per_gpu, mapper or cls.build_mapper(cfg, True))

    @classmethod
    def build_test_loader(
        cls, cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None
    ) -> DataLoader:
        """Builds Detectron2's loader; an image that cannot be read raises ``BadImageError``.

        Args:
            cfg: a config.
            dataset_name: a registered data set.
            mapper: in place of that of ``build_mapper``.
        """
        return build_test_loader(cfg, dataset_name, mapper or cls.build_mapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> DatasetEvaluator:
        """Builds the evaluator of the data set's type; see ``engine.evaluation``."""
        return build_evaluator(cfg, dataset_name, output_dir)

    # --- evaluation ------------------------------------------------------------------------------

    @classmethod
    def check_evaluators(cls, cfg: CfgNode) -> None:
        """Checks what the evaluators need, which would else be found after the training.

        A subclass with its own ``build_evaluator`` or ``test`` is not checked.

        Raises:
            FileNotFoundError, ValueError: an evaluation of DATASETS.TEST would fail.
        """
        if overrides(cls, Trainer, "build_evaluator", "test"):
            return
        findings = inspect_evaluation(cfg)
        if overrides(cls, Trainer, *_OWN_DATA):  # which may merge classes
            findings = [
                replace(f, level="warning") if f.kind in CLASS_FAULTS else f for f in findings
            ]
        raise_findings(findings)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluates the model with the mean of the BN groups' running statistics.

        Every process has to call it.
        """
        with averaged_statistics(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates the model with the augmentation of ``TEST.AUG``.

        Returns:
            results by name: "bbox_TTA" in place of "bbox". Files are in OUTPUT_DIR/inference_TTA.
        """
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, output_dir) for name in cfg.DATASETS.TEST]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # each scale is made from the file's pixels, in one step
        results = cls.test(cfg, build_tta(cfg, model), evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}

    def _test_with_averages(self, cfg: CfgNode, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with averaged_statistics(model):  # an overridden test may not
            return type(self).test(cfg, model, *args, **kwargs)

    def _test_with_tta(self) -> dict[str, Any]:
        with averaged_statistics(self.model):
            results = self.test_with_tta(self.cfg, self.model)
        self._last_eval_results = {**self._last_eval_results, **results}
        return results


def _fit_bn_size(cfg: CfgNode) -> tuple[CfgNode, int]:
    """Returns a config whose BN_SIZE the processes can form, and the images per GPU."""
    keys = cfg.MODEL.CGBN
    try:
        images_per_gpu = images_per_micro_batch(cfg, comm.get_world_size())
        group_ranks(keys.BN_SIZE, images_per_gpu, keys.CROSS_MACHINE)
        return cfg, images_per_gpu
    except ValueError as error:
        logger.warning(
            f"Evaluation only, with each machine as one group, since training could not do: {error}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CGBN.BN_SIZE, cfg.MODEL.CGBN.CROSS_MACHINE = -1, False
    return cfg, 1


def _works_again(hook: HookBase) -> bool:
    """Returns True if a hook can be used after its ``after_train``; otherwise logs that it ends."""
    if not isinstance(hook, (hooks.EvalHook, hooks.CallbackHook)):
        return True
    logger.warning(f"A {type(hook).__name__} that was added to the trainer ends with the roll-back")
    return False


__getattr__ = renamed(__name__, ResumingTrainer="Trainer")
