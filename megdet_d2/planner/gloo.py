"""Tests the model on gloo processes that share the cores of one machine: fits 1 to 4, predicts 8.

All ranks train the same images, so no rank waits for a slower one. With P processes on n cores
everything takes s = max(1, P / n) times as long, the collectives too, since the cores do them:

    t(P) = s (u + 2 L T_2KB(P) + T_gradients(P))
    T(P) = ω + 2 (P - 1) α + 2 (P - 1) / P · bytes / β    of several processes

For each model u, compute and host, is its update with one process. ω is the work that a process has
with each message, α a hop of the ring. Both, and 1 / β, are the same for all models, by least
squares of the relative errors with two and four processes. Nothing hides the gradients.
"""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .back_test import BackTest, Row

MOST_PROCESSES_FITTED = 4


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
    def terms(self) -> tuple[float, float, float]:
        """The factors of ω, of α and of 1 / β, without s."""
        hops, messages = 2 * (self.processes - 1), 2 * self.layers + 1
        size = 4 * self.parameters
        return messages * (self.processes > 1), hops * messages, hops / self.processes * size


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


def fit(rows: Sequence[Measured]) -> tuple[dict[str, float], tuple[float, float, float]]:
    """Returns u of each model, and ω, α and 1 / β, from rows of one and of several processes.

    None is below 0: where the least squares say so, it is 0 and the others are fitted alone.
    """
    alone = {row.model: row.seconds for row in rows if row.processes == 1}
    several = [row for row in rows if row.processes > 1 and row.model in alone]
    terms = np.array([np.multiply(row.terms, row.sharing / row.seconds) for row in several])
    targets = np.array([1 - row.sharing * alone[row.model] / row.seconds for row in several])
    best, constants = np.inf, np.zeros(3)
    for used in map(list, itertools.product((False, True), repeat=3)):
        found = np.zeros(3)
        if any(used):
            scale = terms[:, used].max(axis=0)  # bytes are millions of messages
            found[used] = np.linalg.lstsq(terms[:, used] / scale, targets, rcond=None)[0] / scale
        error = float(np.square(terms @ found - targets).sum())
        if (found >= 0).all() and error < best:
            best, constants = error, found
    message, hop, per_byte = constants.tolist()
    return alone, (message, hop, per_byte)


def predict(row: Measured, alone: dict[str, float], constants: tuple[float, float, float]) -> float:
    """Returns t(P) of a row.

    Args:
        row: the model and the processes; its seconds are not read.
        alone: u of each model, in seconds.
        constants: ω and α in seconds, and 1 / β in seconds per byte.
    """
    return row.sharing * (alone[row.model] + float(np.dot(row.terms, constants)))


def back_test() -> BackTest:
    """Returns seconds of an update, measured and predicted, of all models and processes."""
    rows = measured()
    fitted = [row for row in rows if row.processes <= MOST_PROCESSES_FITTED]
    alone, fitted_constants = fit(fitted)
    message, hop, per_byte = fitted_constants
    compared = tuple(
        Row(
            f"{row.model}, {row.processes} processes",
            1e3 * row.seconds,
            1e3 * predict(row, alone, fitted_constants),
            row.processes <= MOST_PROCESSES_FITTED,
        )
        for row in rows
    )
    rate = f"{1e-6 / per_byte:.0f} MB/s" if per_byte else "not limited"
    constants = {
        "u": "of each model, with one process",
        "ω": f"{1e3 * message:.2f} ms",
        "α": f"{1e3 * hop:.3f} ms",
        "β": rate,
        "n": f"{rows[0].cores} cores",
    }
    title = "Gloo processes of one machine, ms per update"
    return BackTest(title, "ms", compared, constants)
