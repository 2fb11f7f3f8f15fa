"""Draws a simulation: efficiency, hours to equal AP, and CGBN's latency against compute."""

from collections.abc import Sequence
from pathlib import Path

from megdet_d2.report.style import make_figure, save_figure, tidy

from .scaling import Point


def plot(points: Sequence[Point], norm: Sequence[tuple[int, float, float]], path: Path) -> Path:
    """Draws the three panels into a PNG file and returns ``path``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = make_figure(14, 4.2)
    efficiency, hours, latency = figure.subplots(1, 3)
    gpus = [point.gpus for point in points]
    closed = [point.closed_form.compute / point.closed_form.total for point in points]
    simulated = [point.simulated.compute / point.simulated.total for point in points]
    efficiency.plot(gpus, closed, "--", label="update, closed form")
    efficiency.plot(gpus, simulated, "o-", label="update, simulated")
    efficiency.plot(gpus, [point.goodput for point in points], "s-", label="goodput")
    efficiency.set_ylim(0, 1)
    efficiency.set_title("share of time that computes", loc="left")
    hours.plot(gpus, [point.expected_hours for point in points], "--", label="closed form")
    hours.plot(gpus, [point.hours for point in points], "o-", label="simulated")
    hours.set_yscale("log")
    hours.set_title("hours to equal AP", loc="left")
    norm = [row for row in norm if row[0] > 1]  # one rank sends nothing
    ranks = [group for group, _, _ in norm]
    latency.plot(ranks, [1e3 * seconds for _, seconds, _ in norm], "o-", label="CGBN")
    latency.plot(ranks, [1e3 * seconds for _, _, seconds in norm], "--", label="compute")
    latency.set_yscale("log")
    latency.set_title("ms per micro-batch", loc="left")
    for axes, label in ((efficiency, "GPUs"), (hours, "GPUs"), (latency, "ranks of a BN group")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    return save_figure(figure, path)
