"""Compares predictions with measured rows, of which some were fitted and the others predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

MEDIAN_GOAL, WORST_GOAL = 0.10, 0.30


@dataclass(frozen=True)
class Row:
    """A row of a back-test.

    Attributes:
        name: what was measured.
        measured, predicted: in the unit of the back-test.
        fitted: the row was used to fit the model.
        basis: what its constants were fitted on.
    """

    name: str
    measured: float
    predicted: float
    fitted: bool
    basis: str = ""

    @property
    def error(self) -> float:
        """The relative error, above 0 if the prediction is too large."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class BackTest:
    """The rows of one back-test.

    Attributes:
        title: the heading of its table.
        unit: unit of the rows.
        rows: all rows, also those that the model cannot predict well.
        constants: the fitted numbers, with their units.
        notes: sentences about the rows that stand out.
    """

    title: str
    unit: str
    rows: tuple[Row, ...]
    constants: dict[str, str]
    notes: tuple[str, ...] = ()

    def errors(self, fitted: bool) -> np.ndarray:
        """Returns the absolute relative errors of the fitted or of the predicted rows."""
        return np.array([abs(row.error) for row in self.rows if row.fitted == fitted])

    @property
    def meets_goal(self) -> bool:
        """Tells whether median and worst error of the predicted rows are within the goal."""
        errors = self.errors(fitted=False)
        return bool(np.median(errors) <= MEDIAN_GOAL and errors.max() <= WORST_GOAL)

    def summary(self) -> str:
        """Returns one sentence about the predicted rows against the goal, with those outside."""
        errors = self.errors(fitted=False)
        outside = [r.name for r in self.rows if not r.fitted and abs(r.error) > WORST_GOAL]
        text = (
            f"{len(errors)} rows predicted: median error {np.median(errors):.1%}, worst "
            f"{errors.max():.1%} (goal {MEDIAN_GOAL:.0%} and {WORST_GOAL:.0%}: "
            f"{'met' if self.meets_goal else 'missed'})."
        )
        return text + (f" Outside {WORST_GOAL:.0%}: {'; '.join(outside)}." if outside else "")


def to_table(rows: Sequence[Row], unit: str) -> str:
    """Returns a Markdown table of all rows, in their order."""
    cells = [
        {
            "row": row.name,
            f"measured, {unit}": f"{row.measured:.4g}",
            "predicted": f"{row.predicted:.4g}",
            "error": f"{row.error:+.1%}",
            "": "fitted" if row.fitted else "predicted",
            "constants from": row.basis,
        }
        for row in rows
    ]
    if not any(row.basis for row in rows):
        for cell in cells:
            del cell["constants from"]
    return tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True)


def to_text(test: BackTest) -> str:
    """Returns heading, table, fitted numbers, summary and notes as Markdown."""
    constants = "; ".join(f"{name} = {value}" for name, value in test.constants.items())
    parts = [f"## {test.title}", to_table(test.rows, test.unit)]
    parts += [f"Numbers of the model: {constants}."] if constants else []
    return "\n\n".join([*parts, " ".join([test.summary(), *test.notes])])
