"""Simulates a training with failures, checkpoints and resumes, from checkpoint to checkpoint.

A machine fails after an exponential time of mean MTBF, and with it all ranks stop. The training
starts again from the last checkpoint, which takes R seconds; what came after it is computed again.
As in this package, checkpoints come every SOLVER.CHECKPOINT_PERIOD updates, all ranks wait while
rank 0 saves, and a resume repeats exactly the same images.

In closed form, with λ = machines / MTBF and segments of s seconds including the save:

    E[seconds of a segment] = (e^(λ s) - 1) (1 / λ + R)
"""

import math
from dataclasses import dataclass

import numpy as np

from .topology import Topology

MTBF_HOURS = 6_300.0
"""Hours between failures of a machine with 8 GPUs: 419 unexpected interruptions in 54 days on 2,048
machines (Llama 3, 2024)."""


@dataclass(frozen=True)
class Failures:
    """The failures of a cluster, and how a training resumes.

    Attributes:
        mtbf_hours: mean hours between failures of one machine; infinite: none.
        restart: R, seconds from a failure to the first update after it.
        checkpoint_period: updates between two checkpoints.
        save: seconds of a checkpoint, while all ranks wait.

    Raises:
        ValueError: a number makes no sense.
    """

    mtbf_hours: float = MTBF_HOURS
    restart: float = 300.0
    checkpoint_period: int = 1000
    save: float = 5.0

    def __post_init__(self) -> None:
        if not self.mtbf_hours > 0 or self.checkpoint_period < 1:
            raise ValueError(
                f"a failure every {self.mtbf_hours} h and a checkpoint every "
                f"{self.checkpoint_period} updates; give numbers above 0"
            )
        if self.restart < 0 or self.save < 0:
            raise ValueError("a restart and a checkpoint take 0 seconds or more")

    def rate(self, topology: Topology) -> float:
        """Returns λ, failures of the whole system per second."""
        return topology.machines / (self.mtbf_hours * 3600)


@dataclass(frozen=True)
class Training:
    """The seconds of a whole training, by what they were spent on.

    Attributes:
        kept: updates that are part of the result.
        saving: checkpoints.
        lost: updates, and parts of checkpoints, that a failure undid.
        restarting: from failures to the first update after them.
        failures: their number; a mean in closed form.
    """

    kept: float
    saving: float
    lost: float
    restarting: float
    failures: float

    @property
    def total(self) -> float:
        """The total seconds."""
        return self.kept + self.saving + self.lost + self.restarting


def segments(iterations: int, period: int) -> list[int]:
    """Returns the updates of each segment that ends in a checkpoint; the last may be shorter."""
    whole, rest = divmod(iterations, period)
    return [period] * whole + ([rest] if rest else [])


def simulate_training(
    seconds: np.ndarray,
    iterations: int,
    topology: Topology,
    failures: Failures,
    rng: np.random.Generator,
) -> Training:
    """Simulates one training, event by event.

    Args:
        seconds: of updates, which those of the training are drawn from.
        iterations: length of the training.
        topology: its machines can fail.
        failures: how they do, and what follows.
        rng: the random numbers.

    Raises:
        ValueError: failures come so often that the training would hardly end.
    """
    rate = failures.rate(topology)
    _refuse_endless(rate * (failures.checkpoint_period * float(seconds.mean()) + failures.save))
    kept = saving = lost = restarting = 0.0
    count = 0
    until_failure = rng.exponential(1 / rate) if rate else math.inf
    for updates in segments(iterations, failures.checkpoint_period):
        while True:
            duration = float(rng.choice(seconds, updates).sum())
            if until_failure >= duration + failures.save:
                break
            lost += until_failure
            restarting += failures.restart
            count += 1
            until_failure = rng.exponential(1 / rate)
        until_failure -= duration + failures.save
        kept += duration
        saving += failures.save
    return Training(kept, saving, lost, restarting, count)


def expected_training(
    seconds: float, iterations: int, topology: Topology, failures: Failures
) -> Training:
    """Returns the expected seconds in closed form, with updates of ``seconds`` seconds.

    Raises:
        ValueError: failures come so often that the training would hardly end.
    """
    rate = failures.rate(topology)
    _refuse_endless(rate * (failures.checkpoint_period * seconds + failures.save))
    kept = saving = lost = restarting = count = 0.0
    for updates in segments(iterations, failures.checkpoint_period):
        duration = updates * seconds + failures.save
        again = math.expm1(rate * duration)  # failures before a segment succeeds
        kept += updates * seconds
        saving += failures.save
        lost += again / rate - duration if rate else 0.0
        restarting += again * failures.restart
        count += again
    return Training(kept, saving, lost, restarting, count)


def _refuse_endless(failures_per_segment: float) -> None:
    if failures_per_segment > 10:
        raise ValueError(
            f"{failures_per_segment:.0f} failures are expected between two checkpoints: save more "
            "often"
        )
