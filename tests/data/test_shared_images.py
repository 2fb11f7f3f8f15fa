"""Tests the warning about test images that are trained on."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from megdet_d2.data.shared_images import image_paths
from tests.helpers.coco_data import assert_says, check, coco_config, warnings_in

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def share(train, val, file_names):
    """Lets the test set have images of the training set's folder."""
    val.root = train.root.parent
    for row, name in zip(val.json["images"], file_names, strict=True):
        row["file_name"] = name


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("my_train_images/5.png", "my_val_images/9.png"), ["1 of its 2 images", "images/5.png'"]),
        (("./my_train_images/9.png", "my_val_images/../my_train_images/5.png"), ["2 of its 2"]),
        (("my_val_images/5.png", "my_val_images/9.png"), []),
    ],
)
def test_images_of_both_sets_are_counted(train, val, names, said, caplog):
    share(train, val, names)
    check(coco_config([train.write()], [val.write()]))
    assert len(warnings_in(caplog)) == bool(said)
    assert_says(caplog.text, *said)
    if said:
        assert_says(caplog.text, "DATASETS.TEST 'my_val'", "DATASETS.TRAIN 'my_train' too")


def test_sets_that_other_code_registers_are_compared_by_their_files(train, val, caplog):
    share(train, val, ("my_train_images/5.png", "my_val_images/9.png"))
    register_coco_instances("by_json", {}, str(val.write().path), str(val.root))
    train.write()
    names = [row["name"] for row in sorted(train.json["categories"], key=lambda row: row["id"])]
    DatasetCatalog.register(
        "by_function", lambda: load_coco_json(str(train.path), str(train.root), "by_function")
    )
    MetadataCatalog.get("by_function").thing_classes = names
    cfg = coco_config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_function",), ("by_json",)
    check(cfg)
    assert_says(caplog.text, "DATASETS.TEST 'by_json': 1 of its 2", "'by_function' too")


def test_one_set_for_both_is_meant(train, caplog):
    cfg = coco_config([train.write()])
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    check(cfg)
    assert not warnings_in(caplog)


def test_rows_without_a_file_name_are_left_out():
    assert image_paths([{}, {"file_name": None}, {"file_name": "/a/../b.png"}]) == {"/b.png"}
