"""Fixtures of the tests of megdet report."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from megdet_d2 import add_megdet_config
from megdet_d2.data import register_datasets
from tests.helpers.runs import EVAL_ROW, TRAIN_ROW, write_results


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes an OUTPUT_DIR as of a training, with four test images and every object detected."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    (tmp_path / "datasets" / "megdet_digits").mkdir(parents=True)
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    (run / "metrics.json").write_text(
        TRAIN_ROW % (19, 2.0) + EVAL_ROW % (10.0, 9) + TRAIN_ROW % (39, 1.0) + EVAL_ROW % (20.5, 40)
    )
    (run / "log.txt").write_text("Total training time: 1 day, 2:03:04 (0:00:09 on hooks)\n")
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("megdet_digits_train",), ("megdet_digits_val",)
    cfg.DATASETS.DIGITS.IMAGE_SIZE = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.DATASETS.DIGITS.NUM_VAL = 4
    (run / "config.yaml").write_text(cfg.dump())

    register_datasets(cfg)
    results = [
        # Results have the category ids of the annotation json, which count from 1.
        {
            "image_id": image["image_id"],
            "category_id": annotation["category_id"] + 1,
            "bbox": annotation["bbox"],
            "score": 0.9,
        }
        for image in DatasetCatalog.get("megdet_digits_val")
        for annotation in image["annotations"]
    ]
    write_results(run, results)
    yield run
    for name in ("megdet_digits_train", "megdet_digits_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
