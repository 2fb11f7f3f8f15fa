"""Tests megdet check from its words to its page and its status."""

import contextlib
import json

import pytest

from megdet_d2.check import boxes
from megdet_d2.cli import main
from megdet_d2.data import coco as coco_module
from tests.helpers.coco_data import Data
from tests.helpers.paths import TINY
from tests.helpers.runs import needs_demo_extra, pixels

MODEL = ["--config", str(TINY), "MODEL.ROI_HEADS.NUM_CLASSES", "3", "SOLVER.IMS_PER_BATCH", "1",
         "MEGDET.EPOCHS", "400.0", "MEGDET.DECAY_EPOCHS", "(300,)"]  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the page goes to output/check by default
    return Data(tmp_path, "train")


def run(data, *words):
    main(["check", str(data.write().path), str(data.root), *map(str, words)])


def refused(data, *words):
    with pytest.raises(SystemExit) as error:
        run(data, *words)
    assert error.value.code == 1


def as_json(data, capsys, *words, status=0):
    (refused if status else run)(data, "--json", *words)
    return json.loads(capsys.readouterr().out)


@needs_demo_extra
def test_a_right_data_set_has_a_page_and_status_0(data, tmp_path, capsys):
    run(data, *MODEL)
    out = capsys.readouterr().out
    assert "A training would start. Kinds of errors: 0, of warnings:" in out
    page = (tmp_path / "output/check/train/check.html").read_text()
    assert str(tmp_path / "output/check/train/check.html").endswith(out.split("Page: ")[1].strip())
    for part in ("cat", "dog", "owl", "Schedule", "800", "IoU with the best anchor", "<img"):
        assert part in page
    drawn = pixels(tmp_path / "output/check/train/samples.png")
    data.json["annotations"].clear()
    refused(data, *MODEL, "--output", tmp_path / "empty")
    assert (pixels(tmp_path / "empty/samples.png") != drawn).any()  # the boxes are gone


def test_everything_wrong_is_listed_at_once_with_ids_and_counts(data, capsys):
    first, second, third = data.json["annotations"]
    first["category_id"], second["image_id"] = 77, 99
    third["bbox"] = [0, 0, -4, 4]
    data.json["images"].append({"id": 11, "file_name": "gone.png", "width": 64, "height": 48})
    refused(data, "--output", "page")
    out = capsys.readouterr().out
    for part in ("category_id", "77", "image_id", "99", "bbox", "gone.png", "1 of 3 annotations"):
        assert part in out
    assert out.count("error: ") >= 4 and "A training would be refused" in out
    page = open("page/check.html").read()
    assert "gone.png" in page and "1 of 3 annotations" in page


def test_json_has_the_findings_the_classes_and_the_schedule(data, tmp_path, capsys):
    found = as_json(data, capsys, *MODEL)
    assert (found["refused"], found["images"], found["annotations"]) == (False, 2, 3)
    assert [(c["class"], c["objects"], c["images"]) for c in found["classes"]] == [
        ("cat", "1", "1"), ("dog", "1", "1"), ("owl", "1", "1"),
    ]  # fmt: skip
    schedule = found["schedule"]
    assert (schedule["iterations"], schedule["epochs"]) == (800, 400)
    assert schedule["images per epoch"] == 2
    assert schedule["learning rate"] == pytest.approx(0.02 / 16)
    assert not (tmp_path / "output").exists()

    data.json["annotations"][0]["category_id"] = 77
    found = as_json(data, capsys, *MODEL, status=1)
    (error,) = [f for f in found["findings"] if f["level"] == "error"]
    assert (error["ids"], error["count"], error["num_rows"]) == ([1], 1, 3)


@pytest.mark.parametrize(
    "override, message",
    [
        (("MODEL.ROI_HEADS.NUM_CLASSES", 80), "NUM_CLASSES is 80"),
        (("MEGDET.DECAY_EPOCHS", "(500,)"), "MEGDET.DECAY_EPOCHS is"),
        (("MODEL.WEIGHTS", "none.pkl"), "there is no file 'none.pkl'"),
        (("MEGDET.ON_DIVERGENCE", "pray"), "ON_DIVERGENCE is 'pray'"),
    ],
)
def test_a_config_that_training_refuses_is_refused(data, capsys, override, message):
    found = as_json(data, capsys, *MODEL, *override, status=1)
    problems = [f["problem"] for f in found["findings"] if f["level"] == "error"]
    assert len(problems) == 1 and message in problems[0]


def test_without_a_config_its_keys_are_not_checked(data, capsys):
    found = as_json(data, capsys)
    assert found["findings"] == [] and found["schedule"] == {}


def test_a_short_schedule_is_a_warning_with_advice(data, capsys):
    words = ("MEGDET.EPOCHS", "4.0", "MEGDET.DECAY_EPOCHS", "(3,)")
    found = as_json(data, capsys, *MODEL, *words)
    (short,) = [f for f in found["findings"] if f["kind"] == "few-iterations"]
    assert "8 iterations" in short["problem"] and "MEGDET.EPOCHS" in short["fix"]


def test_what_only_an_evaluation_needs_is_a_warning(data, capsys):
    for annotation in data.json["annotations"]:
        del annotation["area"]
    found = as_json(data, capsys)
    (warning,) = found["findings"]
    assert (warning["level"], warning["ids"]) == ("warning", [1, 2, 3])
    assert "area" in warning["problem"] and warning["where"] == "As a test set"


def test_boxes_far_from_the_anchors_are_a_warning_with_sizes_that_fit(data, capsys):
    found = as_json(
        data, capsys, *MODEL, "MODEL.ANCHOR_GENERATOR.SIZES", "[[200],[300],[400],[500]]"
    )
    (warning,) = [f for f in found["findings"] if f["kind"] == "anchors"]
    assert "100% of the boxes" in warning["problem"]
    sizes = warning["fix"].removeprefix("try ").partition("]],")[0] + "]]"
    fixed = as_json(data, capsys, *MODEL, "MODEL.ANCHOR_GENERATOR.SIZES", sizes)
    assert not [f for f in fixed["findings"] if f["kind"] == "anchors"]
    # FCOS and others have none.
    assert "IoU with the best anchor" not in str(
        as_json(data, capsys, *MODEL, "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    )


def test_the_ious_are_those_of_the_definition(data):
    from megdet_d2 import load_config

    cfg = load_config(TINY, ["INPUT.MIN_SIZE_TRAIN", "(96,)"])  # images of 48 px: twice as large
    cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[40]], [[1.0]]
    measured = boxes.measure_boxes(cfg, data.json)
    assert measured.in_model.tolist() == [[40, 20], [32, 80], [128, 96]]
    assert measured.best_ious == pytest.approx(
        [800 / 1600, 32 * 40 / (32 * 80 + 1600 - 32 * 40), 1600 / (128 * 96)]
    )


@needs_demo_extra
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": 3}', '{"images": [3]}'])
def test_a_json_that_is_no_coco_is_refused_without_a_traceback(data, capsys, content):
    data.write = lambda: data.path.write_text(content) and data or data
    refused(data, *MODEL)
    assert "A training would be refused" in capsys.readouterr().out


@pytest.mark.parametrize("value", [None, "x", -1, 1e999, [1], {"a": 1}, True, [[1, 2, 3, 4]]])
@pytest.mark.parametrize("rows", ["images", "annotations", "categories"])
def test_whatever_a_value_is_it_is_a_finding(data, capsys, rows, value):
    found = []
    for key in list(data.json[rows][0]):
        right = data.json[rows][0][key]
        data.json[rows][0][key] = value
        with contextlib.suppress(SystemExit):
            run(data, "--json", "MODEL.MASK_ON", "True")
        found.append(json.loads(capsys.readouterr().out)["findings"])
        data.json[rows][0][key] = right
    assert all(found)


def test_an_image_may_have_two_faults(data, capsys):
    del data.json["images"][0]["id"]
    (data.root / data.json["images"][0]["file_name"]).unlink()
    kinds = {f["kind"] for f in as_json(data, capsys, status=1)["findings"]}
    assert "missing-file-image" in kinds and len(kinds) > 1


def test_files_that_are_not_there_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["check", "none.json", "nowhere"])
    out = capsys.readouterr().out
    assert error.value.code == 1 and "none.json" in out and "nowhere" in out


@needs_demo_extra
@pytest.mark.parametrize("box", [None, "x", [1, 2], [1, 2, "3", 4], [0, 0, 1e999, 3], {"x": 1}])
def test_a_page_is_drawn_whatever_a_box_is(data, tmp_path, box):
    data.json["annotations"][0]["bbox"] = box
    data.json["annotations"][1]["image_id"] = [5]
    data.json["categories"][0]["name"] = r"$\frac{a$"
    refused(data, *MODEL)
    assert (tmp_path / "output/check/train/samples.png").is_file()


def test_the_catalogs_stay_as_they_were(data, monkeypatch):
    from detectron2.data import DatasetCatalog

    before = set(DatasetCatalog.list()), dict(coco_module._registered)
    run(data, "--json")
    assert (set(DatasetCatalog.list()), coco_module._registered) == before
