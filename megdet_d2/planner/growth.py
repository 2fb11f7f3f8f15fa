"""The growth of one setting: fewer and more GPUs, and a plot of hours and efficiency against them.

The mini-batch either stays, so that fewer GPUs take more micro-batches, or it grows with the GPUs.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megdet_d2.report.style import make_figure, save_figure, tidy

from .resolved import resolve
from .search import Search, Setting

MACHINES = 16
"""Machines to draw at least."""
Points = list[tuple[int, Setting]]
"""GPUs and setting."""


def grow(search: Search, setting: Setting) -> tuple[Points, Points]:
    """Returns the points where the mini-batch stays, and where it grows with the GPUs.

    Numbers of GPUs that cannot share the mini-batch, or whose schedule makes no sense, are left
    out.

    Args:
        search: for the cluster of ``setting``.
        setting: its images per GPU, stages and, where it stays, mini-batch are kept.
    """
    stays: Points = []
    grows: Points = []
    b, batch = setting.images_per_gpu, setting.resolved.batch
    for machines, gpus in clusters(search.question.gpus, search.question.machines):
        ranks = machines * gpus
        question = replace(search.question, machines=machines, gpus=gpus)
        other = search.for_question(question)
        k = batch // (b * ranks)
        plans = [(stays, batch, k)] if k * b * ranks == batch else []
        plans.append((grows, b * setting.micro_batches * ranks, setting.micro_batches))
        for points, size, steps in plans:
            try:
                resolved = resolve(question, size)
                made = other.make(resolved, b, steps, setting.sublinear, setting.memory)
                points.append((ranks, made))
            except ValueError:
                continue
    return stays, grows


def clusters(gpus: int, machines: int) -> Iterator[tuple[int, int]]:
    """Yields machines and GPUs of each: parts of one machine, then powers of two of whole ones."""
    yield from ((1, part) for part in range(1, gpus) if gpus % part == 0)
    number = 1
    while number <= max(MACHINES, machines):
        yield number, gpus
        number *= 2


def draw(search: Search, setting: Setting, folder: Path) -> Path:
    """Draws both into ``plan.png`` of ``folder``, which is made; returns its path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = make_figure(10, 4.2)
    hours, efficiency = figure.subplots(1, 2)
    stays, grows = grow(search, setting)
    batch = setting.resolved.batch
    for points, label in ((stays, f"mini-batch {batch:,}"), (grows, "grows with the GPUs")):
        if not points:
            continue
        gpus = [ranks for ranks, _ in points]
        line = hours.plot(gpus, [s.hours_to_equal_ap for _, s in points], "o-", label=label)
        color = line[0].get_color()
        hours.plot(gpus, [s.hours for _, s in points], "--", color=color, alpha=0.6)
        efficiency.plot(gpus, [s.efficiency for _, s in points], "o-", label=label)
    hours.set_yscale("log")
    hours.set_title("hours to equal AP (dashed: of the schedule)", loc="left")
    efficiency.set_ylim(0, 1.05)
    efficiency.set_title("images/s of a GPU, against one alone", loc="left")
    for axes in (hours, efficiency):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs")
        axes.axvline(search.question.ranks, color="k", linewidth=0.6, alpha=0.4)
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    folder.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, folder / "plan.png")
