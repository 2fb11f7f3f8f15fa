"""Simulates updates rank by rank: each rank draws images, groups meet, the slowest decides.

In every micro-batch a rank computes b images of random cost, and the ranks of a BN group meet in
CGBN's all-reduces. Then all ranks meet in the all-reduce of the gradients. The costs come from
``ImageCost``, so they are skewed, and nothing is assumed about the distribution of a maximum.
Latencies and bandwidths are those of the closed form (step_time.py).
"""

from dataclasses import dataclass

import numpy as np

from .step_time import StepTime, Work, exposed_gradients, norm_latency
from .stragglers import ImageCost
from .topology import Topology


@dataclass(frozen=True)
class Steps:
    """The simulated updates.

    Attributes:
        seconds: of each update.
        parts: mean seconds by part. "compute" is the mean over the ranks.
    """

    seconds: np.ndarray
    parts: StepTime


def simulate_steps(
    work: Work, topology: Topology, cost: ImageCost, steps: int, rng: np.random.Generator
) -> Steps:
    """Simulates ``steps`` updates, one after the other, vectorised over the ranks.

    Args:
        work: its ``images`` is a whole number. ``cost`` replaces its ``variation``.
        topology: all ranks.
        cost: draws the cost of each image.
        steps: number of updates.
        rng: the random numbers.

    Raises:
        ValueError: the images per rank are no whole number, or the ranks no whole BN groups.
    """
    if work.images != int(work.images):
        raise ValueError(f"{work.images} images per rank; a rank computes whole images")
    if topology.ranks % work.group:
        raise ValueError(f"{topology.ranks} ranks do not divide into groups of {work.group}")
    norm = work.micro_batches * norm_latency(work, topology)
    mean, slowest, exposed, decoding = (np.empty(steps) for _ in range(4))
    shape = (work.micro_batches, topology.ranks // work.group, work.group, int(work.images))
    for step in range(steps):
        ranks = work.seconds_per_image * cost.sample(rng, *shape).sum(axis=-1)
        groups = ranks.max(axis=-1)  # each micro-batch ends when its group has met
        mean[step] = ranks.sum(axis=0).mean()
        slowest[step] = groups.sum(axis=0).max()
        last = float(groups[-1].max())
        exposed[step] = exposed_gradients(work.gradient_bytes, topology, last)
        if work.loader:
            decoding[step] = work.micro_batches * work.images / work.loader
        else:
            decoding[step] = 0.0
    busy = slowest + norm + exposed + work.host
    seconds = np.maximum(busy, decoding)
    parts = StepTime(
        float(mean.mean()),
        float((slowest - mean).mean()),
        norm,
        float(exposed.mean()),
        work.host,
        float((seconds - busy).mean()),
    )
    return Steps(seconds, parts)
