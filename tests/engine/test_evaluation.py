"""Tests the evaluation of several test sets."""

import json
import math
from pathlib import Path

import pytest

from megdet_d2.engine import prepare_config
from megdet_d2.report import command as report
from megdet_d2.report.run import Run
from tests.helpers import training

pytestmark = pytest.mark.usefixtures("datasets_root")


@pytest.fixture(scope="module")
def two_test_sets(tmp_path_factory):
    """A training that is evaluated on two sets: of small objects, and of medium ones."""
    output, coco = tmp_path_factory.mktemp("two_test_sets"), []
    for name, shift, side in (("mixed", 0, 20), ("other", 100, 40)):
        folder = tmp_path_factory.mktemp(name)
        ((_, path, root),) = training.write_images(folder, images=8)
        content = json.loads(Path(path).read_text())
        for image in content["images"]:
            image["id"] += shift
        for annotation in content["annotations"]:
            annotation["image_id"] += shift
            annotation |= {"bbox": [4, 4, side, side], "area": side**2}
        Path(path).write_text(json.dumps(content))
        coco.append([name, path, root])
    overrides = ("DATASETS.TEST", ("mixed", "other"))
    rows = training.train(0, str(output), coco, overrides)["rows"]
    cfg = training.config(output, coco, *overrides)
    prepare_config(cfg)
    (output / "config.yaml").write_text(cfg.dump())
    return output, rows


def test_each_test_set_has_a_folder_of_its_own(two_test_sets):
    output, _ = two_test_sets
    for name, ids in (("mixed", range(1, 9)), ("other", range(101, 109))):
        found = training.read_detections(output, f"inference/{name}")
        assert {image for image, *_ in found} == set(ids)


def test_the_ap_of_a_run_is_of_the_first_of_its_test_sets(two_test_sets):
    output, rows = two_test_sets
    run = Run.read(output)
    assert run.final() == rows[-1]["mixed/bbox/AP"]
    assert math.isfinite(run.final("APs")) and math.isnan(run.final("APm"))
    assert math.isfinite(rows[-1]["other/bbox/APm"])


def test_detections_of_the_first_test_set_are_drawn(two_test_sets):
    pytest.importorskip("matplotlib", reason="the report needs the demo extra")
    picture = report.draw_detections(
        two_test_sets[0], two_test_sets[0] / "detections.png", num_images=2
    )
    assert picture.stat().st_size > 10_000
