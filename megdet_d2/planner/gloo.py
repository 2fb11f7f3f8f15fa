"""Tests the model on gloo processes that share the cores of one machine: fits 1 and 2, predicts 4.

All ranks train the same images, so no rank waits for a slower one. With P processes on n cores
everything takes s = max(1, P / n) times as long, the collectives too, since the cores do them:

    t(P) = s (u + 2 L T_2KB(P) + T_gradients(P)),    T(P) = 2 (P - 1) α + 2 (P - 1) / P · bytes / β

For each model u, compute and host, is its update with one process. α and 1 / β are the same for all
models, by least squares of the relative errors with two processes. Nothing hides the gradients.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .back_test import BackTest, Row

MOST_PROCESSES_FITTED = 2


@dataclass(frozen=True)
class Measured:
    """The updates of one model with one number of processes.

    Attributes:
        model: its name.
        processes, cores: P and n.
        layers: L, of CGBN.
        parameters: that are trained.
        seconds: of an update.
    """

    model: str
    processes: int
    cores: int
    layers: int
    parameters: int
    seconds: float

    @property
    def sharing(self) -> float:
        """The number of processes for each core, s; 1 or more."""
        return max(1.0, self.processes / self.cores)

    @property
    def terms(self) -> tuple[float, float]:
        """The factors of α and of 1 / β, without s."""
        hops = 2 * (self.processes - 1)
        size = 4 * self.parameters
        return hops * (2 * self.layers + 1), hops / self.processes * size


def measured() -> tuple[Measured, ...]:
    """Returns the rows of ``benchmarks/planner_gloo.py``; none before it has run."""
    path = Path(__file__).with_name("gloo.csv")
    if not path.is_file():
        return ()
    with open(path, newline="") as file:
        return tuple(
            Measured(
                row["model"],
                int(row["processes"]),
                int(row["cores"]),
                int(row["layers"]),
                int(row["parameters"]),
                float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        )


def fit(rows: Sequence[Measured]) -> tuple[dict[str, float], float, float]:
    """Returns u of each model, α and 1 / β, from rows of one and of two processes.

    Neither is below 0: where the least squares say so, it is 0 and the other is fitted alone.
    """
    alone = {row.model: row.seconds for row in rows if row.processes == 1}
    pairs = [row for row in rows if row.processes == 2 and row.model in alone]
    terms = np.array([np.multiply(row.terms, row.sharing / row.seconds) for row in pairs])
    targets = np.array([1 - row.sharing * alone[row.model] / row.seconds for row in pairs])
    best = (np.inf, 0.0, 0.0)
    for used in ([0, 1], [0], [1], []):
        found = np.zeros(2)
        if used:
            found[used] = np.linalg.lstsq(terms[:, used], targets, rcond=None)[0]
        error = float(np.square(terms @ found - targets).sum())
        if (found >= 0).all() and error < best[0]:
            best = (error, float(found[0]), float(found[1]))
    return alone, best[1], best[2]


def predict(row: Measured, alone: dict[str, float], alpha: float, per_byte: float) -> float:
    """Returns t(P) of a row."""
    hops, size = row.terms
    return row.sharing * (alone[row.model] + hops * alpha + size * per_byte)


def back_test() -> BackTest:
    """Returns seconds of an update, measured and predicted, of all models and processes."""
    rows = measured()
    fitted = [row for row in rows if row.processes <= MOST_PROCESSES_FITTED]
    alone, alpha, per_byte = fit(fitted)
    compared = tuple(
        Row(
            f"{row.model}, {row.processes} processes",
            1e3 * row.seconds,
            1e3 * predict(row, alone, alpha, per_byte),
            row.processes <= MOST_PROCESSES_FITTED,
        )
        for row in rows
    )
    rate = f"{1e-6 / per_byte:.0f} MB/s" if per_byte else "not limited"
    constants = {
        "u": "of each model, with one process",
        "α": f"{1e3 * alpha:.3f} ms",
        "β": rate,
        "n": f"{rows[0].cores} cores",
    }
    title = "Gloo processes of one machine, ms per update"
    return BackTest(title, "ms", compared, constants)
