"""The multi-scale testing of the appendix, by Detectron2's test-time augmentation.

The detector runs on an image at every scale of ``TEST.AUG.MIN_SIZES``. If it was trained on
mirrored images, it also runs on the mirrored image. One NMS merges all boxes.
"""

import inspect
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    DatasetMapperTTA,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
)
from torch import nn

logger = logging.getLogger(__name__)


class TrainedFlipMapperTTA(DatasetMapperTTA):
    """``DatasetMapperTTA`` that mirrors images only if ``INPUT.RANDOM_FLIP`` is "horizontal"."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Returns the constructor's arguments."""
        arguments = super().from_config(cfg)
        # A detector trained without mirrored digits finds nothing, or something wrong, in them.
        arguments["flip"] = cfg.TEST.AUG.FLIP and cfg.INPUT.RANDOM_FLIP == "horizontal"
        return arguments


def build_tta(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """Returns ``model`` with test-time augmentation; inputs and outputs are those in evaluation.

    Args:
        cfg: with the TEST.AUG keys.
        model: a ``GeneralizedRCNN``, or one in ``DistributedDataParallel``. It is not copied.
    """
    mapper = TrainedFlipMapperTTA(cfg)
    logger.info(
        f"Test-time augmentation: shorter side {tuple(mapper.min_sizes)}, "
        f"{'mirrored too' if mapper.flip else 'not mirrored'}"
    )
    # An image and its mirror image have one size. In a batch with other scales it would be padded
    # to their size, and the detections would depend on the other scales.
    wrapper = GeneralizedRCNNWithTTA(cfg, model, mapper, batch_size=2 if mapper.flip else 1)
    return wrapper.train(model.training)  # an evaluation restores the mode that it finds


def check_tta(cfg: CfgNode) -> None:
    """Checks the TEST.AUG keys before a training, since Detectron2 uses them after it.

    Raises:
        ValueError: ``TEST.AUG.ENABLED`` is True, and test-time augmentation does not support the
            detector, or the sizes are not valid.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    name, sizes = cfg.MODEL.META_ARCHITECTURE, cfg.TEST.AUG.MIN_SIZES
    kind: Any = META_ARCH_REGISTRY.get(name)
    covered = isinstance(kind, type) and issubclass(kind, GeneralizedRCNN)
    # PanopticFPN is a GeneralizedRCNN, but its inference takes other arguments.
    if not covered or "detected_instances" not in inspect.signature(kind.inference).parameters:
        raise ValueError(
            f"TEST.AUG.ENABLED is True and MODEL.META_ARCHITECTURE is {name!r}, but Detectron2 has "
            "test-time augmentation for GeneralizedRCNN only; set TEST.AUG.ENABLED False"
        )
    for key, value in (
        ("KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
        ("LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
    ):
        if value:
            raise ValueError(
                f"TEST.AUG.ENABLED and MODEL.{key} are both True, but Detectron2's test-time "
                "augmentation does not support this; set one of them False"
            )
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {sizes}; give the shorter side in pixels for each scale, "
            "for example (480, 640, 800)"
        )
    if cfg.TEST.AUG.MAX_SIZE < 1:
        raise ValueError(
            f"TEST.AUG.MAX_SIZE is {cfg.TEST.AUG.MAX_SIZE}; give the longer side's limit in pixels"
        )
