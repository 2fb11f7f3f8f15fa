"""Predicts the memory of one GPU in a training step, by part, without a GPU.

    model = MemoryModel(cfg)
    model.predict(4).total                       # bytes, of 4 images per GPU
    model.predict(4, sublinear=("res2", "fpn"))  # with parts that are computed twice

A prediction is a trace of the step on the CPU (``memory_trace``), plus what only a training on
GPUs has: DDP's buckets, the average of the weights, work space and the allocator's slack.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

from detectron2.config import CfgNode

from megdet_d2.engine.builders import Builders
from megdet_d2.engine.trainer import Trainer
from megdet_d2.memory import check_stages
from megdet_d2.optim.halves import keeps_first_half

from .allocator import reserved_bytes
from .memory_step import TracedStep, trace_step

logger = logging.getLogger(__name__)

CONTEXT = 500_000_000
"""Bytes of the CUDA context with torch's kernels. Assumed."""
TRACED = (1, 2, 4, 8, 16, 32, 64)
"""Images per GPU that are traced. Others are interpolated, and above the last extrapolated."""


@dataclass(frozen=True)
class Memory:
    """The bytes of one GPU when a training step holds the most.

    Attributes:
        parameters: weights, and buffers other than CGBN's.
        gradients: those that exist at the peak.
        optimizer: state, such as momentum.
        average: the moving average of the weights, MEGDET.EMA_DECAY.
        buckets: DDP's copy of the gradients; 0 for one process.
        norm: CGBN's running statistics.
        activations: tensors kept for backward, and the temporary ones at the peak.
        workspace: of a convolution at the peak, and the CUDA context.
        slack: what the caching allocator holds beyond the tensors; 0 on a CPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    norm: int
    activations: int
    workspace: int
    slack: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Returns the bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class MemoryModel:
    """Predicts the memory of a config's training. Each trace takes seconds and is made once.

    Args:
        cfg: a config. MODEL.DEVICE, SOLVER.IMS_PER_BATCH and MODEL.SUBLINEAR do not matter.
        device: "cuda", or "cpu" for the tensors alone.
        size: height and width of the images; by default the largest of INPUT.
        objects: ground-truth objects per image.
        trainer: class that builds the model and the optimizer.

    Attributes:
        notes: what the prediction does not see in this model, one sentence each.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        device: str = "cuda",
        size: tuple[int, int] | None = None,
        objects: int = 20,
        trainer: type[Builders] = Trainer,
    ):
        self.notes: list[str] = []
        self.size = size or largest_image(cfg)
        self._cfg, self._device, self._objects = cfg, device, objects
        self._trainer = trainer
        self._traced: dict[tuple, dict[str, int]] = {}
        self._numbers: tuple[int, ...] = TRACED

    def predict(
        self,
        images_per_gpu: int,
        *,
        sublinear: Sequence[str] = (),
        world_size: int = 1,
        micro_batches: int | None = None,
    ) -> Memory:
        """Predicts the peak of a training step after the first.

        Args:
            images_per_gpu: images of a micro-batch.
            sublinear: stages that are computed twice, as in MODEL.SUBLINEAR.STAGES.
            world_size: processes of the training.
            micro_batches: per update; by default MEGDET.ACCUMULATION_STEPS.

        Raises:
            ValueError: a number is below 1, or a stage is unknown or not in the model.
        """
        if images_per_gpu < 1:
            raise ValueError(f"images_per_gpu is {images_per_gpu}; give 1 or more")
        check_stages(sublinear)
        # The second micro-batch starts with gradients, and later ones are like it.
        steps = min(micro_batches or self._cfg.MEGDET.ACCUMULATION_STEPS, 2)
        parts = self._interpolate(images_per_gpu, tuple(sublinear), steps)
        trained, averaged = parts.pop("trained"), parts.pop("averaged")
        if keeps_first_half(self._cfg, world_size):
            parts["gradients"] += trained
        if self._device != "cpu":
            parts["workspace"] += CONTEXT
        return Memory(
            **parts,
            average=averaged if self._cfg.MEGDET.EMA_DECAY else 0,
            buckets=trained if world_size > 1 else 0,
        )

    def _interpolate(self, images: int, stages: tuple[str, ...], steps: int) -> dict[str, int]:
        if not self._traced:
            self._trace(1, stages, steps)  # where it falls back, it changes the numbers
        if images in self._numbers:
            return dict(self._trace(images, stages, steps))
        low = max(n for n in self._numbers[:-1] if n < images)
        high = self._numbers[self._numbers.index(low) + 1]
        first, last = self._trace(low, stages, steps), self._trace(high, stages, steps)
        share = (images - low) / (high - low)
        return {part: round(first[part] + share * (last[part] - first[part])) for part in first}

    def _trace(self, images: int, stages: tuple[str, ...], steps: int) -> dict[str, int]:
        key = images, stages, steps
        if key not in self._traced:
            step = self._run(step_config(self._cfg, images, stages, steps), images)
            parts = step.peak()
            slack = reserved_bytes(step.events) - sum(parts.values())
            self._traced[key] = {
                **parts,
                "slack": slack if self._device != "cpu" else 0,
                "trained": step.bytes_of("gradients"),
                "averaged": step.bytes_of("parameters") + step.bytes_of("norm"),
            }
        return self._traced[key]

    def _run(self, cfg: CfgNode, images: int) -> TracedStep:
        options = cfg, images, self.size, self._objects, self._trainer
        if self.notes:
            return trace_step(*options, fake=False)
        try:
            return trace_step(*options)
        except Exception as error:  # of any kind: the model is the user's
            step = trace_step(*options, fake=False)  # raises what a training would
            self._fall_back(error)
            return step

    def _fall_back(self, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        note = (
            f"{self._cfg.MODEL.META_ARCHITECTURE} cannot be traced without its numbers ({cause}). "
            "So real steps of one and two images run on the CPU, and more are extrapolated"
        )
        logger.warning(note)
        self.notes.append(note)
        self._numbers = TRACED[:2]


def step_config(cfg: CfgNode, images: int, stages: Sequence[str], steps: int) -> CfgNode:
    """Returns a copy of the config for one process on the CPU with the same tensors."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.VIS_PERIOD = "cpu", 0
    cfg.MODEL.CGBN.BN_SIZE, cfg.MODEL.CGBN.CROSS_MACHINE = -1, False
    cfg.MODEL.COMPILE = False
    cfg.MODEL.SUBLINEAR.ENABLED, cfg.MODEL.SUBLINEAR.STAGES = bool(stages), tuple(stages)
    cfg.SOLVER.IMS_PER_BATCH, cfg.MEGDET.ACCUMULATION_STEPS = images * steps, steps
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # float16 has as many bytes and needs a GPU
    return cfg


def largest_image(cfg: CfgNode) -> tuple[int, int]:
    """Returns the height and the width of the largest image that INPUT resizes to.

    Without DATALOADER.ASPECT_RATIO_GROUPING a batch of wide and tall images is padded to a square.

    Raises:
        ValueError: the images are not resized.
    """
    short, long = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    if short < 1:
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}, so images are not resized; "
            "give the size of the largest image"
        )
    short = min(short, long)
    return (short, long) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else (long, long)
