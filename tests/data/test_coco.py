"""Tests DATASETS.COCO: registration, classes, category ids, evaluation of the user's data sets."""

import json
import logging
import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from megdet_d2 import add_megdet_config
from megdet_d2.data import register_coco
from tests.helpers.coco_data import CATEGORIES, Data, assert_says, check, coco_config, refusal

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.mark.parametrize(
    "value, entry",
    [
        (["a", "b.json", "imgs"], "'a'"),  # a flat triple
        (["abc"], "'abc'"),  # three letters are no triple
        ("abc", "'abc'"),
        ([["a", "b.json"]], "['a', 'b.json']"),
        ([["a", "b.json", 3]], "['a', 'b.json', 3]"),
        ([{"name": "a", "json": "b", "root": "c"}], "{'name'"),
        ([None], "None"),
    ],
)
def test_what_is_no_list_of_triples_is_refused_with_an_example(value, entry):
    with pytest.raises(ValueError) as error:
        register_coco(value)
    assert_says(str(error.value), "DATASETS.COCO has the entry " + entry, '[["my_train", "train.')


def test_a_name_of_detectron2s_is_refused_and_nothing_is_registered(train):
    triples = [train.triple, ["coco_2017_train", str(train.path), str(train.root)]]
    with pytest.raises(ValueError) as error:
        register_coco(triples)
    assert_says(
        str(error.value), "DATASETS.COCO", "'coco_2017_train'", "registered", "choose another name"
    )
    assert "my_train" not in DatasetCatalog.list()


def test_a_name_that_stands_twice_is_refused(train, val):
    val.name = train.name
    message = refusal(coco_config([train.write()], [val.write()]))
    assert_says(message, "DATASETS.COCO has 'my_train' twice", "its own name")


def test_an_unregistered_name_is_refused_with_those_there_are(train):
    cfg = coco_config([train.write()])
    cfg.DATASETS.TRAIN = ("my_trian",)
    assert_says(
        refusal(cfg), "DATASETS.TRAIN has 'my_trian'", "not registered", "['my_train']", "Correct"
    )
    cfg = coco_config([train])
    cfg.DATASETS.TEST = ("my_vla",)
    assert_says(refusal(cfg), "DATASETS.TEST has 'my_vla'", "add a triple: [[")


@pytest.mark.parametrize(
    "categories, differ",
    [
        (CATEGORIES[:2], "[('owl', None)]"),
        ([*CATEGORIES[:2], {"id": 90, "name": "Owl"}], "[('owl', 'Owl')]"),
        # The same names and ids, paired otherwise.
        (
            [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, CATEGORIES[2]],
            "[('cat', 'dog'), ('dog', 'cat')]",
        ),
    ],
)
def test_other_categories_in_train_and_val_are_refused(train, val, categories, differ):
    val.json["categories"] = categories
    val.json["annotations"] = []
    message = refusal(coco_config([train.write()], [val.write()]))
    assert_says(message, "DATASETS", "'my_train' and 'my_val'", differ, "the same names")


def test_categories_in_another_order_are_the_same(train, val):
    val.json["categories"].reverse()
    check(coco_config([train.write()], [val.write()]))


def test_ids_that_start_elsewhere_are_the_same_classes(train, val):
    for row in val.json["categories"]:
        row["id"] += 100
    for row in val.json["annotations"]:
        row["category_id"] += 100
    check(coco_config([train.write()], [val.write()]))
    classes = [
        [a["category_id"] for image in DatasetCatalog.get(name) for a in image["annotations"]]
        for name in ("my_train", "my_val")
    ]
    assert classes[0] == classes[1]
    assert MetadataCatalog.get("my_train").thing_classes == ["cat", "dog", "owl"]
    assert MetadataCatalog.get("my_val").thing_classes == ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    "architecture, key", [("GeneralizedRCNN", "ROI_HEADS"), ("RetinaNet", "RETINANET")]
)
def test_another_num_classes_is_refused_with_the_right_one(train, architecture, key):
    message = refusal(coco_config([train.write()], architecture=architecture, num_classes=80))
    assert_says(message, f"MODEL.{key}.NUM_CLASSES is 80", "'my_train' has 3 categories")
    assert message.endswith(f"set MODEL.{key}.NUM_CLASSES 3")
    cfg = coco_config([train], architecture=architecture, num_classes=80)
    cfg.MODEL[key].NUM_CLASSES = 3  # the other architecture's key does not matter
    check(cfg)


def test_num_classes_of_an_unknown_architecture_is_its_own_affair(train):
    check(coco_config([train.write()], architecture="MyDetector", num_classes=80))


def test_gaps_in_the_ids_are_closed_in_the_order_of_the_ids(train):
    check(coco_config([train.write()]))
    images = DatasetCatalog.get("my_train")
    assert [a["category_id"] for image in images for a in image["annotations"]] == [0, 2, 1]
    metadata = MetadataCatalog.get("my_train")
    assert metadata.thing_classes == ["cat", "dog", "owl"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 90: 2}
    assert [image["file_name"] for image in images] == [
        str(train.root / "5.png"),
        str(train.root / "9.png"),
    ]


def test_boxes_without_area_and_images_without_objects_are_allowed(train):
    train.json["annotations"][0]["bbox"] = [4, 6, 0, 10]
    train.json["annotations"].pop()
    check(coco_config([train.write()]))
    assert [len(image["annotations"]) for image in DatasetCatalog.get("my_train")] == [2, 0]


def test_a_second_registration_replaces_the_first(train, tmp_path):
    check(coco_config([train.write()]))
    assert len(DatasetCatalog.get("my_train")) == 2  # fills the metadata
    other = Data(tmp_path / "other", "my_train")
    other.json["images"].pop()
    other.json["annotations"].pop()
    other.json["categories"] = [c | {"name": c["name"].upper()} for c in CATEGORIES]
    check(coco_config([other.write()]))
    assert len(DatasetCatalog.get("my_train")) == 1
    metadata = MetadataCatalog.get("my_train")
    assert metadata.json_file == str(other.path) and metadata.image_root == str(other.root)
    assert metadata.thing_classes == ["CAT", "DOG", "OWL"]


def test_a_yaml_registers(train, val, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
MODEL: {{META_ARCHITECTURE: RetinaNet, RETINANET: {{NUM_CLASSES: 3}}}}
DATASETS:
  COCO:
    - ["my_train", "{train.path}", "{train.root}"]
    - ["my_val", "{val.path}", "{val.root}"]
  TRAIN: ("my_train",)
  TEST: ("my_val",)
"""
    )
    train.write(), val.write()
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.merge_from_file(str(path))
    check(cfg)
    assert len(DatasetCatalog.get("my_train")) == len(DatasetCatalog.get("my_val")) == 2

    again = get_cfg()
    add_megdet_config(again)
    path.write_text(cfg.dump())
    again.merge_from_file(str(path))
    assert again.DATASETS.COCO == [train.triple, val.triple]


def test_the_command_line_registers(train):
    train.write()
    cfg = coco_config()
    triples = f"[['my_train', '{train.path}', '{train.root}']]"
    cfg.merge_from_list(["DATASETS.COCO", triples, "DATASETS.TRAIN", "('my_train',)"])
    check(cfg)
    assert len(DatasetCatalog.get("my_train")) == 2


def test_sets_that_are_not_used_are_not_read(train, val):
    cfg = coco_config([train.write()])
    cfg.DATASETS.COCO.append(val.triple)  # its json is not there
    check(cfg)


def test_a_set_that_others_register_has_to_be_there_and_to_load(tmp_path, train):
    cfg = coco_config(num_classes=80)
    cfg.DATASETS.TEST = ("theirs",)
    annotations, images = tmp_path / "theirs.json", tmp_path / "theirs"
    register_coco_instances("theirs", {}, str(annotations), str(images))
    for path, key, make in (
        (annotations, "json_file", lambda: annotations.write_text("not read")),
        (images, "image_root", lambda: train.root.rename(images)),
    ):
        message = refusal(cfg, FileNotFoundError)
        assert_says(message, f"DATASETS.TEST has 'theirs': its {key} '{path}' is not there")
        assert_says(message, "DETECTRON2_DATASETS")
        make()
    assert_says(refusal(cfg), "DATASETS.TEST has 'theirs': it cannot be loaded", "JSONDecodeError")
    annotations.write_text(json.dumps(train.json))
    check(cfg)  # whether its classes are the model's is checked when the loader is there


def test_coco_itself_has_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = coco_config(num_classes=80)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    file = MetadataCatalog.get("coco_2017_val").json_file
    if os.path.isfile(file):
        pytest.skip("it is there")
    message = refusal(cfg, FileNotFoundError)
    assert_says(message, f"DATASETS.TEST has 'coco_2017_val': its json_file '{file}' is not")


def evaluate_perfect_predictions(name, output_dir):
    evaluator = COCOEvaluator(name, output_dir=str(output_dir), use_fast_impl=False)
    evaluator.reset()
    for image in DatasetCatalog.get(name):
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in image["annotations"]
        ]
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes))
        instances.scores = torch.ones(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in image["annotations"]])
        evaluator.process([image], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]["AP"]


def test_perfect_predictions_have_an_ap_of_100(val, tmp_path):
    check(coco_config(test=[val.write()]))
    assert evaluate_perfect_predictions("my_val", tmp_path / "out") == pytest.approx(100)
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert sorted(result["category_id"] for result in results) == [3, 7, 90]


def test_the_annotation_id_0_costs_ap_and_is_warned_of(val, tmp_path, caplog):
    val.json["annotations"][0]["id"] = 0
    with caplog.at_level(logging.WARNING):
        check(coco_config(test=[val.write()]))
    assert_says(caplog.text, "'my_val'", "annotation id 0", "from 1")
    assert evaluate_perfect_predictions("my_val", tmp_path / "out") < 100
