"""Tests what is found in a COCO json: all of it at once, with ids, file names and counts."""

import json

import pytest
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json

from megdet_d2.data import check_datasets, inspect_datasets, register_coco
from tests.helpers.coco_data import (
    HEIGHT,
    WIDTH,
    assert_says,
    check,
    coco_config,
    refusal,
    warnings_in,
)

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def findings(cfg):
    register_coco(cfg.DATASETS.COCO, cfg.MODEL.MASK_ON)
    return {f.kind: f for item in inspect_datasets(cfg) for f in item.findings}


def many(data, boxes=20):
    """Gives the data set that many boxes, all inside their images."""
    step = (WIDTH - 20) // boxes
    data.json["annotations"] = [
        {
            "id": 100 + i,
            "image_id": (5, 9)[i % 2],
            "category_id": 3,
            "bbox": [2 + step * i, 20, 12, 9],
            "area": 108,
            "iscrowd": 0,
        }
        for i in range(boxes)
    ]
    data.json["categories"] = [{"id": 3, "name": "cat"}]
    return data.json["annotations"]


def loaded(data):
    """Returns the boxes that training gets, by Detectron2's own loader and mapper."""
    mapper = DatasetMapper(coco_config([data]), is_train=True)
    return sum(len(mapper(entry)["instances"]) for entry in get_detection_dataset_dicts(data.name))


def test_all_faults_of_all_sets_are_named_at_once(train, val):
    train.json["annotations"][0]["bbox"] = [1, 2]
    train.json["annotations"][1]["category_id"] = 44
    train.json["images"][1]["file_name"] = "gone.png"
    val.json["annotations"][2]["area"] = None
    message = refusal(coco_config([train.write()], [val.write()], num_classes=80))
    assert_says(message, "The data sets have 5 faults", "1. DATASETS.COCO 'my_train'")
    assert_says(message, "id 1 in '5.png' ([1, 2])", "id 2 in '5.png' (44)", "id 9 'gone.png'")
    assert_says(message, "'my_val'", "id 3 in '9.png' (None)", "NUM_CLASSES is 80")


def test_a_kind_of_fault_is_one_finding_with_all_ids_and_the_first_five_in_the_message(train):
    for row in many(train)[3:17]:
        row["bbox"][2] = -1
    train.write()
    cfg = coco_config([train], num_classes=1)
    found = findings(cfg)["bad-box"]
    assert found.ids == tuple(range(103, 117)) and found.count == 14 and found.num_rows == 20
    assert set(found.images) == {"5.png", "9.png"} and found.level == "error"
    assert found.file == str(train.path)
    assert json.loads(json.dumps(found.as_dict()))["ids"] == list(found.ids)
    message = refusal(cfg)
    assert_says(message, "14 of 20 annotations have a bbox", "id 107 in '9.png'", ", ...; make it")
    assert "id 108" not in message


@pytest.mark.parametrize("value, crowd", [(None, 0), ("0", 0), ("", 0), ("1", 1)])
def test_iscrowd_as_other_tools_write_it_is_read_and_warned_of(train, caplog, value, crowd):
    for row in many(train)[:12]:
        row["iscrowd"] = value
    cfg = coco_config([train.write()], num_classes=1)
    check(cfg)
    assert_says(caplog.text, "12 of 20 annotations have an iscrowd", "id 100", f"({value!r})")
    assert loaded(train) == (20 if crowd == 0 else 8)


def test_the_same_iscrowd_is_refused_where_pycocotools_reads_it_and_where_it_means_nothing(
    train, val
):
    many(val)[4]["iscrowd"] = "0"
    assert_says(refusal(coco_config(test=[val.write()], num_classes=1)), "'iscrowd'", "id 104")
    many(train)[4]["iscrowd"] = "no"
    assert_says(refusal(coco_config([train.write()], num_classes=1)), "iscrowd", "('no')")


SEGMENTATIONS = [
    [[]],
    [[1, 2, 3, 4]],
    [1, 2, 3, 4, 5, 6],
    [[1] * 7],
    [["1", 2, 3, 4, 5, 6]],
    {"counts": [4]},
    "",
    None,
    5,
]


@pytest.mark.parametrize("mask", SEGMENTATIONS)
def test_without_masks_a_box_is_trained_whatever_its_segmentation_is(train, mask, caplog):
    for row in many(train)[:14]:
        row["segmentation"] = mask
    check(coco_config([train.write()], num_classes=1))
    assert loaded(train) == 20 and not warnings_in(caplog)


@pytest.mark.parametrize("mask", SEGMENTATIONS)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_with_masks_each_of_them_is_named(train, mask, mask_format):
    for row in many(train):
        row["segmentation"] = [[1, 2, 9, 2, 9, 8]]
    for row in train.json["annotations"][:14]:
        row["segmentation"] = mask
    cfg = coco_config([train.write()], num_classes=1)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, mask_format
    assert_says(refusal(cfg), "14 of 20 annotations have", "id 100 in '5.png'", "ASK_ON")


def test_a_few_objects_without_a_polygon_are_left_out_with_their_ids_as_a_warning(train, caplog):
    for row in many(train):
        row["segmentation"] = [[1, 2, 9, 2, 9, 8]]
    train.json["annotations"][6]["segmentation"] = [[1, 2, 3, 4]]
    train.json["annotations"][7]["segmentation"] = [[1, 2, 3, 4], [1, 2, 9, 2, 9, 8]]
    cfg = coco_config([train.write()], num_classes=1)
    cfg.MODEL.MASK_ON = True
    register_coco(cfg.DATASETS.COCO, cfg.MODEL.MASK_ON)
    check_datasets(cfg)
    assert_says(caplog.text, "1 of 20 annotations have no polygon", "id 106 in '5.png'")
    assert loaded(train) == 19


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]},
        {"size": [HEIGHT, WIDTH], "counts": [7]},
        {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT + 1, -1]},
        {"size": [HEIGHT, WIDTH], "counts": None},
        {"size": HEIGHT, "counts": "abc"},
    ],
)
def test_an_rle_that_fits_no_image_is_named(train, rle):
    for row in many(train):
        row["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT]}
    cfg = coco_config([train], num_classes=1)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    train.write()
    check(cfg)
    train.json["annotations"][3]["segmentation"] = rle
    train.write()
    assert_says(refusal(cfg), "1 of 20 annotations have an RLE", "id 103 in '9.png'")


def test_ids_of_two_types_are_named(train):
    train.json["images"][0]["id"] = "5"
    for row in train.json["annotations"]:
        row["image_id"] = "5" if row["image_id"] == 5 else row["image_id"]
    assert_says(
        refusal(coco_config([train.write()])), "1 of 2 images", "id '5' '5.png'", "one type"
    )


def test_text_ids_of_images_that_are_numbers_elsewhere_get_a_hint(train):
    for row in train.json["annotations"]:
        row["image_id"] = str(row["image_id"])
    assert_says(refusal(coco_config([train.write()])), "3 of 3", "('5')", "images are int")


@pytest.mark.parametrize("value", [1e30, 10**400, float("inf"), -(2**40)])
def test_a_coordinate_beyond_all_pixels_is_named(train, value):
    train.json["annotations"][1]["bbox"][0] = value
    assert_says(refusal(coco_config([train.write()])), "1 of 3 annotations", "id 2 in '5.png'")


def spoilt(row, how):
    x, y, w, h = row["bbox"]
    row["bbox"] = {
        "corners": [x, y, x + w, y + h],
        "fractions": [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT],
        "centres": [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT],
        "outside": [x + WIDTH, y, w, h],
        "above": [x, y - 2 * HEIGHT, w, h],
        "no area": [x, y, w, 0],
        "overhang": [WIDTH - 6, HEIGHT - 5, w, h],
    }[how]


KINDS = {
    "corners": "box-corners",
    "fractions": "box-fraction",
    "centres": "box-fraction",
    "outside": "box-outside",
    "above": "box-outside",
    "no area": "box-no-area",
}


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_of_another_convention_are_refused_with_ids(train, how, split):
    for i, row in enumerate(many(train)):
        row["bbox"] = [8 + 2 * i, 10 + i // 2, 12, 9]
        spoilt(row, how)
    cfg = coco_config([train.write()], num_classes=1)
    if split == "test":
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("my_train",)
    found = findings(cfg)
    assert found[KINDS[how]].level == "error" and found[KINDS[how]].count >= 5
    assert_says(refusal(cfg), "of 20 annotations have a bbox", "id 1", f"in {WIDTH} x {HEIGHT}")


@pytest.mark.parametrize("how", [*(how for how in KINDS if how != "corners"), "overhang"])
def test_a_few_of_them_are_a_warning_with_ids(train, how, caplog):
    rows = many(train)
    for i in (3, 8):
        spoilt(rows[i], how)
    check(coco_config([train.write()], num_classes=1))
    assert_says(caplog.text, "2 of 20 annotations have a bbox", "id 103 in", "id 108 in")


@pytest.mark.parametrize("size", [8, 12, 16])
def test_right_boxes_in_any_corner_of_the_image_are_no_fault(train, size, caplog):
    rows = many(train, 20)
    for i, row in enumerate(rows):
        row["bbox"] = [
            (0, WIDTH - size)[i % 2],
            (0, HEIGHT - size)[i // 2 % 2],
            size + 0.7 - 0.01 * i,  # exporters round outwards, and no object stands twice
            size,
        ]
    check(coco_config([train.write()], num_classes=1))
    assert not warnings_in(caplog)


def test_loose_boxes_around_objects_as_large_as_their_images_are_a_warning(train, caplog):
    for row in many(train):
        row["bbox"] = [3, 3, WIDTH - 1, HEIGHT]
    check(coco_config([train.write()], num_classes=1))
    assert_says(caplog.text, "20 of 20 annotations have a bbox that leaves their image")


def test_one_object_as_large_as_its_image_is_no_fault(train, caplog):
    for row in many(train, 2):
        row["bbox"] = [0, 0, WIDTH, HEIGHT]
    check(coco_config([train.write()], num_classes=1))
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: [row.update(iscrowd=1) for row in rows],
        lambda rows: rows.clear(),
    ],
)
def test_a_training_set_without_an_object_is_refused(train, spoil):
    spoil(train.json["annotations"])
    message = refusal(coco_config([train.write()]))
    assert_says(message, "DATASETS.TRAIN has ['my_train']", "object to train on", "add annotations")


def test_images_without_objects_may_be_a_training_set_beside_another(train, val, caplog):
    val.json["annotations"].clear()
    cfg = coco_config([train.write(), val.write()])
    check(cfg)
    assert not warnings_in(caplog)


def test_a_test_set_without_annotations_is_allowed_and_a_training_set_is_not(train, val):
    del val.json["annotations"], train.json["annotations"]
    check(coco_config(test=[val.write()]))
    assert_says(refusal(coco_config([train.write()])), "no list 'annotations'")


def test_a_category_without_an_object_is_a_warning(train, caplog):
    train.json["categories"].insert(0, {"id": 0, "name": "animals"})
    check(coco_config([train.write()], num_classes=4))
    assert_says(
        caplog.text, "1 of 4 categories have no object", "id 0 (animals)", "lower NUM_CLASSES"
    )


def test_records_are_those_of_detectron2(train, caplog):
    """Ids with gaps and out of order, crowds, RLEs of both kinds, keypoints, extra keys."""
    rows = many(train)
    for row in rows:
        row["segmentation"] = [[1, 2, 9, 2, 9, 8], [3, 4]]
        row["keypoints"], row["num_keypoints"] = [3, 4, 2, 5, 6, 0], 1
        row["attributes"] = {"colour": "red"}
    rows[1] |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 3072]}}
    rows[2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "PPYo1"}
    rows[3]["segmentation"] = [[1, 2]]
    rows[4]["segmentation"], rows[5]["keypoints"] = [], []
    del rows[6]["iscrowd"], rows[7]["segmentation"]
    train.json["categories"] = [{"id": 9, "name": "b"}, {"id": 3, "name": "a"}]
    train.json["images"].reverse()
    train.write()
    expected = load_coco_json(str(train.path), str(train.root), "by_detectron2")
    register_coco([train.triple])
    records = DatasetCatalog.get("my_train")
    assert records == expected and sum(len(record["annotations"]) for record in records) == 19
    ours, theirs = (MetadataCatalog.get(name).as_dict() for name in ("my_train", "by_detectron2"))
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert ours[key] == theirs[key]


# --- what stands twice ---------------------------------------------------------------------------


def add_object(train, **changes):
    train.json["annotations"].append(train.json["annotations"][0] | {"id": 8} | changes)


def add_image(train, *boxes):
    """Adds an image row of the first file, with objects of these boxes and the category 3."""
    train.json["images"].append(train.json["images"][0] | {"id": 12})
    for number, box in enumerate(boxes, start=20):
        add_object(train, id=number, image_id=12, bbox=box)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: add_object(t), "1 of 4 annotations repeat an earlier object"),
        (lambda t: add_object(t, category_id=7), ""),
        (lambda t: add_object(t, bbox=[4, 6, 20, 11]), ""),
        (lambda t: add_object(t, iscrowd=1), ""),
        (lambda t: add_object(t, segmentation=[[4, 6, 24, 6, 24, 16]]), ""),
        (lambda t: add_image(t, [1, 2, 9, 9]), "1 of 3 images have the file_name of an earlier"),
        (
            lambda t: add_image(t),
            "1 of 3 images have the file_name of an earlier one: id 12 '5.png",
        ),
        (
            lambda t: t.json["categories"][1].update(name="dog"),
            "1 of 3 categories have the name of an earlier one, and are trained as another class",
        ),
    ],
)
def test_what_stands_twice_after_a_merge_is_a_warning(train, change, said, caplog):
    change(train)
    check(coco_config([train.write()]))
    found = [text for text in warnings_in(caplog) if "box" not in text.split(";")[0]]
    assert len(found) == bool(said)
    assert said.split(": id")[0] in caplog.text


def test_a_file_that_stands_twice_with_the_same_objects_is_no_fault(train, caplog):
    """A project may show an image more often than others."""
    train.json["annotations"][1]["category_id"] = 3
    add_image(train, *(row["bbox"] for row in train.json["annotations"][:2]))
    check(coco_config([train.write()]))
    assert "file_name of an earlier one" not in caplog.text
