"""Estimates how many epochs more a larger mini-batch needs for the same AP.

    E(B) = E_min (1 + B / B_crit)     epochs to a target, of mini-batch B
    I(B) = E(B) · images / B          its iterations, at least E_min · images / B_crit

(McCandlish et al., 2018, An Empirical Model of Large-Batch Training.) Far below B_crit twice the
GPUs take half the time. Far above it they bring nothing.
"""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .back_test import BackTest, Row

COCO_IMAGES = 118_000
"""Images of an epoch, as the paper counts them."""
MOST_IMAGES_FITTED = 128


@dataclass(frozen=True)
class EpochModel:
    """The function E(B) of one model and target.

    Attributes:
        least: E_min, epochs of a mini-batch that is small against B_crit.
        critical: B_crit, images. ``megdet variance`` measures a gradient noise scale, which
            approximates it at the weights that it is measured at.
        source: where the numbers are from.

    Raises:
        ValueError: a number is not above 0.
    """

    least: float
    critical: float
    source: str = ""

    def __post_init__(self) -> None:
        if not self.least > 0 or not self.critical > 0:
            raise ValueError(
                f"E_min is {self.least} and B_crit {self.critical}; give numbers above 0"
            )

    def epochs(self, batch: float) -> float:
        """Returns E(B)."""
        return self.least * (1 + batch / self.critical)

    def factor(self, batch: float, reference: float) -> float:
        """Returns E(B) / E(reference): how many times the epochs of a known recipe to take."""
        return self.epochs(batch) / self.epochs(reference)

    def least_iterations(self, images: int = COCO_IMAGES) -> float:
        """Returns the iterations that no mini-batch goes below: E_min · images / B_crit."""
        return self.least * images / self.critical

    def hours(self, batch: int, seconds: float, images: int = COCO_IMAGES) -> float:
        """Returns the hours to equal AP: I(B) updates of ``seconds`` seconds."""
        return self.epochs(batch) * images / batch * seconds / 3600


PRESETS = {
    "maskrcnn": EpochModel(12.5, 700, "MLPerf's reference convergence points, Mask R-CNN"),
    "retinanet": EpochModel(3.9, 2000, "MLPerf's reference convergence points, RetinaNet"),
}
"""Both to MLPerf's targets: 0.377 box and 0.339 mask AP; 0.34 mAP on OpenImages."""


@dataclass(frozen=True)
class Measured:
    """The epochs to target of MLPerf's converged submissions with one mini-batch.

    Attributes:
        benchmark: key of ``PRESETS``.
        batch: images.
        runs: converged runs.
        epochs: their mean.
    """

    benchmark: str
    batch: int
    runs: int
    epochs: float


@functools.cache
def measured() -> tuple[Measured, ...]:
    """Returns MLPerf's mean epochs to target, by mini-batch."""
    with open(Path(__file__).with_name("mlperf_epochs.csv"), newline="") as file:
        return tuple(
            Measured(
                row["benchmark"], int(row["batch"]), int(row["runs"]), float(row["mean_epochs"])
            )
            for row in csv.DictReader(file)
        )


def fit(points: Sequence[Measured]) -> EpochModel:
    """Returns the E(B) with the least squares over all runs.

    Raises:
        ValueError: the epochs do not rise with the mini-batch.
    """
    weights = np.sqrt([point.runs for point in points])
    terms = np.array([[1.0, point.batch] for point in points])
    epochs = np.array([point.epochs for point in points])
    at_zero, slope = np.linalg.lstsq(terms * weights[:, None], epochs * weights, rcond=None)[0]
    if slope <= 0:
        raise ValueError("the epochs do not rise with the mini-batch: there is no B_crit to fit")
    return EpochModel(float(at_zero), float(at_zero / slope))


def back_tests() -> list[BackTest]:
    """Returns the presets against MLPerf's submissions, and a fit on small mini-batches alone."""
    tests = []
    for benchmark, preset in PRESETS.items():
        points = [point for point in measured() if point.benchmark == benchmark]
        rows = tuple(
            Row(f"batch {p.batch}, {p.runs} runs", p.epochs, preset.epochs(p.batch), False)
            for p in points
        )
        constants = {"E_min": f"{preset.least:g}", "B_crit": f"{preset.critical:g} images"}
        title = f"Epochs to target, {benchmark}, by {preset.source}"
        tests.append(BackTest(title, "epochs", rows, constants))
    points = [point for point in measured() if point.benchmark == "maskrcnn"]
    small = fit([point for point in points if point.batch <= MOST_IMAGES_FITTED])
    rows = tuple(
        Row(
            f"batch {p.batch}, {p.runs} runs", p.epochs, small.epochs(p.batch),
            p.batch <= MOST_IMAGES_FITTED,
        )
        for p in points
    )  # fmt: skip
    constants = {"E_min": f"{small.least:.1f}", "B_crit": f"{small.critical:.0f} images"}
    title = f"Epochs to target, maskrcnn, fitted on batches up to {MOST_IMAGES_FITTED}"
    tests.append(BackTest(title, "epochs", rows, constants))
    return tests
