"""Tests the evaluation of several test sets."""

import json
import math
from pathlib import Path

import pytest

from megdet_d2.cli import main
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


@pytest.fixture
def test_dev(tmp_path):
    """A training evaluated on a set without annotations, as of a challenge; and on one with."""
    coco = training.write_images(tmp_path, images=8)
    content = json.loads(Path(coco[0][1]).read_text())
    del content["annotations"]
    (tmp_path / "dev.json").write_text(json.dumps(content))
    return [*coco, ["dev", str(tmp_path / "dev.json"), coco[0][2]]]


@pytest.mark.parametrize("sets", [("dev",), ("dev", "mixed"), ("mixed", "dev")])
def test_a_test_set_without_annotations_has_results_and_no_ap(test_dev, tmp_path, sets):
    output = tmp_path / "out"
    rows = training.train(0, str(output), test_dev, ("DATASETS.TEST", sets))["rows"]
    folder = "inference/dev" if len(sets) > 1 else "inference"
    assert {image for image, *_ in training.read_detections(output, folder)} == set(range(1, 9))
    prefix = "mixed/bbox/AP" if len(sets) > 1 else "none"
    assert [key for key in rows[-1] if key.endswith("bbox/AP")] == [prefix] * (len(sets) - 1)


def test_a_run_on_a_set_without_annotations_has_a_page(test_dev, tmp_path):
    pytest.importorskip("matplotlib", reason="the report needs the demo extra")
    output = tmp_path / "out"
    training.train(0, str(output), test_dev, ("DATASETS.TEST", ("dev",)))
    (output / "config.yaml").write_text(
        training.config(output, test_dev, "DATASETS.TEST", ("dev",)).dump()
    )
    main(["report", str(output), "--images", "1"])
    assert (output / "detections.png").is_file()
