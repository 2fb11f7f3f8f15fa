"""Tests that what would fail after a training is refused before it: keypoints, LVIS, libraries."""

import importlib.util
import json
import logging
import sys

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators

from megdet_d2.engine import Trainer, evaluate, prepare_config
from megdet_d2.engine.ap_limits import find_crowded_images
from megdet_d2.engine.check_evaluation import inspect_evaluation
from tests.helpers import training
from tests.helpers.panoptic_data import register_panoptic, unregister_panoptic, write_panoptic

KEYPOINTS = 4
SIGMAS = [0.05, 0.1, 0.1, 0.05]


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes and registers images; ``change`` gets the json first."""
    names = []

    def make(name, change=lambda content: None, **metadata):
        folder = tmp_path / name
        folder.mkdir()
        ((_, path, root),) = training.write_images(folder, images=4)
        with open(path) as file:
            content = json.load(file)
        change(content)
        with open(path, "w") as file:
            json.dump(content, file)
        kind = metadata.pop("evaluator_type", None)
        register_coco_instances(name, metadata, path, root)
        names.append(name)
        if kind:
            MetadataCatalog.get(name).__dict__["evaluator_type"] = kind
        return path

    yield make
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


def add_keypoints(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = [(x + 1, y + 1), (x + w - 2, y + 1), (x + 1, y + h - 2), (x + w - 2, y + h - 2)]
        annotation["keypoints"] = [value for point in points for value in (*point, 2)]
        annotation["num_keypoints"] = KEYPOINTS


@pytest.fixture
def faces(write):
    metadata = {"keypoint_names": list("abcd"), "keypoint_flip_map": []}
    for name in ("faces_train", "faces_val"):
        write(name, add_keypoints, **metadata)


def keypoint_config(tmp_path, sigmas=SIGMAS, keypoints=KEYPOINTS, *overrides):
    cfg = training.config(tmp_path / "out", [])
    cfg.merge_from_list([
        "DATASETS.TRAIN", ("faces_train",), "DATASETS.TEST", ("faces_val",),
        "MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", keypoints,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,), "TEST.KEYPOINT_OKS_SIGMAS", list(sigmas),
        "INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 2,
        *overrides,
    ])  # fmt: skip
    return cfg


def test_own_keypoints_are_evaluated_by_their_sigmas(faces, tmp_path):
    cfg = keypoint_config(tmp_path)
    prepare_config(cfg)
    trainer = Trainer(cfg)
    training.settle(trainer.model)
    trainer.resume_or_load(resume=False)
    trainer.train()
    rows = training.read_rows(tmp_path / "out")
    assert "keypoints/AP" in rows[-1]
    # The sigmas change the AP of one pixel beside the truth, so they have reached pycocotools.
    aps = [_ap_beside(keypoint_config(tmp_path, [sigma] * KEYPOINTS)) for sigma in (0.5, 0.001)]
    assert aps == [pytest.approx(100), 0]


def _ap_beside(cfg):
    """Returns the AP of keypoints three pixels beside the truth."""
    import torch
    from detectron2.structures import Boxes, Instances

    evaluator = Trainer.build_evaluator(cfg, "faces_val")
    evaluator.reset()
    for entry in DatasetCatalog.get("faces_val"):
        found = Instances((entry["height"], entry["width"]))
        boxes = torch.tensor([a["bbox"] for a in entry["annotations"]], dtype=torch.float32)
        found.pred_boxes = Boxes(boxes + torch.nn.functional.pad(boxes[:, :2], (2, 0)))
        found.scores = torch.ones(len(boxes))
        found.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
        points = torch.tensor([a["keypoints"] for a in entry["annotations"]])
        found.pred_keypoints = points.reshape(-1, KEYPOINTS, 3).float() + torch.tensor([3, 0, 0])
        evaluator.process([entry], [{"instances": found}])
    return evaluator.evaluate()["keypoints"]["AP"]


@pytest.mark.parametrize(
    "sigmas, keypoints, message",
    [
        ([], 4, "has 0 values, which stands for COCO's 17: MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"),
        (SIGMAS[:3], 4, "has 3 values: .* is 4; give 4 sigmas"),
        (SIGMAS, 5, "has 4 values: .* is 5; give 5 sigmas"),
        ([0.1] * 5, 5, "8 of 8 annotations have another number of keypoints .*id 1 .*4"),
        ([0.1, 0.1, 0, 0.1], 4, "a sigma is not above 0"),
    ],
)
def test_sigmas_that_do_not_fit_the_keypoints_are_refused(
    faces, tmp_path, sigmas, keypoints, message
):
    cfg = keypoint_config(tmp_path, sigmas, keypoints)
    prepare_config(cfg)
    for refuse in (lambda: Trainer(cfg), lambda: evaluate(cfg)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_cocos_seventeen_keypoints_need_no_sigmas(write, tmp_path):
    def seventeen(content):
        for annotation in content["annotations"]:
            annotation |= {"keypoints": [5, 9, 2] * 17, "num_keypoints": 17}

    write("faces_val", seventeen)
    assert inspect_evaluation(keypoint_config(tmp_path, [], 17)) == []


def test_annotations_without_keypoints_are_named_by_their_ids(write, tmp_path):
    def spoil(content):
        add_keypoints(content)
        for annotation in content["annotations"][2:5]:
            del annotation["keypoints"]

    write("faces_val", spoil)
    (finding,) = inspect_evaluation(keypoint_config(tmp_path))
    assert (finding.ids, finding.num_rows) == ((3, 4, 5), 8)
    assert "have no 'keypoints'" in str(finding) and "faces_val" in str(finding)


def test_keypoints_that_are_no_list_are_named(write, tmp_path):
    def spoil(content):
        add_keypoints(content)
        content["annotations"][6]["keypoints"] = None

    write("faces_val", spoil)
    (finding,) = inspect_evaluation(keypoint_config(tmp_path))
    assert (finding.ids, finding.values) == ((7,), ("0",))


@pytest.mark.parametrize(
    "overrides, change",
    [
        (("MODEL.KEYPOINT_ON", False), add_keypoints),
        # It finds no keypoints.
        (("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 1), add_keypoints),
        (("DATASETS.TEST", ()), add_keypoints),
        ((), lambda content: content.pop("annotations")),  # challenge test-dev
    ],
)
def test_keypoints_that_are_not_evaluated_need_no_sigmas(write, tmp_path, overrides, change):
    write("faces_val", change)
    assert inspect_evaluation(keypoint_config(tmp_path, [], 4, *overrides)) == []


def test_an_own_evaluator_is_not_checked(faces, tmp_path):
    class Own(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_dir=None):
            return DatasetEvaluators([])

    cfg = keypoint_config(tmp_path, [])
    prepare_config(cfg)
    Own(cfg)


# --- classes -------------------------------------------------------------------------------------


def three_classes(*names):
    def change(content):
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]

    return change


@pytest.mark.parametrize(
    "names, level",
    [
        (("cat", "dog", "owl"), None),
        (("dog", "cat", "owl"), "error"),  # the AP of one class would be that of another
        (("cat", "dog"), "error"),
        (("cat", "dog", "owl", "pig"), "error"),
        (("Cat", "dog", "owl"), "warning"),  # the AP can be right
    ],
)
def test_a_test_set_of_other_classes_is_named_before_the_training(write, tmp_path, names, level):
    write("animals_train", three_classes("cat", "dog", "owl"))
    write("animals_val", three_classes(*names))
    cfg = training.config(tmp_path / "out", [])
    cfg.merge_from_list([
        "DATASETS.TRAIN", ("animals_train",), "DATASETS.TEST", ("animals_val",),
        "MODEL.ROI_HEADS.NUM_CLASSES", 3, "SOLVER.IMS_PER_BATCH", 2,
    ])  # fmt: skip
    prepare_config(cfg)
    if level == "error":
        with pytest.raises(ValueError, match="animals_val"):
            Trainer(cfg)
        return
    Trainer(cfg)
    assert [f.level for f in inspect_evaluation(cfg)] == [level] * bool(level)


def test_a_checkpoint_of_another_number_of_classes_is_not_evaluated(write, tmp_path):
    write("animals_val", three_classes("cat", "dog", "owl"))
    cfg = training.config(tmp_path / "out", [], "DATASETS.TEST", ("animals_val",))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    prepare_config(cfg, eval_only=True)
    with pytest.raises(ValueError, match="NUM_CLASSES is 2, but 'animals_val' has 3 categories"):
        evaluate(cfg)


@pytest.mark.parametrize("weights", [True, False])
def test_random_weights_are_named_where_they_are_evaluated(write, tmp_path, weights, caplog):
    write("animals_val", three_classes("cat", "dog", "owl"))
    keys = ("DATASETS.TRAIN", (), "DATASETS.TEST", ("animals_val",))
    cfg = training.config(tmp_path / "out", [], *keys, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    if weights:
        model = Trainer.build_model(cfg)
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    prepare_config(cfg, eval_only=True)
    caplog.clear()
    evaluate(cfg)
    assert ("MODEL.WEIGHTS is '', so random weights are evaluated" in caplog.text) == (not weights)


# --- LVIS ----------------------------------------------------------------------------------------


def lvis_keys(content):
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["categories"][0]["frequency"] = "c"


@pytest.mark.parametrize(
    "rows, key, ids", [
        ("images", "neg_category_ids", (2, 4)),
        ("images", "not_exhaustive_category_ids", (2, 4)),
        ("categories", "frequency", (1,)),
    ],
)  # fmt: skip
def test_lvis_without_its_keys_is_refused_with_all_ids(write, tmp_path, rows, key, ids):
    def spoil(content):
        lvis_keys(content)
        for row in content[rows]:
            if row["id"] in ids:
                del row[key]

    write("mine_lvis", spoil, evaluator_type="lvis")
    cfg = training.config(tmp_path, [], "DATASETS.TEST", ("mine_lvis",))
    found = [f for f in inspect_evaluation(cfg) if f.rows]
    assert [(f.rows, f.ids, f.level) for f in found] == [(rows, ids, "error")]
    assert key in str(found[0]) and "evaluator_type 'coco'" in str(found[0])


def test_lvis_with_its_keys_needs_its_package_alone(write, tmp_path):
    write("mine_lvis", lvis_keys, evaluator_type="lvis")
    cfg = training.config(tmp_path, [], "DATASETS.TEST", ("mine_lvis",))
    found = inspect_evaluation(cfg)
    if importlib.util.find_spec("lvis"):
        assert found == []
    else:
        assert [f.fix for f in found] == ["pip install lvis"]


# --- others --------------------------------------------------------------------------------------


def test_a_panoptic_set_without_files_or_library_is_named(tmp_path, monkeypatch):
    metadata, images, segments, panoptic, labels, boxes = write_panoptic(tmp_path / "streets")
    name = register_panoptic(
        "streets", (metadata, images, segments, str(tmp_path / "none.json"), labels, boxes)
    )
    try:
        cfg = training.config(tmp_path, [], "DATASETS.TEST", (name,))
        found = [f for f in inspect_evaluation(cfg) if f.kind == "missing-file"]
        assert len(found) == 1 and "none.json" in str(found[0]) and "panoptic_json" in str(found[0])
        for module in ("hotcoco", "panopticapi"):
            monkeypatch.setitem(sys.modules, module, None)
        warnings = [f for f in inspect_evaluation(cfg) if f.level == "warning"]
        assert [f.fix for f in warnings] == ["pip install hotcoco"]
    finally:
        unregister_panoptic("streets")


def test_a_semantic_set_without_its_classes_is_named(write, tmp_path):
    write("labels", evaluator_type="sem_seg")
    cfg = training.config(tmp_path, [], "DATASETS.TEST", ("labels",))
    (finding,) = inspect_evaluation(cfg)
    assert "no stuff_classes and no ignore_label" in str(finding)
    assert finding.fix.startswith("MetadataCatalog.get('labels').set(stuff_classes=")


def test_a_type_without_an_evaluator_is_a_warning_before_the_training(write, tmp_path, caplog):
    write("mine", evaluator_type="mine")
    cfg = training.config(tmp_path, [], "DATASETS.TEST", ("mine",))
    with caplog.at_level(logging.WARNING):
        Trainer.check_evaluators(cfg)
    assert "'mine' of evaluator_type 'mine': it is not evaluated" in caplog.text
    assert "override Trainer.build_evaluator" in caplog.text


def test_stock_evaluators_still_take_a_plain_coco_set(write, tmp_path):
    write("plain")
    cfg = training.config(tmp_path, [], "DATASETS.TEST", ("plain",))
    assert isinstance(cfg, CfgNode) and inspect_evaluation(cfg) == []
    assert type(Trainer.build_evaluator(cfg, "plain")) is COCOEvaluator


# --- what keeps AP low ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "key", "score", "said"),
    [
        ("GeneralizedRCNN", "ROI_HEADS", 0.5, True),
        ("GeneralizedRCNN", "ROI_HEADS", 0.05, False),
        ("GeneralizedRCNN", "RETINANET", 0.5, False),  # not read
        ("RetinaNet", "RETINANET", 0.3, True),
    ],
)
def test_a_threshold_that_lowers_ap_is_named(write, tmp_path, architecture, key, score, said):
    write("plain")
    key = f"MODEL.{key}.SCORE_THRESH_TEST"
    keys = ("DATASETS.TEST", ("plain",), "MODEL.META_ARCHITECTURE", architecture, key, score)
    found = inspect_evaluation(training.config(tmp_path, [], *keys))
    found = [(f.level, f.where) for f in found if f.kind == "score-threshold"]
    assert found == [("warning", f"{key} is {score}")] * said


def crowd(content):
    """Gives the first image five objects, the second three and two crowds; others have one."""
    first, second = (image["id"] for image in content["images"][:2])
    box = {"category_id": content["categories"][0]["id"], "bbox": [4, 4, 20, 20], "area": 400}
    content["annotations"] = [
        {**box, "id": number, "image_id": image, "iscrowd": crowd}
        for number, (image, crowd) in enumerate(
            [(first, 0)] * 5 + [(second, 0)] * 3 + [(second, 1)] * 2, start=1
        )
    ]


@pytest.mark.parametrize("kept, said", [(100, ()), (5, ()), (-1, ()), (4, (1,)), (2, (1, 2))])
def test_images_of_more_objects_than_detections_are_named(write, tmp_path, kept, said, caplog):
    name = f"crowded{kept}"  # a message is logged once
    write(name, crowd)
    keys = ("DATASETS.TEST", (name,), "TEST.DETECTIONS_PER_IMAGE", kept)
    cfg = training.config(tmp_path, [], *keys)
    with caplog.at_level(logging.WARNING):
        Trainer.build_evaluator(cfg, name)
        Trainer.build_evaluator(cfg, name)
    assert len(caplog.records) == bool(said)
    if said:
        share = {4: "12.50%", 2: "50.00%"}[kept]
        assert f"{len(said)} of 4 images have more objects" in caplog.text
        assert f"so {share} of all objects cannot be found: id 1 (5 objects)" in caplog.text
        assert "set TEST.DETECTIONS_PER_IMAGE 5" in caplog.text


def test_coco_counts_a_hundred_detections_of_a_class():
    cfg = training.config("unused", [], "TEST.DETECTIONS_PER_IMAGE", 300)
    rows = [{"image_id": 7, "category_id": i % 2} for i in range(220)]
    content = {"images": [{"id": 7}], "annotations": rows}
    (finding,) = find_crowded_images(cfg, "mine", content, 100)
    assert "so 9.09% of all objects" in str(finding) and "id 7 (220 objects)" in str(finding)
    assert "max_dets_per_image=110" in finding.fix and "DETECTIONS_PER_IMAGE" not in finding.fix
    assert list(find_crowded_images(cfg, "mine", content, 110)) == []
    cfg.MODEL.META_ARCHITECTURE = "MyDETR"
    assert list(find_crowded_images(cfg, "mine", content, 100)) == []
