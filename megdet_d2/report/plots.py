"""Several runs in one plot: Figures 1 and 4 of the paper, Table 1, and the health of a training."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megdet_d2.engine.sample_ratio import PAPER, STAGES, read_samples
from megdet_d2.schedule.build import images_per_epoch

from .run import Run
from .style import make_figure, tidy

# Counters that say how often a guard had to step in, where the run wrote them.
GUARDS = ("cgbn_skipped_batches", "skipped_images")


def labels(runs: Sequence[Run]) -> list[str]:
    """Names by which the runs can be told apart: their paths below what they have in common."""
    if len(runs) == 1:
        return [runs[0].name]
    paths = [os.path.abspath(run.path) for run in runs]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def plot_accuracy(runs: Sequence[Run], path: Path) -> Path:
    """Box AP over epochs and over hours of training, one curve a run (Figures 1 and 4).

    Dashed lines are where the learning rate decays. Where a config knows no epochs, iterations.
    """
    figure = make_figure(11, 4.5)
    over_epochs, over_hours = figure.subplots(1, 2, sharey=True)
    in_epochs = all(images_per_epoch(run.cfg) is not None for run in runs)
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        iterations, aps = run.evaluations()
        x = run.epochs(iterations) if in_epochs else iterations
        last = run.train_rows[-1]["iteration"] if run.train_rows else 0
        steps = np.array([step for step in run.cfg.SOLVER.STEPS if step <= last])
        decays = run.epochs(steps) if in_epochs else steps
        for axes, at, lines in (
            (over_epochs, x, decays),
            (over_hours, run.hours_at(iterations), run.hours_at(steps)),
        ):
            axes.plot(at, aps, marker=".", color=f"C{number}", label=label)
            for line in lines if len(aps) else ():
                axes.axvline(line, color=f"C{number}", linestyle="--", linewidth=0.8, alpha=0.6)
    over_epochs.set_xlabel("epoch" if in_epochs else "iteration")
    over_epochs.set_ylabel("box AP (%)")
    over_epochs.set_ylim(bottom=0)
    over_hours.set_xlabel("hours of training, without evaluations")
    for axes in (over_epochs, over_hours):
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6)
        tidy(axes)
    over_hours.legend(frameon=False)
    figure.savefig(path)
    return path


def plot_samples(runs: Sequence[Run], path: Path) -> Path | None:
    """Table 1's ratios by epoch, beside the paper's; None where no run recorded any."""
    recorded = [read_samples(run.path) for run in runs]
    if not any(recorded):
        return None
    figure = make_figure(11, 4.5)
    panels = figure.subplots(1, len(STAGES))
    for axes, stage, title in zip(panels, STAGES, ("anchors of the RPN", "proposals"), strict=True):
        for number, (lines, label) in enumerate(zip(recorded, labels(runs), strict=True)):
            epochs = [line["epoch"] for line in lines]
            for column, style, kind in (
                ("ratio", "-", "of sums"),
                ("mean_ratio", ":", "mean over images"),
            ):
                values = [line[f"{stage}_{column}"] for line in lines]
                axes.plot(
                    epochs, values, style, marker=".", color=f"C{number}", label=f"{label}, {kind}"
                )
        for batch, marker in ((16, "v"), (256, "^")):
            values = [by_batch[batch] for by_batch in PAPER.values()]
            axes.plot(list(PAPER), values, marker, color="0.5", label=f"the paper, batch {batch}")
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylabel("positives / negatives (%)")
        axes.set_ylim(bottom=0)
        tidy(axes)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def plot_health(runs: Sequence[Run], path: Path) -> Path:
    """Throughput, and how often guards had to step in, over the iterations."""
    figure = make_figure(11, 3.5)
    throughput, guards = figure.subplots(1, 2)
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        throughput.plot(*run.throughput(), color=f"C{number}", label=label)
        for key, style in zip(GUARDS, ("-", ":"), strict=True):
            at, counts = run.series(key)
            if len(at):
                guards.plot(at, counts, style, color=f"C{number}", label=f"{label}, {key}")
    for axes, title in ((throughput, "images a second"), (guards, "guards: times stepped in")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
        tidy(axes)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def overview(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row a run: what it was and what it came to; "" where that is not known."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        aps = {name: run.evaluations(name)[1] for name in ("AP", "AP50", "AP75")}
        _, bn_size = run.series("bn_size")
        rate = run.images_per_second()
        guards = {key: run.series(key)[1] for key in GUARDS}
        rows.append(
            {
                "run": label,
                "batch": str(run.cfg.SOLVER.IMS_PER_BATCH),
                "BN size": f"{bn_size[-1]:g}" if len(bn_size) else "",
                "LR": f"{run.cfg.SOLVER.BASE_LR:.6g}",
                **{
                    name: f"{values[-1]:.1f}" if len(values) else "" for name, values in aps.items()
                },
                "hours": f"{run.hours():.2f}" if rate else "",
                "images/s": f"{rate:.1f}" if rate else "",
                **{k.replace("_", " "): f"{v[-1]:g}" for k, v in guards.items() if len(v)},
            }
        )
    return rows


def table1(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The epochs of the paper's Table 1, a row each and run, those that were recorded."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        for line in read_samples(run.path):
            if int(line["epoch"]) in PAPER:
                paper = PAPER[int(line["epoch"])]
                rows.append(
                    {"epoch": f"{line['epoch']:g}", "run": label}
                    | {"batch": str(run.cfg.SOLVER.IMS_PER_BATCH)}
                    | {
                        f"{stage.upper().replace('RCNN', 'R-CNN')}, {kind}": f"{line[column]:.2f}"
                        for stage in STAGES
                        for column, kind in (
                            (f"{stage}_ratio", "of sums"),
                            (f"{stage}_mean_ratio", "mean"),
                        )
                    }
                    | {"paper, 16": f"{paper[16]:.2f}", "paper, 256": f"{paper[256]:.2f}"}
                )
    return rows
