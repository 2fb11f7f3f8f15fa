"""Tests the model on MLPerf's Mask R-CNN: fits each accelerator on one machine, predicts others.

The logs are those of rounds v1.0 to v3.1 (MLCommons' training_results repositories, Apache-2.0).
The two CSV files beside this module have one line per system, medians over its runs, and the
epochs to target by mini-batch. A submission that repeats an earlier one is counted once.

Fitted on systems of one machine with fewer than 16 GPUs:
    c   one number for each accelerator and round,
    v   one number for all.
No system of several machines, or of 16 GPUs and more, is used in a fit.
"""

import csv
import functools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .back_test import BackTest, Row
from .step_time import Work, exposed_gradients, step_time
from .stragglers import ImageCost, waiting
from .topology import NVLINK, PCIE, Topology, network

GRADIENT_BYTES = 2 * 44.4e6
"""Mask R-CNN R50-FPN has 44.4 million parameters; the submissions train in half precision."""
MOST_GPUS_FITTED = 15


@dataclass(frozen=True)
class System:
    """A line of the table; numbers are medians over its runs.

    Attributes:
        round, submitter, system: as MLCommons publishes them.
        hardware: the accelerator, in one spelling.
        machines, gpus_per_machine: the system.
        batch: images of an update.
        training_gpus: GPUs that train. The others evaluate.
        network_gbit: Gb/s of a machine's compute network, from the system's description; where
            that is empty, of the same product's other submissions.
        images_per_s: of all training GPUs together.
    """

    round: str
    submitter: str
    system: str
    hardware: str
    machines: int
    gpus_per_machine: int
    batch: int
    training_gpus: int
    network_gbit: float | None
    images_per_s: float

    @property
    def name(self) -> str:
        """The round, the submitter, and what trains."""
        return (
            f"{self.round} {self.submitter} {self.hardware}, {self.machines} x "
            f"{self.gpus_per_machine}, {self.training_gpus} train, batch {self.batch}"
        )

    @property
    def seconds(self) -> float:
        """The measured seconds of an update."""
        return self.batch / self.images_per_s

    @property
    def is_fitted(self) -> bool:
        """Tells whether the fit may use it: one machine with fewer than 16 GPUs."""
        return self.machines == 1 and self.training_gpus <= MOST_GPUS_FITTED

    @property
    def topology(self) -> Topology:
        """The machines that train."""
        inside = NVLINK if "SXM" in self.hardware else PCIE
        gpus = min(self.gpus_per_machine, self.training_gpus)
        across = network(self.network_gbit or 200)
        return Topology(self.training_gpus // gpus, gpus, inside, across)


@functools.cache
def systems() -> tuple[System, ...]:
    """Returns all systems of the table."""
    with open(Path(__file__).with_name("mlperf_systems.csv"), newline="") as file:
        return tuple(
            System(
                row["round"],
                row["submitter"],
                row["system"],
                row["hardware"],
                int(row["machines"]),
                int(row["gpus_per_machine"]),
                int(row["batch"]),
                int(row["training_gpus"]),
                float(row["network_gbit"]) if row["network_gbit"] else None,
                float(row["images_per_s"]),
            )
            for row in csv.DictReader(file)
        )


def compute_seconds(system: System, variation: float) -> float:
    """Returns c, seconds per image without waiting, from a measured system of one machine."""
    images = system.batch / system.training_gpus
    compute = system.seconds * images / (images + waiting(images, system.training_gpus, variation))
    exposed = exposed_gradients(GRADIENT_BYTES, system.topology, compute)
    return (system.seconds - exposed) * compute / system.seconds / images


def fit_variation(fitted: Sequence[System]) -> tuple[float, float, float]:
    """Returns the v, to 0.01, with which systems of one accelerator and round agree best on c.

    It has the least sum of absolute deviations of log c from the median of its group. Groups of
    one system say nothing about v. The other two numbers are the least and the largest v whose sum
    is up to 5 % larger.
    """
    groups: dict[tuple[str, str], list[System]] = defaultdict(list)
    for system in fitted:
        groups[system.round, system.hardware].append(system)

    def deviation(variation: float) -> float:
        total = 0.0
        for group in groups.values():
            logs = np.log([compute_seconds(system, variation) for system in group])
            total += float(np.abs(logs - np.median(logs)).sum())
        return total

    sums = {step / 100: deviation(step / 100) for step in range(101)}
    least = min(sums.values())
    good = [v for v, total in sums.items() if total <= 1.05 * least]
    return min(sums, key=lambda v: sums[v]), min(good), max(good)


@functools.cache
def variation() -> tuple[float, float, float]:
    """Returns v and its range, fitted on all systems of one machine; see ``fit_variation``."""
    return fit_variation([system for system in systems() if system.is_fitted])


def basis(system: System, fitted: Sequence[System]) -> tuple[str, list[System]]:
    """Returns the systems of one machine that c is taken from, and how near they are.

    The nearest come first: the system itself, then those of the same accelerator by round and
    submitter.

    Raises:
        ValueError: no machine of this accelerator was measured.
    """
    if system in fitted:
        return "itself", [system]
    same = [other for other in fitted if other.hardware == system.hardware]
    if not same:
        raise ValueError(f"no single machine with {system.hardware} is in MLPerf's table")

    def distance(other: System) -> float:
        return abs(float(other.round[1:]) - float(system.round[1:]))

    nearest = min(map(distance, same))
    same = [other for other in same if distance(other) == nearest]
    own = [other for other in same if other.submitter == system.submitter]
    chosen = own or same
    rounds = "/".join(sorted({other.round for other in chosen}))
    number = f", {len(chosen)} machines" if len(chosen) > 1 else ""
    return f"{'same submitter' if own else 'other submitters'}, {rounds}{number}", chosen


def work_of(system: System, seconds_per_image: float, variation: float) -> Work:
    """Returns the work of a system's update, with frozen norms."""
    return Work(
        seconds_per_image,
        system.batch / system.training_gpus,
        variation=variation,
        gradient_bytes=GRADIENT_BYTES if system.training_gpus > 1 else 0,
    )


def hardware_seconds() -> dict[str, tuple[float, str]]:
    """Returns c and its round for each accelerator: the median of its newest round.

    These are seconds per image of NVIDIA's Mask R-CNN R50-FPN in half precision, with frozen norms
    and CUDA graphs. Other code is slower.
    """
    found = {}
    for hardware in sorted({system.hardware for system in systems() if system.is_fitted}):
        of_it = [s for s in systems() if s.is_fitted and s.hardware == hardware]
        newest = max(system.round for system in of_it)
        seconds = [compute_seconds(s, variation()[0]) for s in of_it if s.round == newest]
        found[hardware] = (statistics.median(seconds), newest)
    return found


def back_test() -> BackTest:
    """Returns images/s of all systems, measured and predicted."""
    v, low, high = variation()
    fitted = [system for system in systems() if system.is_fitted]
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for system in fitted:
        groups[system.round, system.hardware].append(compute_seconds(system, v))
    rows = []
    for system in sorted(systems(), key=lambda s: not s.is_fitted):
        if system.is_fitted:
            c = statistics.median(groups[system.round, system.hardware])
            source = f"{len(groups[system.round, system.hardware])} of this accelerator and round"
        else:
            source, chosen = basis(system, fitted)
            c = statistics.median(compute_seconds(other, v) for other in chosen)
        t = step_time(work_of(system, c, v), system.topology).total
        row = Row(system.name, system.images_per_s, system.batch / t, system.is_fitted, source)
        rows.append(row)
    constants = {
        "v": f"{v:.2f} ({low:.2f} to {high:.2f} fit nearly as well), fitted on one machine",
        "v by sizes and objects alone": f"{ImageCost().explained:.2f}",
        "c": f"one for each of {len(groups)} pairs of accelerator and round",
    }
    return BackTest("MLPerf Training, Mask R-CNN, images/s", "images/s", tuple(rows), constants)
