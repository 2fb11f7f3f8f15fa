"""The trainer: Detectron2's, with MegDet's norm and schedule, exact resumes and roll-backs."""

import contextlib
import faulthandler
import logging
import os
import sys
import warnings
import weakref
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from megdet_d2._moved import renamed
from megdet_d2.data.coco import forget_parsed, refuse_unreadable
from megdet_d2.memory import checkpoint_stages
from megdet_d2.norm.batch_norm import bare_model, set_accumulation_steps
from megdet_d2.norm.configure import configure_cgbn, describe_norms
from megdet_d2.norm.keys import find_missing_norms
from megdet_d2.norm.running_statistics import averaged_statistics
from megdet_d2.optim.build import warn_if_unused
from megdet_d2.optim.resumed_options import keep_options
from megdet_d2.schedule.build import build_lr_scheduler, images_per_epoch

from .accumulation import AccumulationTrainer
from .auto_micro_batch import choose_micro_batch
from .background import BackgroundEvaluation
from .background_worker import check_importable, refuse_in_worker
from .best import build_best_checkpointer
from .builders import OWN_DATA, Builders
from .checkpoint import Checkpointer, GatherStatistics, adopt_checkpointer
from .compiled import prepare_model
from .ddp import ddp_without_device_ids, finalize_ddp_buckets
from .disk import naming_output_dir
from .divergence import DivergenceError, DivergenceGuard
from .early_log import write_kept_log
from .ema import SUFFIX, UpdateAverage, build_average
from .exchange import StepExchange
from .frozen import check_frozen
from .hooks import (
    BatchScalars,
    CountSkippedImages,
    StopOutOfStep,
    insert_after_evaluation,
    insert_before_savers,
    observed_step,
)
from .launch import limit_waiting
from .metrics import cut_metrics
from .minibatch import MiniBatchCheck
from .model_classes import check_model_classes
from .model_reads import ModelReads
from .modulation import build_modulation
from .out_of_memory import UpdateRepeater
from .overrides import GuardCheck, LearningRateCheck, check_base_lr, overrides
from .precision import build_inner_trainer, set_float32_precision
from .progress import Layout, TrainingProgress
from .restart import agree_on_resume
from .rollback import RollBack, ScheduleBackoff, works_again
from .sample_ratio import SampleRecorder
from .saved_classes import SavedClasses
from .sgd import set_sgd_implementation
from .signals import StopOnSignal
from .trackers import TrackRun

logger = logging.getLogger(__name__)

_STDERR = sys.__stderr__ or 2  # a notebook's sys.stderr has no file descriptor


class Trainer(Builders):
    """A ``DefaultTrainer`` with the ``MODEL.CGBN`` and ``MEGDET`` keys, on GPUs and on CPUs.

    A resumed run continues as if it had not stopped (docs/resume.md). Without ``MEGDET`` keys the
    schedule is Detectron2's. COCO, LVIS and Pascal VOC data sets are evaluated.

    Args:
        cfg: a config that ``prepare_config`` has resolved.

    Attributes:
        progress: a ``TrainingProgress``: images seen, place in the data, changes by roll-backs.
        ema: the ``WeightAverage`` of ``MEGDET.EMA_DECAY``, or None.

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
        refuse_in_worker()
        write_kept_log()
        if cfg.MEGDET.AUTO_MICRO_BATCH:
            cfg = choose_micro_batch(cfg, type(self))
        name = type(self).__name__
        if cfg.TEST.BACKGROUND:
            check_importable(type(self), cfg)
        self._roll_back = RollBack(self)
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
        build = self.build_model
        # Before DDP sees the layout of the weights; an overridden build_model may not have.
        model_reads = ModelReads(lambda cfg: prepare_model(build(cfg), cfg))
        self.build_model = model_reads  # type: ignore[method-assign]  # for this call alone
        with ddp_without_device_ids(cfg):
            super().__init__(cfg)
        del self.build_hooks, self.build_model
        set_float32_precision(cfg)
        warn_if_unused(cfg.MEGDET.OPTIMIZER, self.optimizer, name)
        set_sgd_implementation(self.optimizer, cfg.SOLVER.SGD_IMPLEMENTATION)
        keep_options(self.optimizer, config_wins=bool(cfg.MEGDET.POLICY))
        cfg = self.cfg  # Detectron2 may have scaled the batch to the workers
        own_data = overrides(type(self), Trainer, *OWN_DATA)
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
        self.ema = build_average(cfg, self.model)
        self._mini_batch = MiniBatchCheck(self.layout, name)
        self._learning_rate = LearningRateCheck(cfg.MEGDET.POLICY, name)
        self._exchange = StepExchange()
        self._guard = DivergenceGuard(self.model, self._exchange)
        is_auto = cfg.MEGDET.AUTO_MICRO_BATCH
        self._repeater = UpdateRepeater(self, self._guard) if is_auto else None
        self._guard_check = GuardCheck(self._guard, cfg.MEGDET.ON_DIVERGENCE, name)
        self._modulation = build_modulation(cfg, self.optimizer, self.progress, name)
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
    def last_iteration(self) -> int:
        """Returns the last iteration that was trained; after the training ``iter`` is higher."""
        return min(self.iter, self.max_iter - 1)

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
        self._roll_back.is_possible = True
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
        self._follow_phases()
        super().before_step()
        self._mini_batch.begin(self._trainer)
        self._guard_check.begin()
        self._exchange.begin()
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
        self._guard_check.end()
        if self._modulation:
            self._modulation.check(self.iter)
        self.progress.count_step()
        with naming_output_dir(self.cfg.OUTPUT_DIR):
            super().after_step()
        self._completed = self.iter + 1

    def before_train(self) -> None:
        """Calls the hooks, and saves a checkpoint for roll-backs that come before any other."""
        self._completed = self.start_iter
        self._prepare_inner_trainer()  # a subclass may have set one
        self._roll_back.check()
        check_frozen(self.model, self.cfg, refuse=self.start_iter == 0)
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
        background = [hook for hook in self._hooks if isinstance(hook, BackgroundEvaluation)]
        if not self.has_finished:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        try:
            with naming_output_dir(self.cfg.OUTPUT_DIR):
                super().after_train()
        finally:
            for hook in self._hooks:
                if isinstance(hook, StopOnSignal):
                    hook.put_handlers_back()
            for evaluation in background:
                evaluation.close()
        for evaluation in background if self.has_finished else ():
            evaluation.raise_failure()  # after all that is written last

    def _prepare_inner_trainer(self) -> None:
        """Gives Detectron2's inner trainer the accumulation and the guards, if it is a new one."""
        if self._trainer is self._prepared:
            return
        if type(self._trainer) in (SimpleTrainer, AMPTrainer):
            self._trainer = build_inner_trainer(self._trainer, self.cfg)
        if isinstance(self._trainer, AccumulationTrainer):
            self._trainer.exchange = self._exchange
            self._trainer.repeater = self._repeater
            self._trainer.modulation = self._modulation
        elif self._modulation:
            self._modulation.refuse(type(self._trainer).__name__)
        elif self._repeater:
            logger.warning(
                f"MEGDET.AUTO_MICRO_BATCH: {type(self._trainer).__name__} makes its updates "
                "itself, so one that runs out of memory is not repeated"
            )
        self._trainer.register_hooks([StopOutOfStep(), self._guard])
        self._prepared = self._trainer

    def _follow_phases(self) -> None:
        """Gives this update the micro-batches of its phase of ``MEGDET.BATCH_WARMUP``."""
        layout, inner = self.layout, self._trainer
        if len(self.progress.phases.starts) == 1 or getattr(inner, "steps", 0) == (
            layout.accumulation_steps
        ):
            return
        if not isinstance(inner, AccumulationTrainer):
            raise ValueError(
                f"MEGDET.BATCH_WARMUP is {self.cfg.MEGDET.BATCH_WARMUP}, but "
                f"{type(inner).__name__} makes the updates itself; keep self._trainer as it is, or "
                "set MEGDET.BATCH_WARMUP ()"
            )
        inner.steps = layout.accumulation_steps
        set_accumulation_steps(self.model, inner.steps)  # the momentum of running statistics
        self._mini_batch.expect(layout)
        logger.info(
            f"MEGDET.BATCH_WARMUP: from iteration {self.iter} an update has {layout.batch_size} "
            f"images in {inner.steps} micro-batches"
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
        resume = agree_on_resume(resume, self.cfg.OUTPUT_DIR)
        self.progress.clear_loaded()
        if self.ema:
            self.ema.clear()  # of updates that may come again, or that a file is without
        super().resume_or_load(resume)
        if self.progress.loaded_iteration is None and self.start_iter > 0:
            self.progress.load_state_dict({})  # a file of another trainer has none
            self.start_iter = self.iter + 1
        if self.ema and not self.ema.updates:
            self.ema.copy_model()
            if self.start_iter > 0:
                logger.warning(
                    f"MEGDET.EMA_DECAY is {self.cfg.MEGDET.EMA_DECAY:g}, but the checkpoint has no "
                    f"average: it begins with the weights of iteration {self.start_iter - 1}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Returns Detectron2's state with the last iteration that was trained.

        After the training Detectron2's counter is one higher. A resume with more epochs from a file
        of that time, such as ``model_best.pth``, would leave an update out.
        """
        return super().state_dict() | {"iteration": self.last_iteration}

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
        parts = {
            "trainer": weakref.proxy(self),
            "progress": self.progress,
            "classes": SavedClasses(self.cfg),
            "micro_batch": self._repeater,  # before statistics of its groups
            "ema": self.ema,
        }
        for key, part in parts.items():
            if part is not None and key not in saved:
                self._checkpointer.add_checkpointable(key, part)

    # --- hooks -----------------------------------------------------------------------------------

    def build_hooks(self) -> list[HookBase | None]:
        """Builds Detectron2's hooks, and those of ``TEST.BACKGROUND`` and ``TEST.AUG``.

        The trainer adds those of ``build_megdet_hooks`` by itself.
        """
        built = [hook for hook in super().build_hooks() if hook is not None]
        place = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        if self.cfg.TEST.BACKGROUND:
            built[place] = BackgroundEvaluation(
                type(self), self.cfg, self.checkpointer, self._test_last
            )
        if self.cfg.TEST.AUG.ENABLED:
            # Only once, since it takes many times as long. It comes before the writers close.
            built.insert(place + 1, hooks.EvalHook(0, self._test_with_tta))
        return built

    def build_megdet_hooks(self) -> list[HookBase]:
        """Builds the hooks that count, prepare checkpoints and stop on signals.

        The trainer inserts them before the first hook of ``build_hooks`` that saves, evaluates or
        writes. So they stay where ``build_hooks`` is overridden without a call of its parent.
        """
        cfg, phases = self.cfg, self.progress.phases
        checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
        recorder = SampleRecorder(cfg.OUTPUT_DIR, phases, images_per_epoch(cfg), checkpoint_period)
        scalars = BatchScalars(phases.batch_size, self.layout.images_per_gpu)
        built: list[HookBase] = [scalars, recorder]
        if cfg.MEGDET.SKIP_BAD_IMAGES:
            built.insert(0, CountSkippedImages(self.model, self._exchange))
        collect = [recorder.reduce]
        if self.ema:
            built.append(UpdateAverage(self.ema, cfg.OUTPUT_DIR))
            collect.append(self.ema.gather)
        gather, period = self.checkpointer.gather, cfg.TEST.EVAL_PERIOD
        return [
            *built,
            GatherStatistics(self.checkpointer, checkpoint_period, period, *collect),
            StopOnSignal(self.checkpointer, self._exchange, *collect, gather),
        ]

    def rebuild_hooks(self) -> None:
        """Builds all hooks again for a roll-back; keeps those that were added and still work.

        The writers among the old ones are closed.
        """
        added = [hook for hook in self._hooks if hook not in self._built]
        self._hooks = []
        self._register_built_hooks()
        self.register_hooks(list(filter(works_again, added)))

    def restart_loader(self) -> None:
        """Lets the training loader begin again, at the place that its stream was set to."""
        loader = self.data_loader
        self._trainer.reset_data_loader(lambda: loader)

    def _register_built_hooks(self) -> None:
        theirs = [hook for hook in self.build_hooks() if hook is not None]
        if self.cfg.TEST.BACKGROUND and not any(
            isinstance(hook, BackgroundEvaluation) for hook in theirs
        ):
            raise ValueError(
                f"TEST.BACKGROUND is True, but {type(self).__name__}.build_hooks does not return "
                "the hooks of Trainer.build_hooks, which evaluate; call it there, or set "
                "TEST.BACKGROUND False"
            )
        built = insert_before_savers(theirs, self.build_megdet_hooks())
        self.register_hooks(insert_after_evaluation(built, self._build_late_hooks()))
        self._built = list(self._hooks)  # a user of the trainer may add more

    def _build_late_hooks(self) -> list[HookBase]:
        """Builds the hooks that need the results of the evaluation."""
        cfg, late = self.cfg, list[HookBase]()
        if self.ema:
            period = 0 if cfg.TEST.BACKGROUND else cfg.TEST.EVAL_PERIOD
            late.append(hooks.EvalHook(period, self._test_ema))
        if cfg.MEGDET.BEST_METRIC:
            late.append(build_best_checkpointer(cfg, self.checkpointer, self.ema))
        if cfg.MEGDET.TRACKERS:
            late.append(TrackRun(cfg))
        return late

    def _test_with_averages(self, cfg: CfgNode, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with averaged_statistics(model):  # an overridden test may not
            return type(self).test(cfg, model, *args, **kwargs)

    def _test_last(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def _test_with_tta(self) -> dict[str, Any]:
        with averaged_statistics(self.model):
            results = self.test_with_tta(self.cfg, self.model)
        if self.ema:
            with averaged_statistics(self.ema.model):
                results.update(self.test_with_tta(self.cfg, self.ema.model, SUFFIX))
        self._last_eval_results = {**self._last_eval_results, **results}
        return results

    def _test_ema(self) -> dict[str, Any]:
        assert self.ema is not None
        with averaged_statistics(self.ema.model):
            results = self.test_ema(self.cfg, self.ema.model)
        self._last_eval_results = {**self._last_eval_results, **results}
        return results


__getattr__ = renamed(__name__, ResumingTrainer="Trainer")
