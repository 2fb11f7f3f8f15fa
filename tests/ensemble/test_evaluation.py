"""Tests the AP of results against Detectron2's, and their table."""

import json
import math

import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from megdet_d2.data import register_datasets
from megdet_d2.ensemble.evaluation import METRICS, evaluate, read_annotations, to_table
from tests.helpers import training
from tests.helpers.detections import read_table, result


def test_ap_is_detectron2s(coco, noisy):
    register_datasets(training.config("unused", coco, "DATASETS.TEST", ("mixed",)))
    truth = read_annotations(coco[0][1])
    results = json.loads(noisy[0].read_text())
    evaluator = COCOEvaluator("mixed", tasks=("bbox",), distributed=False)
    evaluator._metadata.thing_dataset_id_to_contiguous_id = {1: 0}
    evaluator.reset()
    for image in truth.dataset["images"]:
        rows = [r for r in results if r["image_id"] == image["id"]]
        x, y, w, h = torch.tensor([r["bbox"] for r in rows]).T
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], 1))
        found.scores = torch.tensor([r["score"] for r in rows])
        found.pred_classes = torch.zeros(len(rows), dtype=torch.long)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    expected = evaluator.evaluate()["bbox"]
    ours = evaluate(truth, results)
    assert 5 < ours["AP"] < 95 and math.isnan(ours["APl"])
    assert list(ours) == list(METRICS)
    assert ours == pytest.approx({m: expected[m] for m in METRICS}, abs=1e-6, nan_ok=True)
    # It does not change its input; without detections the AP is 0.
    assert results == json.loads(noisy[0].read_text())
    assert evaluate(truth, [])["AP"] == 0
    perfect = [result(a["bbox"], 1, a["image_id"], 1) for a in truth.dataset["annotations"]]
    assert evaluate(truth, perfect)["AP"] == pytest.approx(100)


def test_the_mean_is_the_models():
    metrics = [dict.fromkeys(METRICS, value) for value in (10.0, 20.0, 90.0)]
    metrics[0]["APl"] = math.nan
    rows = [("a", "1", metrics[0]), ("b", "2", metrics[1]), ("ensemble", "", metrics[2])]
    table = read_table(to_table(rows))
    assert list(table) == ["a", "b", "mean", "ensemble"]
    assert table["mean"] == ["", *["15.0"] * 5, "-"]
    assert table["a"] == ["1", *["10.0"] * 5, "-"]
    assert table["ensemble"] == ["", *["90.0"] * 6]
