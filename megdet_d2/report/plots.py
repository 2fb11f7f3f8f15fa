"""Draws runs: curves, Figures 1 and 4, Table 1 over epochs, throughput, detections (Figure 5)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from megdet_d2._moved import renamed
from megdet_d2.data import register_datasets
from megdet_d2.engine.sample_ratio import PAPER, STAGES, read_samples
from megdet_d2.schedule.build import images_per_epoch

from .run import SKIP_COUNTERS, Run, existing, labels, read_config, read_metrics
from .style import make_figure, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__getattr__ = renamed(
    __name__,
    GUARDS="megdet_d2.report.run.SKIP_COUNTERS",
    overview="megdet_d2.report.tables.overview",
    table1="megdet_d2.report.tables.table1",
)

SCORE_THRESHOLD = 0.5
_EVALUATE = "evaluate: megdet train --eval-only --resume --config-file {run}/config.yaml"


def plot_curves(run: str | Path, path: Path) -> Path:
    """Draws learning rate, losses and box AP over iterations; returns ``path``.

    If the mini-batch has changed in a resume, the x axis is the number of images seen.

    Raises:
        FileNotFoundError, ValueError: see ``read_metrics``.
    """
    train_rows, eval_rows = read_metrics(run)
    changed = len({row.get("effective_batch_size") for row in train_rows}) > 1
    at = "images_seen" if changed else "iteration"
    losses = sorted({key for row in train_rows for key in row if key.startswith("loss_")})
    # With several test sets the keys begin with the set's name.
    aps = sorted(k for k in set().union(*eval_rows) if re.search(r"(^|/)bbox/AP(50)?$", k))
    figure = make_figure(10, 9)
    figure.suptitle(str(run))
    panels = figure.subplots(3, sharex=True, height_ratios=(1, 2, 2))
    contents = (
        ("learning rate", train_rows, ["lr"]),
        ("loss", train_rows, ["total_loss", *losses]),
        ("box AP (%)", eval_rows, aps),
    )
    for axes, (title, rows, keys) in zip(panels, contents, strict=True):
        for key in keys:
            of_key = [row for row in rows if key in row and at in row]
            x, y = ([row[column] for row in of_key] for column in (at, key))
            marker = "." if len(of_key) < 50 else None  # a single AP would not be visible
            axes.plot(x, y, marker=marker, label=key, linewidth=2.5 if "total" in key else 1.5)
        axes.set_title(title, loc="left")
        axes.set_ylim(bottom=0)
        tidy(axes)
        if rows and len(keys) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panels[-1].set_xlabel(at.replace("_", " "))
    return save_figure(figure, path)


def plot_accuracy(runs: Sequence[Run], path: Path) -> Path:
    """Draws box AP over epochs and over hours of training, one curve per run (Figures 1 and 4).

    Dashed lines mark the decays of the learning rate. If a config does not define epochs, the x
    axis is the iteration. Returns ``path``.
    """
    figure = make_figure(11, 4.5)
    over_epochs, over_hours = figure.subplots(1, 2, sharey=True)
    in_epochs = all(images_per_epoch(run.cfg) is not None for run in runs)
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        iterations, aps = run.evaluations()
        last = run.train_rows[-1]["iteration"] if run.train_rows else 0
        steps = np.array([step for step in run.cfg.SOLVER.STEPS if step <= last])
        at = run.epochs(iterations) if in_epochs else iterations
        decays = run.epochs(steps) if in_epochs else steps
        for axes, x, lines in (
            (over_epochs, at, decays),
            (over_hours, run.hours_at(iterations), run.hours_at(steps)),
        ):
            axes.plot(x, aps, marker=".", color=f"C{number}", label=label)
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
    return save_figure(figure, path)


def plot_samples(runs: Sequence[Run], path: Path) -> Path | None:
    """Draws Table 1's ratios of positives to negatives over epochs, with the paper's values.

    Returns ``path``, or None if no run has recorded the ratios.
    """
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
    return save_figure(figure, path)


def plot_health(runs: Sequence[Run], path: Path) -> Path:
    """Draws images per second and ``SKIP_COUNTERS`` over iterations; returns ``path``."""
    figure = make_figure(11, 3.5)
    throughput, skips = figure.subplots(1, 2)
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        throughput.plot(*run.throughput(), color=f"C{number}", label=label)
        for key, style in zip(SKIP_COUNTERS, ("-", ":"), strict=True):
            at, counts = run.series(key)
            if len(at):
                skips.plot(at, counts, style, color=f"C{number}", label=f"{label}, {key}")
    for axes, title in ((throughput, "images per second"), (skips, "skipped so far")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
        tidy(axes)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def draw_detections(run: str | Path, path: Path, num_images: int = 8) -> Path:
    """Draws the first test images, each with its ground truth and with its detections.

    Returns ``path``. Detections below ``SCORE_THRESHOLD`` are left out. If all are, as early in a
    training, the best are drawn: as many as there are objects in the images, or one per image.

    Raises:
        FileNotFoundError: the run has no config.yaml, or no results of an evaluation.
        ValueError: the config has no test set, the results are not json, or ``num_images`` is 0.
    """
    if num_images < 1:
        raise ValueError(f"--images is {num_images}; draw 1 or more")
    cfg = read_config(run)
    if not cfg.DATASETS.TEST:
        raise ValueError(f"DATASETS.TEST of {run}/config.yaml is empty: no detections to draw")
    register_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    folder = "inference" if len(cfg.DATASETS.TEST) == 1 else f"inference/{name}"
    results_file = existing(run, f"{folder}/coco_instances_results.json", _EVALUATE)
    try:
        results = json.loads(results_file.read_text())
    except ValueError as e:
        raise ValueError(f"{results_file} is not json ({e}); {_EVALUATE.format(run=run)}") from None
    images = DatasetCatalog.get(name)[:num_images]
    names = MetadataCatalog.get(name).thing_classes
    # Results have the category ids of the annotation json; Detectron2 counts classes from 0.
    to_class = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id", {})

    drawn_ids = {image["image_id"] for image in images}
    scores = sorted((r["score"] for r in results if r["image_id"] in drawn_ids), reverse=True)
    threshold = SCORE_THRESHOLD
    if scores and scores[0] < threshold:
        objects = sum(len(image.get("annotations", [])) for image in images)
        threshold = scores[: max(objects, len(images))][-1]

    columns = 2 * min(2, len(images))
    rows = -(-2 * len(images) // columns)
    aspect = max(image["height"] / image["width"] for image in images)
    figure = make_figure(3.5 * columns, (3.4 * aspect + 0.35) * rows)
    blank = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw=blank).flatten()
    for image, truth, detections in zip(images, panels[::2], panels[1::2], strict=False):
        pixels = read_image(image["file_name"], "RGB")
        truth.set_title(f"{Path(image['file_name']).name}, ground truth", fontsize=9)
        truth.imshow(pixels)
        for box in image.get("annotations", []):
            xywh = BoxMode.convert(box["bbox"], box["bbox_mode"], BoxMode.XYWH_ABS)
            draw_box(truth, xywh, box["category_id"], names[box["category_id"]])
        detections.set_title(f"detections, score >= {threshold:.3g}", fontsize=9)
        detections.imshow(pixels)
        for result in results:
            if result["image_id"] == image["image_id"] and result["score"] >= threshold:
                index = to_class.get(result["category_id"], result["category_id"])
                label = f"{names[index]}  {result['score']:.2f}"
                draw_box(detections, result["bbox"], index, label)
    return save_figure(figure, path)


def draw_box(axes: "Axes", xywh: Sequence[float], index: int, label: str) -> None:
    """Draws a box with its label above it, in the colour of a class.

    Args:
        xywh: left, top, width, height.
        index: the number of the class.
    """
    x, y, width, height = xywh
    colour = f"C{index % 10}"
    corners_x, corners_y = [x, x + width, x + width, x, x], [y, y, y + height, y + height, y]
    axes.plot(corners_x, corners_y, color=colour, scalex=False, scaley=False)
    # The label is above the box's left corner, or where the edges of the image do not cut it off.
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    near_right, near_top = x > 0.8 * right, y < 0.06 * bottom
    text = axes.text(
        min(x + width, right) if near_right else max(x, 0),
        max(y, 0),
        label,
        color="white",
        fontsize=8,
        ha="right" if near_right else "left",
        va="top" if near_top else "bottom",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
    )
    text.set_clip_on(True)
