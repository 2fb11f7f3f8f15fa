"""Detectron2's trainer with MegDet's norm groups and schedule."""

import contextlib
import functools
import logging
import os
import weakref
from typing import Any

import detectron2.engine.defaults as d2_defaults
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megdet_d2.analysis.runs import images_per_epoch
from megdet_d2.analysis.samples import SampleRecorder
from megdet_d2.memory import checkpoint_stages
from megdet_d2.modeling.fused_resnet import fuse_activations
from megdet_d2.norm.batch_norm import set_accumulation_steps
from megdet_d2.norm.padding import ignore_padding
from megdet_d2.norm.registry import (
    cgbn_layers,
    describe_norms,
    separate_retinanet_levels,
    set_bn_size,
)
from megdet_d2.schedule.build import build_lr_scheduler, images_per_micro_batch

from .accumulation import accumulate
from .checkpoint import Checkpointer, GatherStatistics, forget_last_checkpoint
from .hooks import BatchScalars, StopOutOfStep
from .launch import restarts
from .preempt import StopOnSignal
from .progress import (
    Layout,
    cut_metrics,
    describe_resume,
    recent_scalars,
    restore_scalars,
    updates_done,
)
from .sampler import build_train_loader, find_stream, step_seed
from .statistics import averaged_statistics

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that knows the ``MODEL.CGBN`` and ``MEGDET`` keys, on GPUs and on CPUs.

    Takes a config that ``prepare_config`` has resolved; without ``MEGDET`` keys set it trains as
    Detectron2's own. Evaluates COCO, LVIS and Pascal VOC data sets.

    Progress is counted in images, and a run that is resumed goes on as if it had not stopped
    (docs/resume.md).

    Attributes:
        layout: processes, micro-batches and images that make up a mini-batch.
        images_seen: images that all updates so far have taken.

    Raises:
        ValueError: a BN size that no whole number of processes gives.
    """

    def __init__(self, cfg: CfgNode):
        if "MEGDET" not in cfg:
            raise ValueError("cfg has no MEGDET keys: call megdet_d2.add_megdet_config(cfg) first")
        self.images_seen = 0
        self._saved_iter = -1  # the last iteration in the checkpoint, as counted then
        self._scalars: dict[str, Any] = {}  # from a checkpoint, until there is a storage
        with _ddp_without_device_ids(cfg):
            super().__init__(cfg)
        cfg = self.cfg  # Detectron2 may have scaled the batch to the workers
        if cfg.MODEL.DEVICE == "cpu":
            _settle_buckets(self.model)
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
        logger.info(describe_norms(self.model, images_per_gpu))

    @functools.cached_property
    def layout(self) -> Layout:
        """From the config that Detectron2 has scaled to the workers."""
        processes, steps = comm.get_world_size(), self.cfg.MEGDET.ACCUMULATION_STEPS
        return Layout(processes, steps, images_per_micro_batch(self.cfg, processes))

    def run_step(self) -> None:
        """One update, with random numbers that follow from the seed, the images and the process."""
        stream = find_stream(self.data_loader)
        if stream:
            seed_all_rng(step_seed(stream.seed, self.images_seen, comm.get_rank()))
        super().run_step()
        self.images_seen += self.layout.batch_size

    def before_train(self) -> None:
        """Hooks, and the scalars from which smoothed metrics go on."""
        super().before_train()
        restore_scalars(self.storage, self._scalars)
        self._scalars = {}

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's, from the newest good checkpoint, at the image where it stopped.

        With another mini-batch the iteration is counted anew from the images, and the learning
        rate is the config's; the log says what changed. Processes that torchrun has restarted
        resume without being asked.

        Raises:
            RuntimeError: there are checkpoints, and none of them is good.
        """
        restarted, may_restart = restarts()
        if restarted and not resume:
            logger.info("Restarted by torchrun: resuming")
        elif may_restart and not resume and comm.is_main_process():
            forget_last_checkpoint(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume or restarted > 0)
        if self._saved_iter >= 0 and comm.is_main_process():
            metrics = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
            cut_metrics(metrics, self._saved_iter, self.images_seen)

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's, and under "megdet" what an exact resume needs besides."""
        stream = find_stream(self.data_loader)
        storage = getattr(self, "storage", None)  # there is none before training
        progress = {
            "images_seen": self.images_seen,
            "layout": vars(self.layout),
            "stream": stream.place(self.images_seen) if stream else None,
            "scalars": recent_scalars(storage, self.iter) if storage else {},
        }
        return super().state_dict() | {"megdet": progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Detectron2's, then the place in the data, and the schedule of this mini-batch."""
        configured = list(self.scheduler.base_lrs)
        super().load_state_dict(state_dict)
        self._saved_iter, done = self.iter, self.iter + 1
        saved = state_dict.get("megdet")
        if saved is None:
            self.images_seen = done * self.layout.batch_size
            logger.warning(
                f"The checkpoint is not of megdet_d2.Trainer: taking its {done} iterations for "
                f"{self.images_seen} images, at this config's mini-batch, of a new shuffling"
            )
            saved = {"layout": vars(self.layout), "stream": None, "scalars": {}}
        else:
            self.images_seen = saved["images_seen"]
        before = Layout(**saved["layout"])
        same_batch = before.batch_size == self.layout.batch_size
        self._go_to(saved["stream"])
        if same_batch:
            self._scalars = saved["scalars"]

        was = self.scheduler.base_lrs[0]
        if self.cfg.MEGDET.POLICY:
            if not same_batch:
                done = updates_done(self.images_seen, self.layout.batch_size)
            self._go_on_with_lr(configured, done)
        elif not same_batch or self.scheduler.base_lrs != configured:
            logger.warning(
                'MEGDET.POLICY is "", so the learning rate and the iteration go on as the '
                "checkpoint has them, whatever SOLVER says; the data go on at the right image"
            )
        self.iter = done - 1
        changes = describe_resume(
            before, self.layout, self.images_seen, (self._saved_iter + 1, done),
            (was, self.scheduler.base_lrs[0]),
        )  # fmt: skip
        if changes:
            logger.info("What --resume changes:\n%s", changes)

    def _go_to(self, place: dict[str, Any] | None) -> None:
        stream = find_stream(self.data_loader)
        if stream is None:
            logger.warning(
                "The training loader is not Trainer.build_train_loader's: its images start over"
            )
        elif place is None:
            stream.seek(stream.place(0) | {"images_seen": self.images_seen})
        else:
            stream.seek(place)

    def _go_on_with_lr(self, base_lrs: list[float], done: int) -> None:
        """The config's learning rate after ``done`` updates: to the bit the old one if it was."""
        self.scheduler.base_lrs = base_lrs
        self.scheduler.last_epoch = done
        lrs = self.scheduler.get_lr()
        for group, base_lr, lr in zip(self.optimizer.param_groups, base_lrs, lrs, strict=True):
            group.update(initial_lr=base_lr, lr=lr)

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
    def build_train_loader(cls, cfg: CfgNode):
        """Detectron2's, over a stream of images whose place a checkpoint has."""
        return build_train_loader(cfg, images_per_micro_batch(cfg, comm.get_world_size()))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        """Detectron2's, with the mean of the BN groups' running statistics."""
        with averaged_statistics(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of the data set's type, writing to OUTPUT_DIR/inference.

        With several test sets each has a folder of its name there: they would overwrite each other.
        """
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_dir = os.path.join(output_dir, dataset_name)
        if kind in ("coco", "coco_panoptic_seg"):
            return COCOEvaluator(dataset_name, output_dir=output_dir)
        if kind == "lvis":
            return LVISEvaluator(dataset_name, output_dir=output_dir)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise ValueError(
            f"DATASETS.TEST has {dataset_name!r} of evaluator_type {kind!r}; override "
            "Trainer.build_evaluator to evaluate it"
        )

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, and ours before the first that saves, evaluates or writes."""
        cfg = self.cfg
        # Detectron2's constructor has just made a checkpointer, and its hooks are about to take it.
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        ret = [hook for hook in super().build_hooks() if hook is not None]
        periods = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        ours = [
            StopOutOfStep(),
            BatchScalars(self.layout.batch_size, self.layout.images_per_gpu),
            # Before what saves: a checkpoint holds its counts.
            SampleRecorder(
                cfg.OUTPUT_DIR,
                self.layout.batch_size,
                images_per_epoch(cfg),
                cfg.SOLVER.CHECKPOINT_PERIOD,
            ),
            GatherStatistics(self.checkpointer, *periods),
            StopOnSignal(self.checkpointer),
        ]
        savers = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        first = next(i for i, hook in enumerate(ret) if isinstance(hook, savers))
        return ret[:first] + ours + ret[first:]


def _settle_buckets(model: nn.Module) -> None:
    """Makes DDP put gradients into buckets now as it will in every step.

    It would do so after its first step, and what three or more processes sum depends, in the last
    bit, on the place in the bucket: a resumed run's first step would differ. Not on GPUs, where the
    order of this layout would cost the overlap of communication with backward.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()


@contextlib.contextmanager
def _ddp_without_device_ids(cfg: CfgNode):
    """On CPU, DDP refuses the ``device_ids`` that ``DefaultTrainer``'s constructor insists on.

    The plugin's second patch of Detectron2, for the length of that constructor only.
    """
    if cfg.MODEL.DEVICE != "cpu":
        yield
        return
    stock = d2_defaults.create_ddp_model
    d2_defaults.create_ddp_model = functools.partial(stock, device_ids=None)
    try:
        yield
    finally:
        d2_defaults.create_ddp_model = stock
