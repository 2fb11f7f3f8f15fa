"""Tests that data sets which other code registers are checked as those of DATASETS.COCO."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode

from megdet_d2.data import check_datasets
from megdet_d2.data.records import forget_records
from tests.helpers.coco_data import WIDTH, assert_says, check, coco_config, refusal, warnings_in

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def theirs(train=(), test=(), num_classes=3):
    cfg = coco_config(num_classes=num_classes)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    return cfg


def register(data):
    data.write()
    register_coco_instances("theirs", {}, str(data.path), str(data.root))
    return data


def set_iscrowd(data):
    for row in data.json["annotations"][:2]:
        row["iscrowd"] = None


def set_outside(data):
    for row in data.json["annotations"][:2]:
        row["bbox"][0] += 2 * WIDTH


def set_size(data):
    data.json["images"][0] |= {"width": 48, "height": 64}


def set_file(data):
    (data.root / "5.png").write_bytes(b"")


def set_missing(data):
    (data.root / "5.png").unlink()


SPOILT = [
    (set_iscrowd, ("2 of 3 annotations have an iscrowd", "leaves them out", "id '5[0]' in")),
    (set_outside, ("2 of 3 annotations have a bbox outside",)),
    (set_size, ("1 of 2 images have another width", "48 x 64 in the json, 64 x 48")),
    (set_file, ("1 of 2 images cannot be opened", "it is empty")),
]


@pytest.mark.parametrize("spoil, said", SPOILT)
def test_a_json_that_is_registered_by_detectron2s_function(train, spoil, said):
    spoil(train)
    register(train)
    assert_says(refusal(theirs(("theirs",))), "DATASETS.TRAIN has 'theirs'", *said)
    if spoil in (set_size, set_file):  # found after the training, until now
        assert_says(refusal(theirs(test=("theirs",))), "DATASETS.TEST has 'theirs'", *said)


def test_a_missing_image_of_it(train):
    set_missing(train)
    register(train)
    message = refusal(theirs(("theirs",)), FileNotFoundError)
    assert_says(message, "1 of 2 images are not there", "5.png")


def balloons(root):
    """Returns records as the function of Detectron2's tutorial: numbers of NumPy, no image ids."""
    return [
        {
            "file_name": str(root / f"{name}.png"),
            "height": np.int64(48),
            "width": np.int64(64),
            "annotations": [
                {
                    "bbox": np.array([4.0, 6.0, 24.0, 16.0]),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": np.int64(0),
                    "iscrowd": np.int64(0),
                }
            ],
        }
        for name in (5, 9)
    ]


def test_records_of_a_function_with_numbers_of_numpy_are_no_fault(train, caplog):
    DatasetCatalog.register("theirs", lambda: balloons(train.root))
    MetadataCatalog.get("theirs").set(thing_classes=["balloon"])
    check(theirs(("theirs",), ("theirs",), num_classes=1))
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "change",
    [
        {"width": None, "height": None},
        {"annotations": [{"bbox": [9, 9, 4, 4, 30.0], "bbox_mode": BoxMode.XYWHA_ABS}]},
        {"annotations": []},
        {"annotations": None, "sem_seg_file_name": "a.png"},
        {"image_id": "a"},
        {"file_name": "memory://a"},
        {"file_name": None, "pixels": np.zeros(4)},
    ],
)
def test_records_that_work_in_detectron2_are_no_fault(train, change, caplog):
    """Without sizes, of rotated boxes, without objects, semantic, with ids that are not unique."""

    def load():
        for record in (records := balloons(train.root)):
            record.update(change)
            for key in [key for key, value in change.items() if value is None]:
                del record[key]
        return records

    DatasetCatalog.register("theirs", load)
    check(theirs(("theirs",), ("theirs",), num_classes=1))
    assert not warnings_in(caplog)


@pytest.mark.parametrize("dataset", [range(3), iter([1]), None])
def test_a_data_set_of_another_form_is_left_to_its_loader(dataset):
    DatasetCatalog.register("theirs", lambda: dataset)
    check(theirs(("theirs",)))


def test_a_function_that_fails_is_named(train):
    DatasetCatalog.register("theirs", lambda: json.loads("{"))
    assert_says(refusal(theirs(test=("theirs",))), "DATASETS.TEST has 'theirs'", "JSONDecodeError")


def test_a_training_set_is_loaded_once_until_the_loader_has_it(train):
    calls = []
    train.write()

    def load():
        calls.append(1)
        return load_coco_json(str(train.path), str(train.root), "theirs")

    DatasetCatalog.register("theirs", load)
    check_datasets(theirs(("theirs",), ("theirs",)))
    check_datasets(theirs(("theirs",)))
    records = DatasetCatalog.get("theirs")
    assert len(calls) == 1 and len(records) == 2
    forget_records()
    assert DatasetCatalog.get("theirs") == records and len(calls) == 2


def test_classes_that_only_loading_tells_are_left_to_the_trainer(train):
    """A mapper of the user's may merge them."""
    register(train)
    check(theirs(("theirs",), num_classes=2))
