"""Multi-scale testing (Appendix): Detectron2's test-time augmentation, as a config asks for it.

The detector looks at an image at every scale of ``TEST.AUG.MIN_SIZES``, and mirrored where it was
trained on mirrored images; all boxes go back to the image and through one NMS.
"""

import inspect
import logging

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
    """Detectron2's, but that ``TEST.AUG.FLIP`` mirrors only what ``INPUT.RANDOM_FLIP`` did."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Arguments of the constructor."""
        arguments = super().from_config(cfg)
        # What never saw a mirrored digit finds nothing in one, or something else.
        arguments["flip"] = cfg.TEST.AUG.FLIP and cfg.INPUT.RANDOM_FLIP == "horizontal"
        return arguments


def build_tta(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """``model`` with test-time augmentation: takes and returns what ``model`` does in evaluation.

    Args:
        model: a ``GeneralizedRCNN``, or one in ``DistributedDataParallel``; shared, not copied.
    """
    mapper = TrainedFlipMapperTTA(cfg)
    logger.info(
        f"Test-time augmentation: shorter side {tuple(mapper.min_sizes)}, "
        f"{'mirrored too' if mapper.flip else 'not mirrored'}"
    )
    # An image and its mirror image are of one size. With other scales in the batch it would be
    # padded to theirs, and what is found would depend on which other scales there are.
    wrapper = GeneralizedRCNNWithTTA(cfg, model, mapper, batch_size=2 if mapper.flip else 1)
    return wrapper.train(model.training)  # evaluation puts back the mode that it finds


def check_tta(cfg: CfgNode) -> None:
    """Refuses what Detectron2's test-time augmentation would fail at after a training.

    Raises:
        ValueError: ``TEST.AUG.ENABLED`` with a detector that it does not cover, or without sizes.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    name, sizes = cfg.MODEL.META_ARCHITECTURE, cfg.TEST.AUG.MIN_SIZES
    kind = META_ARCH_REGISTRY.get(name)
    # PanopticFPN is one too, but its inference takes other arguments.
    if not (
        isinstance(kind, type)
        and issubclass(kind, GeneralizedRCNN)
        and "detected_instances" in inspect.signature(kind.inference).parameters
    ):
        raise ValueError(
            f"TEST.AUG.ENABLED is True and MODEL.META_ARCHITECTURE {name!r}, but Detectron2 has "
            "test-time augmentation for GeneralizedRCNN alone; set TEST.AUG.ENABLED False"
        )
    for key, value in (
        ("KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
        ("LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
    ):
        if value:
            raise ValueError(
                f"TEST.AUG.ENABLED is True and MODEL.{key} too, which Detectron2's test-time "
                "augmentation does not know; set one of them False"
            )
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {sizes}; give the shorter side in pixels for each scale, "
            "(480, 640, 800) say"
        )
    if cfg.TEST.AUG.MAX_SIZE < 1:
        raise ValueError(
            f"TEST.AUG.MAX_SIZE is {cfg.TEST.AUG.MAX_SIZE}; give the longer side's limit in pixels"
        )
