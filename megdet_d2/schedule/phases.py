"""The phases of a batch warm-up: a mini-batch that grows with the epochs.

After Smith et al., 2018, "Don't Decay the Learning Rate, Increase the Batch Size"; McCandlish et
al., 2018, who find a critical mini-batch that grows while a model trains; and Merrill et al., 2025.

Pure arithmetic: no Detectron2, no config, no torch.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .scaling import NEAR_ZERO, Schedule, epochs_to_iterations, scale_lr

_KEY = "MEGDET.BATCH_WARMUP"


@dataclass(frozen=True)
class Phases:
    """The mini-batch of each iteration of a training.

    Attributes:
        starts: first iteration of each phase, from 0.
        batch_sizes: images of an update in each phase. Without a warm-up there is one phase.
    """

    starts: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    @property
    def pairs(self) -> list[list[int]]:
        """Returns the pairs (first iteration, mini-batch), as plain lists."""
        return [list(pair) for pair in zip(self.starts, self.batch_sizes, strict=True)]

    def batch_size(self, iteration: int) -> int:
        """Returns the images of the update of an iteration."""
        return self.batch_sizes[max(0, bisect.bisect_right(self.starts, iteration) - 1)]

    def images(self, updates: int) -> int:
        """Returns the images of the first ``updates`` updates."""
        ends = (*self.starts[1:], updates)
        return sum(
            max(0, min(end, updates) - start) * size
            for start, end, size in zip(self.starts, ends, self.batch_sizes, strict=True)
        )

    def updates(self, images: int) -> int:
        """Returns the number of updates in the first ``images`` images, rounded up."""
        begun = [self.images(start) for start in self.starts]
        phase = max(0, bisect.bisect_right(begun, images) - 1)
        return self.starts[phase] - (begun[phase] - images) // self.batch_sizes[phase]


def make_phases(
    pairs: Sequence[tuple[float, int]], batch_size: int, epoch_images: int, parts: int
) -> Phases:
    """Makes the phases of ``MEGDET.BATCH_WARMUP``.

    Every phase starts at the image at which a training with ``batch_size`` alone begins an update.
    So both trainings have the same images in each phase, and altogether.

    Args:
        pairs: (epoch, mini-batch), the first from epoch 0, the last with ``batch_size``.
        batch_size: SOLVER.IMS_PER_BATCH.
        epoch_images: images of one epoch.
        parts: images that all processes have in one micro-batch.

    Raises:
        ValueError: the pairs make no phases. The message names the key, its value and the fix.
    """
    said = f"{_KEY} is {tuple(map(tuple, pairs))}"
    epochs, sizes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if epochs[0] != 0 or sizes[-1] != batch_size:
        raise ValueError(
            f"{said}; begin with epoch 0, and end with SOLVER.IMS_PER_BATCH, {batch_size}"
        )
    if any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"{said}; mini-batches have to grow")
    wrong = [size for size in sizes if size < 1 or batch_size % size or size % parts]
    if wrong:
        valid = [n for n in range(parts, batch_size + 1, parts) if batch_size % n == 0]
        raise ValueError(
            f"{said}; {wrong[0]} has to divide SOLVER.IMS_PER_BATCH, {batch_size}, and be a "
            f"multiple of the {parts} images that all processes have in a micro-batch. Valid "
            f"mini-batches: {', '.join(map(str, valid))}. More MEGDET.ACCUMULATION_STEPS allow "
            "smaller ones"
        )
    whole = [epochs_to_iterations(epoch, epoch_images, batch_size) for epoch in epochs]
    if any(a >= b for a, b in itertools.pairwise(whole)):
        raise ValueError(
            f"{said}; epochs have to grow, by one mini-batch of {batch_size} or more: these come "
            f"down to its iterations {whole}"
        )
    lengths = [
        (end - start) * (batch_size // size)
        for start, end, size in zip(whole, whole[1:], sizes, strict=False)
    ]
    return Phases((0, *itertools.accumulate(lengths)), tuple(map(int, sizes)))


def stretch(
    schedule: Schedule, phases: Phases, reference_lr: float, rule: str, warmup_start: str
) -> Schedule:
    """Returns a schedule with the iterations of ``phases`` and the images of ``schedule``.

    Decays, and the end of the warm-up, come at the same images. The warm-up starts from the
    reference learning rate as that of the first mini-batch does, see ``make_schedule``.

    Args:
        schedule: for the last mini-batch alone.
        phases: from ``make_phases``.
        reference_lr: r.
        rule: the scaling rule.
        warmup_start: "reference" or "zero".

    Raises:
        ValueError: training ends before the last phase starts.
    """
    batch_size = phases.batch_sizes[-1]

    def stretched(iteration: int) -> int:
        return phases.updates(iteration * batch_size)

    max_iter = stretched(schedule.max_iter)
    if phases.starts[-1] >= max_iter:
        raise ValueError(
            f"{_KEY} reaches SOLVER.IMS_PER_BATCH, {batch_size}, at iteration {phases.starts[-1]}, "
            f"and training ends at {max_iter}; give earlier epochs"
        )
    first_lr = schedule.base_lr * lr_factor(phases, 0, rule)
    start_lr = NEAR_ZERO * first_lr if warmup_start == "zero" else min(reference_lr, first_lr)
    return replace(
        schedule,
        max_iter=max_iter,
        steps=tuple(map(stretched, schedule.steps)),
        warmup_iters=stretched(schedule.warmup_iters),
        warmup_factor=start_lr / first_lr,
    )


def lr_factor(phases: Phases, iteration: int, rule: str) -> float:
    """Returns the learning rate of an iteration's mini-batch over that of the last mini-batch.

    Args:
        phases: the phases of the training.
        iteration: from 0.
        rule: see ``scale_lr``.
    """
    return scale_lr(1.0, phases.batch_sizes[-1], phases.batch_size(iteration), rule)
