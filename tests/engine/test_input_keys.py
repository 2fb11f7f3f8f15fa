"""Tests the warnings about image sizes and colours that contradict one another."""

import pytest

import megdet_d2
from megdet_d2.engine import prepare_config
from megdet_d2.engine.input_keys import IMAGENET_MEAN, find_input_faults
from tests.helpers.coco_data import assert_says
from tests.helpers.paths import ROOT
from tests.helpers.training import config, write_images

MEAN = list(IMAGENET_MEAN)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("INPUT.MIN_SIZE_TRAIN", (800, 1600)), ["MIN_SIZE_TRAIN is (800, 1600)", "1600 or more"]),
        (
            ("INPUT.MIN_SIZE_TEST", 1600, "INPUT.MIN_SIZE_TRAIN", (0,)),
            ["MIN_SIZE_TEST is 1600", "MAX_SIZE_TEST 1333", "2133"],
        ),
        (("INPUT.MIN_SIZE_TRAIN", (800, 1333)), []),
        (("INPUT.MIN_SIZE_TRAIN", (0,)), []),
        (("INPUT.MIN_SIZE_TEST", 0), []),
        (("INPUT.MIN_SIZE_TRAIN", (1200, 1333)), ["MIN_SIZE_TEST is 800", "0.67 times", "ST 1200"]),
        (("INPUT.MIN_SIZE_TRAIN", (480, 560)), ["(480, 560)", "1.4 times as large", "TEST 560"]),
        (("INPUT.MIN_SIZE_TRAIN", (640, 672)), []),
        (("INPUT.FORMAT", "RGB"), ["INPUT.FORMAT is 'RGB'", "[123.675, 116.28, 103.53]"]),
        (("MODEL.PIXEL_MEAN", MEAN[::-1]), ["INPUT.FORMAT is 'BGR'", "in the order RGB"]),
        (("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", MEAN[::-1]), []),
        (("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [120.0, 120.0, 120.0]), []),
        (("MODEL.PIXEL_MEAN", [0.4, 0.5, 0.5]), ["PIXEL_MEAN is [0.4, 0.5, 0.5]", "255 times"]),
        (("MODEL.PIXEL_STD", [0.2, 0.2, 0.2]), ["PIXEL_STD [0.2, 0.2, 0.2]", "from 0 to 1"]),
        (("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0], "MODEL.PIXEL_STD", [255.0] * 3), []),
        (("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [120.0]), []),
    ],
)
def test_sizes_and_colours_that_contradict_one_another(tmp_path, keys, said):
    sizes = ("INPUT.MIN_SIZE_TRAIN", (800,), "INPUT.MAX_SIZE_TRAIN", 1333,
             "INPUT.MIN_SIZE_TEST", 800, "INPUT.MAX_SIZE_TEST", 1333)  # fmt: skip
    found = list(find_input_faults(config(tmp_path, [], "MODEL.PIXEL_MEAN", MEAN, *sizes, *keys)))
    assert len(found) == bool(said) and all(finding.level == "warning" for finding in found)
    assert_says("".join(map(str, found)), *said)


def test_a_training_warns_of_both_splits_and_an_evaluation_of_its_own(tmp_path, caplog):
    coco = write_images(tmp_path, images=16)
    sizes = ("INPUT.MIN_SIZE_TRAIN", (900,), "INPUT.MAX_SIZE_TRAIN", 800,
             "INPUT.MIN_SIZE_TEST", 900, "INPUT.MAX_SIZE_TEST", 800)  # fmt: skip
    prepare_config(config(tmp_path, coco, *sizes))
    assert "MIN_SIZE_TRAIN is (900,)" in caplog.text and "MIN_SIZE_TEST is 900" in caplog.text
    caplog.clear()
    prepare_config(config(tmp_path, coco, *sizes), eval_only=True)
    assert "MIN_SIZE_TRAIN" not in caplog.text and "MIN_SIZE_TEST is 900" in caplog.text


def test_configs_of_this_project_need_no_warning():
    folders = ("COCO-Detection", "Digits-Detection", "challenge")
    paths = [path for folder in folders for path in (ROOT / "configs" / folder).glob("*.yaml")]
    assert len(paths) > 20
    for path in paths:
        assert list(find_input_faults(megdet_d2.load_config(str(path)))) == [], path
