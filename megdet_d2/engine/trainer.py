"""Detectron2's trainer with MegDet's norm groups and schedule."""

import contextlib
import functools
import logging
import os

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
from torch import nn

from megdet_d2.analysis.runs import images_per_epoch
from megdet_d2.analysis.samples import SampleRecorder
from megdet_d2.modeling.fused_resnet import fuse_activations
from megdet_d2.norm.padding import ignore_padding
from megdet_d2.norm.registry import (
    cgbn_layers,
    describe_norms,
    separate_retinanet_levels,
    set_bn_size,
)
from megdet_d2.schedule.build import build_lr_scheduler

from .hooks import AverageStatistics, BatchScalars, StopOutOfStep

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that knows the ``MODEL.CGBN`` and ``MEGDET`` keys, on GPUs and on CPUs.

    Takes a config that ``prepare_config`` has resolved; without ``MEGDET`` keys set it trains as
    Detectron2's own. Evaluates COCO, LVIS and Pascal VOC data sets.

    Raises:
        ValueError: a BN size that no whole number of processes gives.
    """

    def __init__(self, cfg: CfgNode):
        if "MEGDET" not in cfg:
            raise ValueError("cfg has no MEGDET keys: call megdet_d2.add_megdet_config(cfg) first")
        with _ddp_without_device_ids(cfg):
            super().__init__(cfg)
        cfg = self.cfg  # Detectron2 may have scaled the batch to the workers
        images_per_gpu = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        layers = cgbn_layers(self.model)
        if layers:
            set_bn_size(
                self.model, cfg.MODEL.CGBN.BN_SIZE, images_per_gpu, cfg.MODEL.CGBN.CROSS_MACHINE
            )
        for layer in layers:
            layer.algorithm = cfg.MODEL.CGBN.ALGORITHM
        logger.info(describe_norms(self.model, images_per_gpu))

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's.

        Raises:
            ValueError: the checkpoint was trained with another learning rate than the config
                comes to, and would go on with it.
        """
        configured = list(self.scheduler.base_lrs)
        super().resume_or_load(resume)
        if self.cfg.MEGDET.POLICY and self.scheduler.base_lrs != configured:
            raise ValueError(
                f"--resume: the checkpoint in {self.cfg.OUTPUT_DIR!r} was trained with a learning "
                f"rate of {self.scheduler.base_lrs[0]:g}, and this config comes to "
                f"{configured[0]:g}. Resume with the same mini-batch and MEGDET keys, or start "
                "anew from its weights with another OUTPUT_DIR."
            )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model, with RetinaNet's CGBN statistics kept apart by level.

        And what ``MODEL.CGBN`` asks for: activations fused, padding ignored.
        """
        model = separate_retinanet_levels(super().build_model(cfg))
        if cfg.MODEL.CGBN.FUSE_ACTIVATION:
            logger.info(f"CGBN: fused with the activations of {fuse_activations(model)} blocks")
        if cfg.MODEL.CGBN.IGNORE_PADDING:
            ignore_padding(model)
        return model

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """See ``megdet_d2.build_lr_scheduler``."""
        return build_lr_scheduler(cfg, optimizer)

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
        ret = [hook for hook in super().build_hooks() if hook is not None]
        ours = [
            StopOutOfStep(),
            AverageStatistics(self.model, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
            BatchScalars(
                cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            ),
            SampleRecorder(
                cfg.OUTPUT_DIR,
                cfg.SOLVER.IMS_PER_BATCH,
                images_per_epoch(cfg),
                cfg.SOLVER.CHECKPOINT_PERIOD,
            ),
        ]
        savers = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        first = next(i for i, hook in enumerate(ret) if isinstance(hook, savers))
        return ret[:first] + ours + ret[first:]


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
