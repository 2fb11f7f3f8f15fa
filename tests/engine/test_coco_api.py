"""Compares TEST.COCO_API "hotcoco" with pycocotools, through Detectron2's evaluator."""

import contextlib
import copy
import io
import json
import logging
import math
import re

import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

from megdet_d2 import add_megdet_config
from megdet_d2.engine.check_config import check_keys
from megdet_d2.engine.coco_api import HotcocoEvaluator
from megdet_d2.engine.evaluation import build_evaluator
from tests.helpers.random_coco import random_coco


@pytest.fixture
def evaluate(tmp_path, caplog):
    """Returns a function: results of both libraries, with all that is printed and logged."""

    def run(content, results, task, sigmas=()):
        (tmp_path / "set.json").write_text(json.dumps(content))
        MetadataCatalog.pop("random", None)
        ids = sorted(category["id"] for category in content["categories"])
        MetadataCatalog.get("random").set(
            json_file=str(tmp_path / "set.json"), evaluator_type="coco",
            thing_classes=[f"class {i}" for i in ids],
            thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(ids)},
        )  # fmt: skip
        cfg = get_cfg()
        add_megdet_config(cfg)
        cfg.TEST.KEYPOINT_OKS_SIGMAS = list(sigmas)
        found = []
        for api in ("pycocotools", "hotcoco"):
            cfg.TEST.COCO_API = api
            evaluator = build_evaluator(cfg, "random", str(tmp_path / "out"))
            evaluator._tasks = (task,)
            evaluator.reset()
            rows = copy.deepcopy(results)
            for row in rows:
                row["category_id"] = ids.index(row["category_id"])
            evaluator._predictions = [{"image_id": 1, "instances": rows}]
            caplog.clear()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), caplog.at_level(logging.INFO):
                got = evaluator.evaluate()
            tables = [m for m in caplog.messages if "|" in m]
            numbers = re.findall(r"= *(-?\d\.\d{3})", printed.getvalue())
            found.append((got, tables, numbers, type(evaluator), caplog.text))
        MetadataCatalog.pop("random")
        return found

    return run


def assert_equal(stock, ours):
    (expected, tables, numbers, *_), (got, our_tables, our_numbers, kind, _) = stock, ours
    assert kind is HotcocoEvaluator
    assert tables == our_tables and numbers == our_numbers
    assert expected.keys() == got.keys()
    for task in expected:
        assert expected[task].keys() == got[task].keys()
        for name, value in expected[task].items():
            same = math.isnan(value) and math.isnan(got[task][name])
            assert same or abs(value - got[task][name]) < 1e-9, (task, name)


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", range(12))
def test_every_number_is_that_of_pycocotools(evaluate, task, seed):
    content, results = random_coco(seed, task)
    if task == "keypoints" and not content["annotations"]:
        pytest.skip("Detectron2 refuses a set without keypoints")
    stock, ours = evaluate(content, results, task)
    assert_equal(stock, ours)
    assert stock[2] or not results  # the numbers that are printed were found


@pytest.mark.slow
@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_every_number_of_many_sets_is_that_of_pycocotools(evaluate, task):
    for seed in range(100, 220):
        content, results = random_coco(seed, task)
        if content["annotations"] or task != "keypoints":
            assert_equal(*evaluate(content, results, task))


def test_sigmas_of_keypoints_are_used(evaluate):
    content, results = random_coco(3, "keypoints")
    default, given = (evaluate(content, results, "keypoints", s) for s in ((), (0.3,) * 17))
    assert_equal(*given)
    assert given[1][0]["keypoints"]["AP"] != default[1][0]["keypoints"]["AP"]


@pytest.mark.parametrize("change", [
    lambda content, results: results.clear(),
    lambda content, results: content["annotations"].clear(),
    lambda content, results: content.pop("info"),
    lambda content, results: [row.update(iscrowd=1) for row in content["annotations"]],
    lambda content, results: [row.update(score=0.5) for row in results],
    lambda content, results: [row.update(bbox=[5.0, 5.0, 0.0, 0.0]) for row in results[::2]],
    lambda content, results: [row.update(id=10**12 + i)
                              for i, row in enumerate(content["annotations"])],
], ids=["nothing found", "no objects", "no info", "only crowds", "ties", "no area",
        "large ids"])  # fmt: skip
def test_nasty_sets(evaluate, change):
    content, results = random_coco(7, "bbox")
    change(content, results)
    assert_equal(*evaluate(content, results, "bbox"))


def test_an_annotation_id_of_zero_is_left_to_pycocotools(evaluate):
    content, results = random_coco(5, "bbox", first_id=0)
    stock, ours = evaluate(content, results, "bbox")
    assert_equal(stock, ours)
    renumbered = copy.deepcopy(content)
    for row in renumbered["annotations"]:
        row["id"] += 1
    assert evaluate(renumbered, results, "bbox")[1][0] != ours[0]  # so it does matter


def test_it_says_why_pycocotools_is_used(evaluate, caplog, tmp_path):
    content, results = random_coco(5, "bbox", first_id=0)
    with caplog.at_level(logging.WARNING):
        evaluate(content, results, "bbox")
        MetadataCatalog.get("zero").set(json_file=str(tmp_path / "set.json"))
        caplog.clear()
        HotcocoEvaluator("zero", output_dir=str(tmp_path))
    MetadataCatalog.pop("zero")
    assert "DATASETS.TEST 'zero' has the annotation id 0" in caplog.text


@pytest.mark.parametrize("value, said", [
    ("fast", "TEST.COCO_API is 'fast'; use one of pycocotools, hotcoco"),
    ("hotcoco", r"not installed; run  pip install hotcoco,  or .* 'pycocotools'"),
])  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused(tmp_path, monkeypatch, value, said):
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.merge_from_list(["TEST.COCO_API", value, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", ""])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=said):
        check_keys(cfg)
