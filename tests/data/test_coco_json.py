"""Tests what is refused in COCO json files: each message names the place and the fix."""

import json
import os

import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json

from megdet_d2.data import check_datasets, register_coco
from tests.helpers.coco_data import HEIGHT, WIDTH, assert_says, check, coco_config, refusal

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def test_a_missing_json_is_named(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(coco_config([train]), FileNotFoundError)
    assert_says(message, "DATASETS.COCO 'my_train'", str(train.path), "no annotation file")
    assert_says(message, "a relative path starts at", str(tmp_path))


def test_a_missing_image_root_is_named(train):
    train.write().root = train.root / "nowhere"
    message = refusal(coco_config([train]), FileNotFoundError)
    assert_says(
        message, "DATASETS.COCO 'my_train'", str(train.root), "no such image folder", "relative"
    )


def test_a_missing_image_is_named_and_counted(train):
    (train.root / "9.png").unlink()
    message = refusal(coco_config([train.write()]), FileNotFoundError)
    assert_says(message, "'my_train'", f"1 of 2 images are not in '{train.root}': id 9 '9.png'")
    assert_says(message, "Correct the image root, or the file_name")


def test_images_in_folders_are_found(train):
    (train.root / "a").mkdir()
    (train.root / "9.png").rename(train.root / "a" / "9.png")
    train.json["images"][1]["file_name"] = "a/9.png"
    check(coco_config([train.write()]))
    train.json["images"][1]["file_name"] = "b/9.png"
    assert_says(refusal(coco_config([train.write()]), FileNotFoundError), "1 of 2", "'b/9.png'")


def test_what_is_not_json_is_refused(train):
    train.path.write_text("<annotation>")
    message = refusal(coco_config([train]))
    assert_says(message, "DATASETS.COCO 'my_train'", f"'{train.path}': it is not json", "line 1")


@pytest.mark.parametrize(
    "content, key",
    [
        ([], "images"),
        ({"shapes": []}, "images"),
        ({"images": [], "annotations": {}}, "annotations"),
        ({"images": [], "annotations": []}, "categories"),
        ({"images": ["a.png"]}, "images"),
    ],
)
def test_json_that_is_not_coco_is_refused(train, content, key):
    if isinstance(content, dict) and content.get("images") == []:
        content["images"] = train.json["images"]
    train.path.write_text(json.dumps(content))
    message = refusal(coco_config([train]))
    assert_says(message, "'my_train'", str(train.path), f"no list '{key}'", "COCO instances")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_empty_list_is_refused(train, key):
    train.json[key] = []
    assert_says(
        refusal(coco_config([train.write()])), str(train.path), f"has no {key}", "one or more"
    )


@pytest.mark.parametrize(
    "rows, key",
    [("images", key) for key in ("id", "file_name", "height", "width")]
    + [("categories", key) for key in ("id", "name")]
    + [("annotations", key) for key in ("id", "image_id", "category_id", "bbox")]
    + [("annotations", key) for key in ("area", "iscrowd")],
)
def test_a_missing_key_is_refused(val, rows, key):
    del val.json[rows][1][key]
    message = refusal(coco_config(test=[val.write()]))
    assert_says(
        message, "'my_val'", str(val.path), f"1 of {len(val.json[rows])} {rows} have no '{key}'"
    )
    row = val.json[rows][1]
    assert_says(message, f"id {row['id']}" if "id" in row else f"{rows}[1]", f"add '{key}'")


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_only_the_evaluation_needs_may_be_missing_in_training(train, key):
    for annotation in train.json["annotations"]:
        del annotation[key]
    check(coco_config([train.write()]))
    assert len(DatasetCatalog.get("my_train")) == 2


@pytest.mark.parametrize(
    "rows, key, value, types",
    [
        ("images", "file_name", None, "str"),
        ("images", "height", "48", "int or float"),
        ("images", "id", [5], "int or float or str"),
        ("categories", "id", "3", "int or float"),
        ("annotations", "bbox", None, "list"),
        ("annotations", "bbox", "1 2 3 4", "list"),
        ("annotations", "category_id", "3", "int or float"),
    ],
)
def test_a_value_of_another_type_is_refused(train, rows, key, value, types):
    train.json[rows][1][key] = value
    label = f"id {train.json[rows][1]['id']!r}"
    message = refusal(coco_config([train.write()]))
    assert_says(message, "'my_train'", f"{rows} have a '{key}' that is not {types}: {label}")
    assert_says(message, f"({value!r}); make it {types}")


def test_an_unknown_category_id_is_refused(train):
    train.json["annotations"][2]["category_id"] = 4
    message = refusal(coco_config([train.write()]))
    assert_says(message, "'my_train'", "[3, 7, 90]: id 3 in '9.png' (4)", "add the category")


def test_an_unknown_image_id_is_refused(train):
    train.json["annotations"][1]["image_id"] = 6
    message = refusal(coco_config([train.write()]))
    assert_says(message, "'my_train'", "1 of 3 annotations", "no image has: id 2 (6)", "add the")


@pytest.mark.parametrize(
    "box",
    [[], [1, 2, 3], [1, 2, -3, 4], [1, 2, 3, -4], [1, 2, 3, float("nan")], [1, 2, "3", 4]],
)
def test_a_bad_box_is_refused(train, box):
    train.json["annotations"][0]["bbox"] = box
    message = refusal(coco_config([train.write()]))
    assert_says(message, "'my_train'", f"id 1 in '5.png' ({box})", "[x, y, width, height]")


@pytest.mark.parametrize("rows", ["images", "categories", "annotations"])
def test_an_id_that_stands_twice_is_refused(train, rows):
    train.json[rows][1]["id"] = again = train.json[rows][0]["id"]
    message = refusal(coco_config([train.write()]))
    assert_says(
        message, "'my_train'", f"{rows} have the id of an earlier one: id {again}", "its own id"
    )


def test_ignore_is_refused_as_in_detectron2(train):
    train.json["annotations"][0]["ignore"] = 1
    train.write()
    message = refusal(coco_config([train]))
    assert_says(message, "have 'ignore'", "id 1 in '5.png' (1)", "iscrowd 1 instead")
    with pytest.raises(AssertionError, match="ignore"):
        load_coco_json(str(train.path), str(train.root), "stock_train")


def test_masks_are_asked_for_where_they_are_trained(train):
    cfg = coco_config([train.write()])
    check(cfg)
    cfg.MODEL.MASK_ON = True
    assert_says(refusal(cfg), "'my_train'", "3 of 3 annotations have no 'segmentation'")
    for annotation in train.json["annotations"]:
        annotation["segmentation"] = []  # as exports of boxes have it
    train.write()
    assert_says(
        refusal(cfg),
        "'my_train'",
        "3 of 3 annotations have no",
        "or an empty one",
        "id 1 in",
        "MASK_ON",
    )


def with_masks(data, mask):
    for annotation in data.json["annotations"]:
        annotation["segmentation"] = [[0, 0, 8, 0, 8, 8]]
    data.json["annotations"][1]["segmentation"] = mask
    return data.write()


def test_an_rle_is_for_bitmasks_in_training_and_for_crowds(train, val):
    rle = {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT]}
    cfg = coco_config([with_masks(train, rle)])
    cfg.MODEL.MASK_ON = True
    message = refusal(cfg)
    assert_says(
        message, "'my_train'", "have an RLE", "id 2 in '5.png'", "INPUT.MASK_FORMAT bitmask"
    )
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check(cfg)
    cfg.INPUT.MASK_FORMAT = "polygon"
    train.json["annotations"][1]["iscrowd"] = 1  # Detectron2 leaves it out
    train.write()
    check(cfg)
    cfg = coco_config(test=[with_masks(val, rle)])
    cfg.MODEL.MASK_ON = True
    check(cfg)


@pytest.mark.parametrize(
    "mask, part",
    [([[]], "[]"), ([[1, 2]], "[1, 2]"), ([1, 2, 3, 4, 5, 6], "1"), ([[1] * 7], "[1, 1, 1, 1")],
)
def test_what_is_no_polygon_is_refused_where_it_is_evaluated(val, mask, part):
    cfg = coco_config(test=[with_masks(val, mask)])
    check(cfg)
    cfg.MODEL.MASK_ON = True
    message = refusal(cfg)
    assert_says(message, "'my_val'", f"id 2 in '5.png' ({part}", "no polygon", "three points")


def test_keypoints_are_refused_without_their_names(train):
    cfg = coco_config([train.write()])
    cfg.MODEL.KEYPOINT_ON = True
    message = refusal(cfg)
    assert_says(message, "KEYPOINT_ON is True", "'my_train'", "keypoint_names", "keypoint_flip_map")


def test_ids_that_are_no_numbers_are_for_training_alone(train, val):
    for data in (train, val):
        for annotation in data.json["annotations"]:
            annotation["id"] = f"a{annotation['id']}"
    check(coco_config([train.write()]))
    assert_says(
        refusal(coco_config(test=[val.write()])), "'my_val'", "have a 'id' that is not int", "'a1'"
    )


def test_only_the_splits_in_use_are_read(train, val):
    cfg = coco_config([train.write()], [val.write()])
    os.remove(train.triple[1])
    register_coco(cfg.DATASETS.COCO)
    check_datasets(cfg, ("TEST",))
    with pytest.raises(FileNotFoundError):
        check_datasets(cfg)
