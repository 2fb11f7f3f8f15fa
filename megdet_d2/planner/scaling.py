"""Goes through numbers of machines: efficiency, goodput, and hours to equal AP of each.

With a target batch, it stays and fewer GPUs accumulate micro-batches. Without, it grows with the
GPUs, and with it the epochs that the same AP takes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from .epochs import COCO_IMAGES, EpochModel
from .failures import Failures, Training, expected_training, simulate_training
from .simulation import simulate_steps
from .step_time import StepTime, Work, step_time
from .stragglers import ImageCost
from .topology import Topology


@dataclass(frozen=True)
class Point:
    """A plan for one number of machines.

    Attributes:
        gpus, batch, micro_batches: N, B, and k with B = k b N.
        epochs, iterations: to the target AP.
        closed_form, simulated: seconds of an update by part.
        run: the simulated training.
        expected_hours: of the training in closed form.
        goodput: share of the time in which a GPU computes images of the result.
    """

    gpus: int
    batch: int
    micro_batches: int
    epochs: float
    iterations: int
    closed_form: StepTime
    simulated: StepTime
    run: Training
    expected_hours: float
    goodput: float

    @property
    def hours(self) -> float:
        """Hours to the target AP."""
        return self.run.total / 3600

    @property
    def shares(self) -> dict[str, float]:
        """The share of each part in the whole time; they add up to 1."""
        of_updates = self.run.kept / self.simulated.total
        parts = {name: of_updates * seconds for name, seconds in asdict(self.simulated).items()}
        parts |= {
            "saving": self.run.saving,
            "lost": self.run.lost,
            "restarting": self.run.restarting,
        }
        return {name: seconds / self.run.total for name, seconds in parts.items()}


@dataclass(frozen=True)
class Setup:
    """A training that is planned for several numbers of machines.

    Attributes:
        work: c, b, norm and loader; its ``micro_batches`` is replaced.
        machine: one machine, with its links.
        epochs: E(B).
        failures: failures and checkpoints.
        checkpoint_period: updates between checkpoints; None: one epoch, as in our configs.
        target_batch: B for all numbers of machines; None: B = b N.
        images: images of an epoch.
        steps: updates to simulate for each point.
        seed: of the random numbers.
    """

    work: Work
    machine: Topology
    epochs: EpochModel
    failures: Failures = Failures()
    checkpoint_period: int | None = None
    target_batch: int | None = None
    images: int = COCO_IMAGES
    steps: int = 100
    seed: int = 0

    def micro_batches(self, gpus: int) -> int:
        """Returns k = B / (b N).

        Raises:
            ValueError: B is no multiple of the images that all GPUs compute at once.
        """
        if self.target_batch is None:
            return 1
        k, rest = divmod(self.target_batch, int(self.work.images) * gpus)
        if rest or not k:
            raise ValueError(
                f"a batch of {self.target_batch} is no multiple of {gpus} GPUs with "
                f"{self.work.images:g} images each"
            )
        return k

    def point(self, machines: int) -> Point:
        """Returns the plan of ``machines`` machines.

        Raises:
            ValueError: the batch, or the BN groups, do not fit the machines.
        """
        topology = replace(self.machine, machines=machines)
        gpus, k = topology.ranks, self.micro_batches(topology.ranks)
        work = replace(
            self.work,
            micro_batches=k,
            gradient_bytes=self.work.gradient_bytes if gpus > 1 else 0,
        )
        batch = k * int(work.images) * gpus
        epochs = self.epochs.epochs(batch)
        iterations = max(1, round(epochs * self.images / batch))
        rng = np.random.default_rng((self.seed, machines))
        steps = simulate_steps(work, topology, ImageCost(work.variation), self.steps, rng)
        period = self.checkpoint_period or math.ceil(self.images / batch)
        failures = replace(self.failures, checkpoint_period=period)
        training = simulate_training(steps.seconds, iterations, topology, failures, rng)
        closed = step_time(work, topology)
        expected = expected_training(closed.total, iterations, topology, failures)
        useful = iterations * work.seconds_per_image * k * work.images
        return Point(
            gpus,
            batch,
            k,
            epochs,
            iterations,
            closed,
            steps.parts,
            training,
            expected.total / 3600,
            useful / training.total,
        )


def sweep(setup: Setup, machines: Sequence[int]) -> tuple[list[Point], list[str]]:
    """Returns the points, and a sentence for each number of machines that does not work."""
    points, refused = [], []
    for number in machines:
        try:
            points.append(setup.point(number))
        except ValueError as error:
            refused.append(f"{number} machines: {error}")
    return points, refused


def norm_against_compute(setup: Setup, machines: int) -> list[tuple[int, float, float]]:
    """Returns ranks of a BN group, seconds of CGBN, and seconds of compute, of a micro-batch.

    From one rank to all, by powers of two.
    """
    topology = replace(setup.machine, machines=machines)
    rows, group = [], 1
    while group <= topology.ranks:
        try:
            step = step_time(replace(setup.work, group=group, micro_batches=1), topology)
            rows.append((group, step.norm, step.compute))
        except ValueError:
            pass  # no group of whole machines has this size
        group *= 2
    return rows
