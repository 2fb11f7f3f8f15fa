"""Detectron2's trainer with MegDet's norm groups and schedule."""

import faulthandler
import logging
import os
import sys
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from torch import nn

from megdet_d2.data.mapping import CheckedMapper
from megdet_d2.data.stream import shield_loader_worker
from megdet_d2.memory import checkpoint_stages
from megdet_d2.modeling.fused_resnet import fuse_activations
from megdet_d2.modeling.tta import build_tta
from megdet_d2.norm.batch_norm import cgbn_layers, set_accumulation_steps
from megdet_d2.norm.configure import describe_norms, set_bn_size
from megdet_d2.norm.padding import ignore_padding
from megdet_d2.norm.retinanet import separate_retinanet_levels
from megdet_d2.norm.running_statistics import averaged_statistics
from megdet_d2.schedule.build import build_lr_scheduler, images_per_epoch

from .accumulation import accumulate
from .checkpoint import Checkpointer, GatherStatistics
from .ddp import ddp_without_device_ids, finalize_ddp_buckets
from .divergence import DivergenceError, DivergenceGuard
from .hooks import BatchScalars, CountSkippedImages, StopOutOfStep
from .launch import limit_waiting
from .resuming import ResumingTrainer
from .sample_ratio import SampleRecorder
from .signals import StopOnSignal

logger = logging.getLogger(__name__)

_STDERR = sys.__stderr__  # whatever stands in for it, in a notebook say, has no file descriptor


class Trainer(ResumingTrainer):
    """``DefaultTrainer`` that knows the ``MODEL.CGBN`` and ``MEGDET`` keys, on GPUs and on CPUs.

    Takes a config that ``prepare_config`` has resolved; without ``MEGDET`` keys set it trains as
    Detectron2's own. Evaluates COCO, LVIS and Pascal VOC data sets.

    Raises:
        ValueError: a BN size that no whole number of processes gives.
    """

    def __init__(self, cfg: CfgNode):
        if "MEGDET" not in cfg:
            raise ValueError("cfg has no MEGDET keys: call megdet_d2.add_megdet_config(cfg) first")
        self._rolled_back_to = ""
        with ddp_without_device_ids(cfg):
            super().__init__(cfg)
        self._built = list(self._hooks)  # whoever uses the trainer may add more
        cfg = self.cfg  # Detectron2 may have scaled the batch to the workers
        if cfg.MODEL.DEVICE == "cpu":
            finalize_ddp_buckets(self.model)
        # A forward is of one micro-batch, so that is what the layers normalise over.
        images_per_gpu = self.layout.images_per_gpu
        layers = cgbn_layers(self.model)
        if layers:
            set_bn_size(
                self.model, cfg.MODEL.CGBN.BN_SIZE, images_per_gpu, cfg.MODEL.CGBN.CROSS_MACHINE
            )
        for layer in layers:
            layer.algorithm = cfg.MODEL.CGBN.ALGORITHM
        self._trainer = accumulate(self._trainer, self.layout.accumulation_steps)
        set_accumulation_steps(self.model, self.layout.accumulation_steps)
        self._guard = DivergenceGuard(self.model)
        self._trainer.register_hooks([StopOutOfStep(), self._guard])
        limit_waiting(cfg.MEGDET.TIMEOUT)
        logger.info(describe_norms(self.model, images_per_gpu))

    def train(self):
        """Detectron2's; where it diverges, what ``MEGDET.ON_DIVERGENCE`` says.

        Raises:
            DivergenceError: in every process, and no roll-back is allowed, or left.
        """
        while True:
            try:
                return super().train()
            except DivergenceError as error:
                self._roll_back(error)

    def _roll_back(self, error: DivergenceError) -> None:
        keys, done = self.cfg.MEGDET, self.relief.rollbacks
        if keys.ON_DIVERGENCE == "stop":
            raise error
        if done >= keys.MAX_ROLLBACKS:
            raise DivergenceError(
                f"{error}. MEGDET.MAX_ROLLBACKS, {keys.MAX_ROLLBACKS}, are used up"
            ) from error
        warmup_images = self.cfg.SOLVER.WARMUP_ITERS * self.layout.batch_size
        self.relief = self.relief.next(keys.ON_DIVERGENCE, warmup_images, self.images_seen)
        loader, diverged = self.data_loader, self.iter
        added = [hook for hook in self._hooks if hook not in self._built]
        self._hooks = []  # the built ones' writers are closed
        self.register_hooks(self.build_hooks())
        self._built = list(self._hooks)
        self.register_hooks(list(filter(_goes_on, added)))
        last = self.checkpointer.get_checkpoint_file()
        if comm.is_main_process() and last == self._rolled_back_to:
            # Twice from here: perhaps it was saved when training had begun to diverge.
            if os.path.basename(last) != "model_start.pth":  # older ones are of another run
                self.checkpointer.step_back()
        comm.synchronize()
        self.resume_or_load(resume=True)
        self._rolled_back_to = self.checkpointer.get_checkpoint_file()
        self._trainer.reset_data_loader(lambda: loader)
        logger.warning(
            f"MEGDET.ON_DIVERGENCE {keys.ON_DIVERGENCE}: roll-back {done + 1} of "
            f"{keys.MAX_ROLLBACKS}, from iteration {diverged} to {self.start_iter}. The learning "
            f"rate is now {self.relief.lr_factor:g} x the config's; the warm-up takes at least "
            f"{self.relief.warmup_images} images. Reason: {error}"
        )

    def run_step(self) -> None:
        """One update. After twice ``MEGDET.TIMEOUT`` it ends the process, with all its stacks.

        Raises:
            DivergenceError: a loss or a gradient is not finite, in any process.
        """
        # The last resort, for what no other limit covers: a loader's worker that was stopped, say.
        faulthandler.dump_traceback_later(2 * self.cfg.MEGDET.TIMEOUT, exit=True, file=_STDERR)
        try:
            super().run_step()
        except DivergenceError:
            raise
        except FloatingPointError as error:  # of a forward, such as the RPN's
            self._guard.join(error)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def before_train(self) -> None:
        """Hooks, and a checkpoint to roll back to before there is another."""
        super().before_train()
        if self.start_iter == 0 and self.cfg.MEGDET.ON_DIVERGENCE != "stop":
            self.iter = -1  # what a checkpoint has done: nothing
            self.checkpointer.gather()
            self.checkpointer.save("model_start", iteration=self.iter)
            self.iter = 0

    def after_train(self) -> None:
        """Hooks; without an evaluation where the last step failed, in perhaps one process alone."""
        if self.iter < self.max_iter:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        super().after_train()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model, with RetinaNet's CGBN statistics kept apart by level.

        And what ``MODEL`` asks for: activations fused, padding ignored, sublinear memory.
        """
        model = separate_retinanet_levels(super().build_model(cfg))
        if cfg.MODEL.CGBN.FUSE_ACTIVATION:
            logger.info(f"CGBN: fused with the activations of {fuse_activations(model)} blocks")
        if cfg.MODEL.CGBN.IGNORE_PADDING:
            ignore_padding(model)
        if cfg.MODEL.SUBLINEAR.ENABLED:
            checkpoint_stages(model, cfg.MODEL.SUBLINEAR.STAGES)
        return model

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """See ``megdet_d2.build_lr_scheduler``."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's; an image that cannot be read is a ``BadImageError``, and never skipped."""
        mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        if loader.num_workers:
            loader.timeout = cfg.MEGDET.TIMEOUT
            loader.worker_init_fn = shield_loader_worker
        return loader

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        """Detectron2's, with the mean of the BN groups' running statistics."""
        with averaged_statistics(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """``test`` with the augmentation of ``TEST.AUG``: "bbox_TTA" in place of "bbox".

        Its files are in OUTPUT_DIR/inference_TTA.
        """
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, output_dir) for name in cfg.DATASETS.TEST]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # every scale is made from the file's pixels, at once
        results = cls.test(cfg, build_tta(cfg, model), evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator of the data set's type, writing to ``output_dir`` or OUTPUT_DIR/inference.

        With several test sets each has a folder of its name there: they would overwrite each other.
        """
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
        output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_dir = os.path.join(output_dir, dataset_name)
        if kind in ("coco", "coco_panoptic_seg"):
            return COCOEvaluator(dataset_name, output_dir=output_dir)
        if kind == "lvis":
            return LVISEvaluator(dataset_name, output_dir=output_dir)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise NotImplementedError(  # upon which Detectron2 warns, and trains on
            f"DATASETS.TEST has {dataset_name!r} of evaluator_type {kind!r}; override "
            "Trainer.build_evaluator to evaluate it"
        )

    def _test_with_tta(self) -> dict:
        results = self.test_with_tta(self.cfg, self.model)
        self._last_eval_results = {**self._last_eval_results, **results}
        return results

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, and ours before the first that saves, evaluates or writes."""
        cfg = self.cfg
        # Detectron2's constructor has just made a checkpointer, and its hooks are about to take it.
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        ret = [hook for hook in super().build_hooks() if hook is not None]
        if cfg.TEST.AUG.ENABLED:
            # Once, after training: it takes many times as long. Before the writers close, too.
            after = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook)) + 1
            ret.insert(after, hooks.EvalHook(0, self._test_with_tta))
        periods = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        recorder = SampleRecorder(
            cfg.OUTPUT_DIR,
            self.layout.batch_size,
            images_per_epoch(cfg),
            cfg.SOLVER.CHECKPOINT_PERIOD,
        )
        ours = [
            BatchScalars(self.layout.batch_size, self.layout.images_per_gpu),
            recorder,  # before what saves: a checkpoint holds its counts
            GatherStatistics(self.checkpointer, *periods),
            StopOnSignal(self.checkpointer, before_saving=recorder.reduce),
        ]
        if cfg.MEGDET.SKIP_BAD_IMAGES:
            ours.insert(0, CountSkippedImages(self.model))
        savers = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        first = next(i for i, hook in enumerate(ret) if isinstance(hook, savers))
        return ret[:first] + ours + ret[first:]


def _goes_on(hook: HookBase) -> bool:
    """Whether a hook can be used again after its ``after_train``; if not, the log says so."""
    if not isinstance(hook, (hooks.EvalHook, hooks.CallbackHook)):
        return True
    logger.warning(f"A {type(hook).__name__} that was added to the trainer ends with the roll-back")
    return False
