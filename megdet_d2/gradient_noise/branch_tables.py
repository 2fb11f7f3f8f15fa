"""Tabulates branches and their critical batches, as Markdown, CSV and json."""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tabulate import tabulate

from .branch import Start
from .critical_batch import Branch, Comparison, find_critical


@dataclass(frozen=True)
class Measured:
    """The results of one checkpoint.

    Attributes:
        start: where the branches start.
        loss: on the fixed images, before any branch.
        noise_scale, noise_interval: in images, see ``Fit``.
        branches: all of them.
        compared: by scaling rule, the factors against k = 1.
    """

    start: Start
    loss: float
    noise_scale: float
    noise_interval: tuple[float, float]
    branches: list[Branch]
    compared: dict[str, list[Comparison]]


def write_results(measured: Sequence[Measured], tolerance: float, output: Path) -> None:
    """Writes branches.csv, one row per branch, and branches.json, one entry per checkpoint.

    The table, which is made to be shared, has the names of checkpoints; json has their paths.
    """
    with open(output / "branches.csv", "w", newline="") as file:
        names = [field.name for field in fields(Branch) if field.name != "losses"]
        writer = csv.writer(file)
        writer.writerow(("checkpoint", "images_seen", *names, "loss"))
        for m in measured:
            for branch in m.branches:
                values = [getattr(branch, name) for name in names]
                writer.writerow((m.start.path.name, m.start.images_seen, *values, branch.loss))
    entries = []
    for m in measured:
        critical = {
            rule: dict(zip(("images", "bounded"), find_critical(compared, tolerance), strict=True))
            for rule, compared in m.compared.items()
        }
        entries.append(
            {
                "checkpoint": str(m.start.path),
                "digest": m.start.digest,
                "images_seen": m.start.images_seen,
                "lr": m.start.lr,
                "loss": m.loss,
                "noise_scale": m.noise_scale,
                "noise_interval": m.noise_interval,
                "tolerance": tolerance,
                "critical_batch": critical,
                "branches": [asdict(branch) for branch in m.branches],
            }
        )
    (output / "branches.json").write_text(json.dumps(entries, indent=1) + "\n")


def describe(measured: Sequence[Measured], args: argparse.Namespace, source: str) -> str:
    """Returns the tables in Markdown: all checkpoints, then each with its factors.

    Args:
        measured: the results.
        args: of ``megdet_cli.variance``.
        source: the images of the loss.
    """
    rows = [
        {
            "checkpoint": m.start.path.stem,
            "images seen": m.start.images_seen,
            "learning rate": f"{m.start.lr:.4g}",
            "noise scale, images": f"{m.noise_scale:.3g}",
            "95 %": f"{m.noise_interval[0]:.3g} to {m.noise_interval[1]:.3g}",
            **{
                f"critical batch, {rule}": describe_critical(compared, args.tolerance)
                for rule, compared in m.compared.items()
            },
        }
        for m in measured
    ]
    summary = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    parts = [
        f"# {args.config}",
        f"Branches of {args.images} images. Loss: {source}, the mean of {args.points} points in "
        "the second half of a branch. The critical batch is the largest mini-batch up to which no "
        f"loss is worse than that of k = 1 by more than {100 * args.tolerance:g} %.",
        summary,
    ]
    for m in measured:
        for rule, compared in m.compared.items():
            gain = 1 - compared[0].loss / m.loss
            parts += [
                f"## {m.start.path.stem}, {rule} rule",
                f"Loss before the branches: {m.loss:.4f}. k = 1 lowers it by {100 * gain:.2f} %.",
                to_branch_table(compared, args.tolerance),
            ]
            if gain <= args.tolerance:
                parts.append(
                    "This gain is within the tolerance, so a branch that learns nothing would not "
                    "be worse: give more --images, or a smaller --tolerance."
                )
    return "\n\n".join(parts) + "\n"


def describe_critical(compared: Sequence[Comparison], tolerance: float) -> str:
    """Returns the critical batch for a table, with "at least" where no factor was worse."""
    critical, bounded = find_critical(compared, tolerance)
    return f"{critical}" if bounded else f"at least {critical}"


def to_branch_table(compared: Sequence[Comparison], tolerance: float) -> str:
    """Returns a Markdown table of the factors of one checkpoint and rule."""
    rows = [
        {
            "k": c.factor,
            "mini-batch": c.batch_size,
            "learning rate": f"{c.lr:.4g}",
            "seeds": c.seeds,
            "loss": "diverged" if math.isinf(c.loss) else f"{c.loss:.4f}",
            "against k = 1": _percent(c, c.difference),
            "95 %": _percent(c, c.low, c.high),
            f"worse by over {100 * tolerance:g} %": _verdict(c, tolerance),
        }
        for c in compared
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def _percent(comparison: Comparison, *values: float) -> str:
    if comparison.factor == 1 or not all(map(math.isfinite, values)):
        return ""
    return " to ".join(f"{100 * value:+.2f}" for value in values) + " %"


def _verdict(comparison: Comparison, tolerance: float) -> str:
    if comparison.factor == 1:
        return ""
    said = "yes" if comparison.is_worse(tolerance) else "no"
    return said if comparison.is_decided(tolerance) else f"{said}, within chance"
