"""Curves and detections of a finished training, from what it left in its OUTPUT_DIR.

python -m megdet_d2.analysis.report output/demo
"""

import argparse
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from megdet_d2.config import add_megdet_config
from megdet_d2.data import register_datasets

logger = logging.getLogger(__name__)

SCORE_THRESHOLD = 0.5
DPI = 100


def read_metrics(run: str | Path) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation rows of a run's metrics.json, each by rising iteration.

    A resumed or restarted training appends to the file: its rows replace the earlier ones from where
    it starts.

    Raises:
        FileNotFoundError: no metrics.json. ValueError: no row in it yet.
    """
    path = _existing(Path(run) / "metrics.json", "train first, with OUTPUT_DIR {run}")
    train_rows: list[dict] = []
    eval_rows: list[dict] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)  # NaN is no JSON, but Python reads what Python wrote
        except ValueError:  # a training that was killed while it wrote
            logger.warning(f"{path}: line {number} is not json, left out")
            continue
        # One line holds both where an evaluation falls on an iteration that is written.
        for rows, is_one in (
            (train_rows, "total_loss" in row),
            (eval_rows, any(key.endswith("bbox/AP") for key in row)),
        ):
            if is_one:
                while rows and rows[-1]["iteration"] >= row["iteration"]:
                    rows.pop()
                rows.append(row)
    if not train_rows and not eval_rows:
        raise ValueError(
            f"{path} has neither a loss nor an AP yet; train for at least 20 iterations, or wait "
            "for the first that are written"
        )
    return train_rows, eval_rows


def plot_curves(run: str | Path) -> Path:
    """Draws learning rate, losses and box AP over the iterations into RUN/curves.png."""
    train_rows, eval_rows = read_metrics(run)
    fig = _figure(10, 9)
    lr, loss, ap = fig.subplots(3, sharex=True, height_ratios=(1, 2, 2))
    _plot_keys(lr, train_rows, ["lr"])
    components = sorted({key for row in train_rows for key in row if key.startswith("loss_")})
    _plot_keys(loss, train_rows, ["total_loss", *components])
    keys = sorted({key for row in eval_rows for key in row if key.endswith(("/AP", "/AP50"))})
    _plot_keys(ap, eval_rows, [key for key in keys if "bbox/" in key], marker=".")
    for axes, title in ((lr, "learning rate"), (loss, "loss"), (ap, "box AP (%)")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not lr and axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ap.set_xlabel("iteration")
    fig.suptitle(str(run))
    return _save(fig, Path(run) / "curves.png")


def draw_detections(run: str | Path, num_images: int = 8) -> Path:
    """Draws ground truth beside detections for the first test images into RUN/detections.png.

    Raises:
        FileNotFoundError: no config.yaml or no results of an evaluation. ValueError: no images.
    """
    if num_images < 1:
        raise ValueError(f"--images is {num_images}; draw at least 1")
    run = Path(run)
    path = run / "inference" / "coco_instances_results.json"
    _existing(path, "evaluate: train_net.py --eval-only --config-file {run}/config.yaml")
    results = json.loads(path.read_text())
    cfg = _load_config(run)
    register_datasets(cfg)
    name = cfg.DATASETS.TEST[-1]  # with several, each evaluation overwrites the one before
    images = DatasetCatalog.get(name)[:num_images]
    metadata = MetadataCatalog.get(name)
    # The results hold the category ids of the annotation json, Detectron2 counts from 0.
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id", None)

    def of_image(image: dict) -> list[tuple[list[float], str]]:
        return [
            (
                result["bbox"],
                f"{_class(metadata, contiguous, result['category_id'])} {result['score']:.2f}",
            )
            for result in results
            if result["image_id"] == image["image_id"] and result["score"] >= SCORE_THRESHOLD
        ]

    pairs_per_row = min(2, len(images))
    rows = -(-len(images) // pairs_per_row)
    fig = _figure(7 * pairs_per_row, 3.6 * rows)
    panels = fig.subplots(rows, 2 * pairs_per_row, squeeze=False).flatten()
    return _save(fig, run / "detections.png")
