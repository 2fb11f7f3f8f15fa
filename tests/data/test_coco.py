"""The user's own COCO json files: what is wrong is refused with the fix, what is right loads."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from megdet_d2 import add_megdet_config
from megdet_d2.data import check_datasets, coco, register_coco

WIDTH, HEIGHT = 64, 48
# Out of order and with gaps, as in COCO itself.
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "owl"}]


@pytest.fixture(autouse=True)
def clean_catalogs(monkeypatch):
    monkeypatch.setattr(coco, "_registered", {})
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


class Data:
    """A COCO data set of two images and three objects in a folder; `json` is there to be spoilt."""

    def __init__(self, folder, name="my_train"):
        self.name, self.path, self.root = name, folder / f"{name}.json", folder / f"{name}_images"
        self.root.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        images = [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (5, 9)
        ]
        for image in images:
            Image.fromarray(pixels).save(self.root / image["file_name"])
        boxes = [(5, 3, [4, 6, 20, 10]), (5, 90, [30.5, 2, 16, 40]), (9, 7, [0, 0, 64, 48])]
        annotations = [
            {
                "id": i + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (image, category, box) in enumerate(boxes)
        ]
        self.json = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        self.json = json.loads(json.dumps(self.json))

    @property
    def triple(self):
        return [self.name, str(self.path), str(self.root)]

    def write(self):
        self.path.write_text(json.dumps(self.json))
        return self


@pytest.fixture
def train(tmp_path):
    return Data(tmp_path, "my_train")


@pytest.fixture
def val(tmp_path):
    return Data(tmp_path, "my_val")


def config(train=(), test=(), architecture="GeneralizedRCNN", num_classes=3):
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.DATASETS.COCO = [data.triple for data in (*train, *test)]
    cfg.DATASETS.TRAIN = tuple(data.name for data in train)
    cfg.DATASETS.TEST = tuple(data.name for data in test)
    return cfg


def check(cfg):
    register_coco(cfg.DATASETS.COCO)
    check_datasets(cfg)


def refusal(cfg, error=ValueError):
    """The message with which the config is refused."""
    with pytest.raises(error) as caught:
        check(cfg)
    return str(caught.value)


def assert_says(message, *parts):
    for part in parts:
        assert part in message


# --- DATASETS.COCO itself -------------------------------------------------------------------------


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
    message = refusal(config([train.write()], [val.write()]))
    assert_says(message, "DATASETS.COCO has 'my_train' twice", "its own name")


def test_an_unregistered_name_is_refused_with_those_there_are(train):
    cfg = config([train.write()])
    cfg.DATASETS.TRAIN = ("my_trian",)
    assert_says(
        refusal(cfg), "DATASETS.TRAIN has 'my_trian'", "not registered", "['my_train']", "Correct"
    )
    cfg = config([train])
    cfg.DATASETS.TEST = ("other",)
    assert_says(refusal(cfg), "DATASETS.TEST has 'other'", "add a triple: [[")


# --- Files ----------------------------------------------------------------------------------------


def test_a_missing_json_is_named(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(config([train]), FileNotFoundError)
    assert_says(message, "DATASETS.COCO 'my_train'", f"no annotation file '{train.path}'")
    assert_says(message, "a relative path starts at", str(tmp_path))


def test_a_missing_image_root_is_named(train):
    train.write().root = train.root / "nowhere"
    message = refusal(config([train]), FileNotFoundError)
    assert_says(message, "DATASETS.COCO 'my_train'", f"no image folder '{train.root}'", "relative")


def test_a_missing_image_is_named_and_counted(train):
    (train.root / "9.png").unlink()
    message = refusal(config([train.write()]), FileNotFoundError)
    assert_says(
        message, "'my_train'", f"1 of 2 images are not in '{train.root}'", "first is '9.png'"
    )
    assert_says(message, "Correct the image root, or the file_name")


def test_images_in_folders_are_found(train):
    (train.root / "a").mkdir()
    (train.root / "9.png").rename(train.root / "a" / "9.png")
    train.json["images"][1]["file_name"] = "a/9.png"
    check(config([train.write()]))
    train.json["images"][1]["file_name"] = "b/9.png"
    assert_says(refusal(config([train.write()]), FileNotFoundError), "1 of 2", "'b/9.png'")


def test_what_is_not_json_is_refused(train):
    train.path.write_text("<annotation>")
    message = refusal(config([train]))
    assert_says(message, "DATASETS.COCO 'my_train'", f"'{train.path}' is not json", "line 1")


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
    message = refusal(config([train]))
    assert_says(message, "'my_train'", str(train.path), f"no list '{key}'", "COCO instances")


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_empty_list_is_refused(train, key):
    train.json[key] = []
    assert_says(refusal(config([train.write()])), str(train.path), f"has no {key}", "one or more")


# --- What the json says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, key",
    [("images", key) for key in ("id", "file_name", "height", "width")]
    + [("categories", key) for key in ("id", "name")]
    + [("annotations", key) for key in ("id", "image_id", "category_id", "bbox")]
    + [("annotations", key) for key in ("area", "iscrowd")],
)
def test_a_missing_key_is_refused(val, rows, key):
    del val.json[rows][1][key]
    message = refusal(config(test=[val.write()]))
    assert_says(message, "'my_val'", str(val.path), f"{rows}[1] has no '{key}'; add it")


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_only_the_evaluation_needs_may_be_missing_in_training(train, key):
    for annotation in train.json["annotations"]:
        del annotation[key]
    check(config([train.write()]))
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
    message = refusal(config([train.write()]))
    assert_says(message, "'my_train'", f"{rows}[1] has {key} {value!r}; make it {types}")


def test_an_unknown_category_id_is_refused(train):
    train.json["annotations"][2]["category_id"] = 4
    message = refusal(config([train.write()]))
    assert_says(message, "'my_train'", "annotations[2] has category_id 4", "[3, 7, 90]", "add the")


def test_an_unknown_image_id_is_refused(train):
    train.json["annotations"][1]["image_id"] = 6
    message = refusal(config([train.write()]))
    assert_says(message, "'my_train'", "annotations[1] has image_id 6", "no image has", "add the")


@pytest.mark.parametrize(
    "box",
    [[], [1, 2, 3], [1, 2, -3, 4], [1, 2, 3, -4], [1, 2, 3, float("nan")], [1, 2, "3", 4]],
)
def test_a_bad_box_is_refused(train, box):
    train.json["annotations"][0]["bbox"] = box
    message = refusal(config([train.write()]))
    assert_says(message, "'my_train'", f"annotations[0] has bbox {box}", "[x, y, width, height]")


@pytest.mark.parametrize("rows", ["images", "categories", "annotations"])
def test_an_id_that_stands_twice_is_refused(train, rows):
    train.json[rows][1]["id"] = again = train.json[rows][0]["id"]
    message = refusal(config([train.write()]))
    assert_says(message, "'my_train'", f"{rows}[1] has the id {again}", "earlier", "once")


def test_ignore_is_refused_as_in_detectron2(train):
    train.json["annotations"][0]["ignore"] = 1
    train.write()
    assert_says(refusal(config([train])), "annotations[0] has ignore 1", "iscrowd 1 instead")
    with pytest.raises(AssertionError, match="ignore"):
        DatasetCatalog.get("my_train")


# --- Categories and classes -----------------------------------------------------------------------


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
    message = refusal(config([train.write()], [val.write()]))
    assert_says(message, "DATASETS", "'my_train' and 'my_val'", differ, "the same names")


def test_categories_in_another_order_are_the_same(train, val):
    val.json["categories"].reverse()
    check(config([train.write()], [val.write()]))


def test_ids_that_start_elsewhere_are_the_same_classes(train, val):
    for row in val.json["categories"]:
        row["id"] += 100
    for row in val.json["annotations"]:
        row["category_id"] += 100
    check(config([train.write()], [val.write()]))
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
    message = refusal(config([train.write()], architecture=architecture, num_classes=80))
    assert_says(message, f"MODEL.{key}.NUM_CLASSES is 80", "'my_train' has 3 categories")
    assert message.endswith(f"set MODEL.{key}.NUM_CLASSES 3")
    cfg = config([train], architecture=architecture, num_classes=80)
    cfg.MODEL[key].NUM_CLASSES = 3  # the other architecture's key does not matter
    check(cfg)


def test_num_classes_of_an_unknown_architecture_is_its_own_affair(train):
    check(config([train.write()], architecture="MyDetector", num_classes=80))


# --- What is right --------------------------------------------------------------------------------


def test_gaps_in_the_ids_are_closed_in_the_order_of_the_ids(train):
    check(config([train.write()]))
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
    check(config([train.write()]))
    assert [len(image["annotations"]) for image in DatasetCatalog.get("my_train")] == [2, 0]


def test_a_second_registration_replaces_the_first(train, tmp_path):
    check(config([train.write()]))
    assert len(DatasetCatalog.get("my_train")) == 2  # fills the metadata
    other = Data(tmp_path / "other", "my_train")
    other.json["images"].pop()
    other.json["annotations"].pop()
    other.json["categories"] = [c | {"name": c["name"].upper()} for c in CATEGORIES]
    check(config([other.write()]))
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
    cfg = config()
    triples = f"[['my_train', '{train.path}', '{train.root}']]"
    cfg.merge_from_list(["DATASETS.COCO", triples, "DATASETS.TRAIN", "('my_train',)"])
    check(cfg)
    assert len(DatasetCatalog.get("my_train")) == 2


def test_sets_that_are_not_used_are_not_read(train, val):
    cfg = config([train.write()])
    cfg.DATASETS.COCO.append(val.triple)  # its json is not there
    check(cfg)


def test_a_set_of_detectron2s_has_to_be_there_and_is_left_to_it(tmp_path):
    cfg = config(num_classes=80)
    cfg.DATASETS.TEST = ("theirs",)
    annotations, images = tmp_path / "theirs.json", tmp_path / "theirs"
    register_coco_instances("theirs", {}, str(annotations), str(images))
    for path, key, make in (
        (annotations, "json_file", lambda: annotations.write_text("not read")),
        (images, "image_root", images.mkdir),
    ):
        message = refusal(cfg, FileNotFoundError)
        assert_says(message, f"DATASETS.TEST has 'theirs', and its {key} '{path}' is not there")
        assert_says(message, "DETECTRON2_DATASETS")
        make()
    check(cfg)


def test_coco_itself_has_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config(num_classes=80)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    file = MetadataCatalog.get("coco_2017_val").json_file
    if os.path.isfile(file):
        pytest.skip("it is there")
    message = refusal(cfg, FileNotFoundError)
    assert_says(message, f"DATASETS.TEST has 'coco_2017_val', and its json_file '{file}' is not")


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
    check(config(test=[val.write()]))
    assert evaluate_perfect_predictions("my_val", tmp_path / "out") == pytest.approx(100)
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert sorted(result["category_id"] for result in results) == [3, 7, 90]


def test_the_annotation_id_0_costs_ap_and_is_warned_of(val, tmp_path, caplog):
    val.json["annotations"][0]["id"] = 0
    with caplog.at_level(logging.WARNING):
        check(config(test=[val.write()]))
    assert_says(caplog.text, "'my_val'", "annotation id 0", "from 1")
    assert evaluate_perfect_predictions("my_val", tmp_path / "out") < 100


# --- What only some trainings need ----------------------------------------------------------------


def test_masks_are_asked_for_where_they_are_trained(train):
    cfg = config([train.write()])
    check(cfg)
    cfg.MODEL.MASK_ON = True
    assert_says(refusal(cfg), "'my_train'", "annotations[0] has no 'segmentation'")
    for annotation in train.json["annotations"]:
        annotation["segmentation"] = []  # as exports of boxes have it
    train.write()
    assert_says(refusal(cfg), "'my_train'", "annotations[0] has an empty segmentation", "MASK_ON")


def with_masks(data, mask):
    for annotation in data.json["annotations"]:
        annotation["segmentation"] = [[0, 0, 8, 0, 8, 8]]
    data.json["annotations"][1]["segmentation"] = mask
    return data.write()


def test_an_rle_is_for_bitmasks_in_training_and_for_crowds(train, val):
    rle = {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT]}
    cfg = config([with_masks(train, rle)])
    cfg.MODEL.MASK_ON = True
    message = refusal(cfg)
    assert_says(message, "'my_train'", "annotations[1] has an RLE", "INPUT.MASK_FORMAT bitmask")
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check(cfg)
    cfg.INPUT.MASK_FORMAT = "polygon"
    train.json["annotations"][1]["iscrowd"] = 1  # Detectron2 leaves it out
    train.write()
    check(cfg)
    cfg = config(test=[with_masks(val, rle)])
    cfg.MODEL.MASK_ON = True
    check(cfg)


@pytest.mark.parametrize(
    "mask, part",
    [([[]], "[]"), ([[1, 2]], "[1, 2]"), ([1, 2, 3, 4, 5, 6], "1"), ([[1] * 7], "[1, 1, 1, 1")],
)
def test_what_is_no_polygon_is_refused_where_it_is_evaluated(val, mask, part):
    cfg = config(test=[with_masks(val, mask)])
    check(cfg)
    cfg.MODEL.MASK_ON = True
    message = refusal(cfg)
    assert_says(message, "'my_val'", f"annotations[1] has {part}", "no polygon", "three points")


def test_keypoints_are_refused_without_their_names(train):
    cfg = config([train.write()])
    cfg.MODEL.KEYPOINT_ON = True
    message = refusal(cfg)
    assert_says(message, "KEYPOINT_ON is True", "'my_train'", "keypoint_names", "keypoint_flip_map")


def test_ids_that_are_no_numbers_are_for_training_alone(train, val):
    for data in (train, val):
        for annotation in data.json["annotations"]:
            annotation["id"] = f"a{annotation['id']}"
    check(config([train.write()]))
    assert_says(refusal(config(test=[val.write()])), "'my_val'", "annotations[0] has id 'a")


def test_only_the_splits_in_use_are_read(train, val):
    cfg = config([train.write()], [val.write()])
    os.remove(train.triple[1])
    register_coco(cfg.DATASETS.COCO)
    check_datasets(cfg, ("TEST",))
    with pytest.raises(FileNotFoundError):
        check_datasets(cfg)
