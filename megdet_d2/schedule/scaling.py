"""Computes learning rate, warm-up and iterations from the mini-batch size (MegDet §3.2 and §4).

Linear scaling rule: a mini-batch k times the reference, N̂ = kN, takes r̂ = k·r. It follows from
Eq. 4: one step of N̂ images has the variance of k steps of N. Warm-up: the learning rate rises from
r to r̂ by the same amount every iteration. Policies count epochs; the images of an epoch turn them
into iterations.

Pure arithmetic: no Detectron2, no config, no torch.
"""

import itertools
import math
import operator
from dataclasses import dataclass
from fractions import Fraction

SCALING_RULES = ("linear", "sqrt", "none")
WARMUP_STARTS = ("reference", "zero")
# Start of "zero" as a part of r̂: Detectron2's default warm-up factor. Exactly zero would waste the
# first iteration.
NEAR_ZERO = 0.001


@dataclass(frozen=True)
class EpochPolicy:
    """Ends after ``epochs``; at ``decay_epochs[i]`` the LR is multiplied by ``decay_factors[i]``.

    Raises:
        ValueError: the numbers make no schedule; the message names the ``MEGDET`` key.
    """

    epochs: float
    decay_epochs: tuple[float, ...] = ()
    decay_factors: tuple[float, ...] = ()

    @property
    def values(self) -> tuple[float, ...]:
        """The multiples of the first learning rate: 1, and one after each decay."""
        return tuple(itertools.accumulate(self.decay_factors, operator.mul, initial=1.0))

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, (int, float)):
            raise ValueError(f"MEGDET.EPOCHS is {self.epochs!r}; give a number")
        if not self.epochs > 0:
            raise ValueError(f"MEGDET.EPOCHS is {self.epochs}; give the number of epochs, above 0")
        if len(self.decay_epochs) != len(self.decay_factors):
            raise ValueError(
                f"MEGDET.DECAY_EPOCHS has {len(self.decay_epochs)} entries, MEGDET.DECAY_FACTORS "
                f"{len(self.decay_factors)}; give one factor an epoch, such as 0.1 each"
            )
        ordered = sorted(set(e for e in self.decay_epochs if 0 < e < self.epochs))
        if list(self.decay_epochs) != ordered:
            raise ValueError(
                f"MEGDET.DECAY_EPOCHS is {self.decay_epochs}; give increasing epochs between 0 and "
                f"MEGDET.EPOCHS, {self.epochs}, both excluded"
                + (f": {tuple(ordered)} would do" if ordered else "")
            )
        if any(not f > 0 for f in self.decay_factors):
            raise ValueError(f"MEGDET.DECAY_FACTORS is {self.decay_factors}; factors are above 0")
        if any(f > 1 for f in self.decay_factors):
            raise ValueError(
                f"MEGDET.DECAY_FACTORS is {self.decay_factors}; they multiply the learning rate, "
                "so give at most 1: 0.1 divides it by 10"
            )


POLICIES = {
    "normal": EpochPolicy(11, (8, 10), (0.1, 0.1)),
    "long": EpochPolicy(18, (11, 14, 17), (0.1, 0.1, 0.5)),
}
"""§4: *normal* and *long*."""


@dataclass(frozen=True)
class Schedule:
    """A training schedule in Detectron2's terms; iterations unless said otherwise.

    Attributes:
        base_lr: r̂.
        max_iter: length of the training.
        steps: iterations before which the learning rate decays.
        values: multiples of ``base_lr`` between the steps; one more than ``steps``, from 1.
        warmup_iters: length of the warm-up.
        warmup_factor: start of the warm-up, as a part of ``base_lr``.
    """

    base_lr: float
    max_iter: int
    steps: tuple[int, ...]
    values: tuple[float, ...]
    warmup_iters: int
    warmup_factor: float


def scale_lr(
    reference_lr: float, reference_batch_size: int, batch_size: int, rule: str = "linear"
) -> float:
    """Returns r̂ for ``batch_size`` images: k·r ("linear"), √k·r ("sqrt") or r ("none").

    Raises:
        ValueError: the rule is unknown.
    """
    k = batch_size / reference_batch_size
    if rule == "linear":
        return reference_lr * k
    if rule == "sqrt":
        return reference_lr * math.sqrt(k)
    if rule == "none":
        return reference_lr
    raise ValueError(f"MEGDET.SCALING_RULE is {rule!r}; use one of {', '.join(SCALING_RULES)}")


def epochs_to_iterations(epochs: float, epoch_images: int, batch_size: int) -> int:
    """Returns the whole iterations of ``epochs``: 5,070 for 11 epochs of 118,000 images at 256."""
    # Fractions, since 0.1 epochs of 1,000 images are 100 images and not 99.99….
    return int(Fraction(str(epochs)) * epoch_images // batch_size)


def make_schedule(
    policy: EpochPolicy,
    batch_size: int,
    epoch_images: int,
    reference_lr: float = 0.02,
    reference_batch_size: int = 16,
    rule: str = "linear",
    lr_factor: float = 1.0,
    warmup_epochs: float = 1.0,
    warmup_start: str = "reference",
) -> Schedule:
    """Makes a schedule in iterations from a mini-batch size and an epoch policy.

    Args:
        policy: number of epochs, and the epochs at which the learning rate decays.
        batch_size: images of one update, over all processes and micro-batches.
        epoch_images: images of one epoch.
        reference_lr, reference_batch_size: r and N; the paper's are 0.02 and 16.
        rule: see ``scale_lr``.
        lr_factor: multiplies r̂; 0.5 is Table 2's half learning rate.
        warmup_epochs: length of the warm-up; 0 for none. The paper does not say.
        warmup_start: "reference" starts from min(r, r̂), like the paper; "zero" from near zero.

    Raises:
        ValueError: names the ``MEGDET`` key, its value and the fix.
    """
    for key, value in (
        ("REFERENCE_LR", reference_lr),
        ("REFERENCE_BATCH_SIZE", reference_batch_size),
        ("LR_FACTOR", lr_factor),
    ):
        if not value > 0:
            raise ValueError(f"MEGDET.{key} is {value}; it has to be above 0")
    if warmup_start not in WARMUP_STARTS:
        raise ValueError(
            f"MEGDET.WARMUP_START is {warmup_start!r}; use one of {', '.join(WARMUP_STARTS)}"
        )
    base_lr = lr_factor * scale_lr(reference_lr, reference_batch_size, batch_size, rule)
    iterations = [
        epochs_to_iterations(epochs, epoch_images, batch_size)
        for epochs in (*policy.decay_epochs, policy.epochs)
    ]
    if iterations[0] < 1 or len(set(iterations)) != len(iterations):
        raise ValueError(
            f"MEGDET.EPOCHS {policy.epochs} with MEGDET.DECAY_EPOCHS {policy.decay_epochs} "
            f"come down to iterations {iterations}, since an epoch of {epoch_images} images is "
            f"{epoch_images / batch_size:.2f} mini-batches of {batch_size}: lower "
            "SOLVER.IMS_PER_BATCH, raise the epochs, or set MEGDET.EPOCH_IMAGES"
        )
    warmup_iters = epochs_to_iterations(warmup_epochs, epoch_images, batch_size)
    if not 0 <= warmup_iters < iterations[0]:
        raise ValueError(
            f"MEGDET.WARMUP_EPOCHS is {warmup_epochs}, {warmup_iters} iterations; give 0 or more, "
            f"and less than the {iterations[0]} after which the learning rate first decays or "
            "training ends"
        )
    start_lr = min(reference_lr, base_lr) if warmup_start == "reference" else NEAR_ZERO * base_lr
    return Schedule(
        base_lr=base_lr,
        max_iter=iterations[-1],
        steps=tuple(iterations[:-1]),
        values=policy.values,
        warmup_iters=warmup_iters,
        warmup_factor=start_lr / base_lr,
    )
