"""Adds up the seconds of one update from its parts, in closed form.

    t = c b k              compute of k micro-batches of b images, c seconds per image
      + waiting            for the slowest rank, see stragglers.py
      + 2 L k T(n_small)   CGBN: two all-reduces per layer, one after the other
      + exposed gradients  what backward does not hide of T(gradients)
      + h                  a fixed time of the host
      + loader             what decoding takes longer than all of this

All ranks leave an update at the same time, so t is also its time on each of them.
"""

from dataclasses import asdict, dataclass

from .stragglers import grouped_waiting
from .topology import Topology, all_reduce

BACKWARD = 2 / 3
"""The part of the compute that is backward: twice the arithmetic of forward."""
FIRST_BUCKET = 25e6
"""Bytes of the last gradients, which no compute can hide: one bucket of DDP."""
STATISTICS = 2048
"""Bytes of a layer's statistics, which count as a small message: 256 channels in float64."""


@dataclass(frozen=True)
class Work:
    """The work of an update, apart from the machines.

    Attributes:
        seconds_per_image: c, forward and backward of one image on one GPU.
        images: b, images per GPU in one micro-batch.
        micro_batches: k.
        variation: v, coefficient of variation of the cost of an image.
        gradient_bytes: 0 if there is one rank.
        layers: L, layers of CGBN; 0 where the norm is frozen.
        group: ranks of a BN group; 1 where no layer communicates.
        host: h, seconds per update.
        loader: images per second that a rank's loader decodes; None: as many as it takes.

    Raises:
        ValueError: a number makes no sense.
    """

    seconds_per_image: float
    images: float
    micro_batches: int = 1
    variation: float = 0.0
    gradient_bytes: float = 0.0
    layers: int = 0
    group: int = 1
    host: float = 0.0
    loader: float | None = None

    def __post_init__(self) -> None:
        if not self.seconds_per_image > 0 or not self.images > 0 or self.micro_batches < 1:
            raise ValueError(
                f"{self.seconds_per_image} s per image, {self.images} images in each of "
                f"{self.micro_batches} micro-batches; give numbers above 0"
            )
        if self.group > 1 and not self.layers:
            raise ValueError(f"a BN group of {self.group} ranks takes layers that use it")
        if self.loader is not None and not self.loader > 0:
            raise ValueError(f"the loader decodes {self.loader} images/s; give a number above 0")


@dataclass(frozen=True)
class StepTime:
    """The seconds of one update, by part."""

    compute: float
    stragglers: float
    norm: float
    gradients: float
    host: float
    loader: float

    @property
    def total(self) -> float:
        """The sum t of all parts."""
        return sum(asdict(self).values())


def norm_latency(work: Work, topology: Topology) -> float:
    """Returns the seconds of CGBN's all-reduces in one micro-batch: 2 L T(n_small)."""
    return 2 * work.layers * all_reduce(topology.group(work.group), STATISTICS)


def exposed_gradients(size: float, topology: Topology, compute: float) -> float:
    """Returns the seconds of DDP's all-reduces that backward does not hide.

    The last bucket begins when backward ends. The others have the time of backward for them, of
    the last micro-batch.

    Args:
        size: bytes of all gradients.
        topology: all ranks.
        compute: seconds of the last micro-batch.
    """
    if not size:
        return 0.0
    last = min(size, FIRST_BUCKET)
    before = all_reduce(topology, size - last) if size > last else 0.0
    return all_reduce(topology, last) + max(0.0, before - BACKWARD * compute)


def step_time(work: Work, topology: Topology) -> StepTime:
    """Returns the seconds of one update of all ranks of ``topology``."""
    micro_batch = work.seconds_per_image * work.images
    compute = work.micro_batches * micro_batch
    waiting = work.seconds_per_image * grouped_waiting(
        work.images, work.micro_batches, work.group, topology.ranks // work.group, work.variation
    )
    norm = work.micro_batches * norm_latency(work, topology)
    gradients = exposed_gradients(work.gradient_bytes, topology, micro_batch)
    spent = compute + waiting + norm + gradients + work.host
    decoding = work.micro_batches * work.images / work.loader if work.loader else 0.0
    return StepTime(compute, waiting, norm, gradients, work.host, max(0.0, decoding - spent))
