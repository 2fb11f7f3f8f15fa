"""Tabulates a simulation: a row per number of GPUs, the shares of its time, CGBN's latency."""

from collections.abc import Sequence

from tabulate import tabulate

from .scaling import Point


def to_table(rows: Sequence[dict[str, str]]) -> str:
    """Returns a Markdown table of rows that have the same keys."""
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def to_points_table(points: Sequence[Point]) -> str:
    """Returns a Markdown table of schedule, seconds per update and hours to equal AP."""
    return to_table(
        [
            {
                "GPUs": f"{point.gpus:,}",
                "batch": f"{point.batch:,}",
                "micro-batches": str(point.micro_batches),
                "epochs": f"{point.epochs:.1f}",
                "iterations": f"{point.iterations:,}",
                "ms per update": f"{1e3 * point.closed_form.total:.1f}",
                "simulated": f"{1e3 * point.simulated.total:.1f}",
                "goodput": f"{point.goodput:.0%}",
                "hours": f"{point.hours:.3g}",
                "closed form": f"{point.expected_hours:.3g}",
                "GPU-hours": f"{point.hours * point.gpus:,.1f}",
                "failures": f"{point.run.failures:g}",
            }
            for point in points
        ]
    )


def to_shares_table(points: Sequence[Point]) -> str:
    """Returns a Markdown table of the share of each part in the whole time."""
    return to_table(
        [
            {"GPUs": f"{point.gpus:,}"}
            | {name: f"{share:.1%}" for name, share in point.shares.items()}
            for point in points
        ]
    )


def to_norm_table(rows: Sequence[tuple[int, float, float]], gpus: int) -> str:
    """Returns a Markdown table of CGBN's latency against compute, by ranks of a BN group.

    Args:
        rows: of ``norm_against_compute``.
        gpus: GPUs per machine.
    """
    return to_table(
        [
            {
                "ranks of a BN group": f"{group:,}",
                "machines": str(max(1, group // gpus)),
                "CGBN, ms": f"{1e3 * norm:.2f}",
                "of compute": f"{norm / compute:.1%}",
            }
            for group, norm, compute in rows
        ]
    )
