"""Counts the arithmetic of a training step of any config's model, to scale measured seconds by it.

The step is the real one, with tensors that have a shape and no values (``memory_step``), under
torch's FlopCounterMode. It takes seconds, and no GPU.
"""

from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megdet_d2.engine.trainer import Trainer
from megdet_d2.memory import stages_of
from megdet_d2.norm.batch_norm import cgbn_layers

from .memory import step_config
from .memory_step import trace_step
from .stragglers import POSITIVES_PER_OBJECT

OBJECTS, PERSONS = 7, 3
"""Objects per image, as COCO has on average, and persons where it has keypoints; the latter is an
assumption."""
ASPECT = 4 / 3
"""Width over height of the image."""


@dataclass(frozen=True)
class Counted:
    """The numbers of a model that its time depends on.

    Attributes:
        step: floating-point operations of forward and backward of one image.
        parameters: that are trained.
        layers: L, of CGBN.
        stages: that sublinear memory can compute twice.
    """

    step: float
    parameters: int
    layers: int
    stages: tuple[str, ...]


def count(cfg: CfgNode, megapixels: float, sublinear: tuple[str, ...] = ()) -> Counted:
    """Returns the arithmetic of the model of ``cfg``.

    Args:
        cfg: a config; it is not changed.
        megapixels: of an image.
        sublinear: the stages that backward computes a second time.

    Raises:
        ValueError: the model does not run on noise.
    """
    cfg = step_config(cfg, 1, sublinear, 1)
    # A trained RPN gives a dozen regions for each object; mask and keypoint heads take only these.
    objects = PERSONS if cfg.MODEL.KEYPOINT_ON else OBJECTS
    positives = objects * POSITIVES_PER_OBJECT / cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = min(cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION, positives)
    built: list[nn.Module] = []

    class Keeping(Trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> Any:
            built.append(super().build_model(cfg))
            return built[-1]

    size = image_size(megapixels)
    try:
        counted = _count(cfg, size, objects, Keeping, fake=True)
    except Exception:  # the user's own model needs its numbers
        try:
            counted = _count(cfg, size, objects, Keeping, fake=False)
        except Exception as error:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: a training step on noise "
                f"fails, so its arithmetic is not known ({type(error).__name__}: {error})"
            ) from error
    model = built[-1]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return Counted(counted, sum(trained), len(cgbn_layers(model)), stages_of(model))


def _count(
    cfg: CfgNode, size: tuple[int, int], objects: int, trainer: type[Trainer], fake: bool
) -> float:
    with FlopCounterMode(display=False) as counter:
        trace_step(cfg, 1, size, objects, trainer, fake)
    return counter.get_total_flops()


def image_size(megapixels: float) -> tuple[int, int]:
    """Returns height and width of an image of this size."""
    height = max(1, round((1e6 * megapixels / ASPECT) ** 0.5))
    return height, max(1, round(1e6 * megapixels / height))
