"""Tests PQ and mIoU of panoptic sets by predictions whose values are known."""

import logging
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, inference_context
from detectron2.utils import comm

from megdet_d2.engine import Trainer
from megdet_d2.engine.panoptic import id_to_rgb, pq_library
from tests.helpers import training
from tests.helpers.panoptic_data import (
    BOXES,
    HEIGHT,
    WIDTH,
    predict,
    register_panoptic,
    unregister_panoptic,
    write_panoptic,
)

needs_pq = pytest.mark.skipif(not pq_library(), reason="needs hotcoco or panopticapi")
NAME = "streets"
ROAD_AREA = HEIGHT * WIDTH - sum(w * h for _, _, w, h in BOXES)


@pytest.fixture
def streets(tmp_path):
    arguments = write_panoptic(tmp_path / NAME)
    yield register_panoptic(NAME, arguments), arguments
    unregister_panoptic(NAME)


def evaluate(rank, output, arguments, width_of_car, keys):
    """Evaluates predictions; each process has every second image."""
    name = register_panoptic(NAME, arguments)
    cfg = training.config(output, [], "DATASETS.TEST", (name,))
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator.reset()
    for entry in DatasetCatalog.get(name)[rank :: comm.get_world_size()]:
        given = predict(width_of_car)
        evaluator.process([entry], [{key: given[key] for key in keys}])
    return evaluator.evaluate()


ALL = ("panoptic_seg", "sem_seg", "instances")


@needs_pq
def test_perfect_predictions_have_100_percent(streets, tmp_path):
    results = evaluate(0, tmp_path / "out", streets[1], 16, ALL)
    assert results["panoptic_seg"]["PQ"] == results["panoptic_seg"]["PQ_st"] == 100
    assert results["sem_seg"]["mIoU"] == 100
    assert results["bbox"]["AP"] == pytest.approx(100)


@needs_pq
def test_pq_and_miou_are_those_of_the_paper(streets, tmp_path, pool2):
    """Kirillov et al.: the sum of the IoUs above 0.5, over TP + FP / 2 + FN / 2, per class."""
    cut = 4 * BOXES[0][3]  # pixels of the car that are predicted as road
    car, road = 0.75, ROAD_AREA / (ROAD_AREA + cut)
    things = 1 - cut / sum(w * h for _, _, w, h in BOXES)
    for results in (
        evaluate(0, tmp_path / "one", streets[1], 12, ALL),
        pool2.run(evaluate, tmp_path / "two", streets[1], 12, ALL)[0],
    ):
        assert results["panoptic_seg"]["PQ_th"] == pytest.approx(100 * (car + 1) / 2)
        assert results["panoptic_seg"]["PQ_st"] == pytest.approx(100 * road)
        assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * (car + 1 + road) / 3)
        assert results["panoptic_seg"]["RQ"] == 100
        assert results["sem_seg"]["mIoU"] == pytest.approx(100 * (things + road) / 2)
    # An IoU of 0.5 is no match: a false positive and a false negative.
    results = evaluate(0, tmp_path / "half", streets[1], 8, ALL)
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(50)


@needs_pq
@pytest.mark.parametrize(
    "keys, left_out",
    [
        (("instances",), ("panoptic_seg", "sem_seg")),  # Mask R-CNN
        (("instances", "sem_seg"), ("panoptic_seg",)),  # PANOPTIC_FPN.COMBINE.ENABLED False
    ],
)
def test_a_model_without_some_outputs_is_evaluated_on_the_others(
    streets, tmp_path, keys, left_out, caplog
):
    with caplog.at_level(logging.WARNING):
        results = evaluate(0, tmp_path / "out", streets[1], 16, keys)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert not set(results) & set(left_out)
    for key in left_out:
        assert f"No output of the model has '{key}'" in caplog.text


def test_without_a_library_pq_is_left_out_by_name(streets, tmp_path, monkeypatch, caplog):
    for module in ("hotcoco", "panopticapi"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        results = evaluate(0, tmp_path / "out", streets[1], 16, ALL)
    assert "PQ is not reported" in caplog.text and "pip install hotcoco" in caplog.text
    assert results["sem_seg"]["mIoU"] == 100 and "panoptic_seg" not in results


def test_a_semantic_set_has_miou(streets, tmp_path):
    cfg = training.config(tmp_path / "out", [], "DATASETS.TEST", (f"{NAME}_stuffonly",))
    evaluator = Trainer.build_evaluator(cfg, f"{NAME}_stuffonly")
    evaluator.reset()
    for entry in DatasetCatalog.get(f"{NAME}_stuffonly"):
        evaluator.process([entry], [predict()])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100


def test_a_coco_set_has_detectron2s_evaluator(tmp_path):
    from detectron2.data.datasets import register_coco_instances

    ((_, path, root),) = training.write_images(tmp_path, images=2)
    register_coco_instances("boxes", {}, path, root)
    try:
        cfg = training.config(tmp_path / "out", [], "DATASETS.TEST", ("boxes",))
        assert type(Trainer.build_evaluator(cfg, "boxes")) is COCOEvaluator
    finally:
        DatasetCatalog.pop("boxes")


def test_ids_are_written_as_cocos_pixels():
    ids = np.array([[0, 255, 256, 65536 * 3 + 256 * 2 + 1]])
    assert id_to_rgb(ids).tolist() == [[[0, 0, 0], [255, 0, 0], [0, 1, 0], [1, 2, 3]]]


@needs_pq
def test_a_trained_panoptic_fpn_is_evaluated(streets, tmp_path):
    name, _ = streets
    cfg = training.config(tmp_path / "out", [])
    cfg.merge_from_list([
        "MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True,
        "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2,
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3", "p4", "p5"], "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8,
        "MODEL.SEM_SEG_HEAD.NORM", "CGBN", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "DATASETS.TEST", (name,),
    ])  # fmt: skip
    model = Trainer.build_model(cfg).eval()
    with inference_context(model):
        results = Trainer.test(cfg, model)
    assert {"PQ", "SQ", "RQ"} <= set(results["panoptic_seg"])
    assert np.isfinite(results["sem_seg"]["mIoU"]) and "bbox" in results
