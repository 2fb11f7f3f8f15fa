"""megdet plan CONFIG as a user types it, its data and devices, and the launch line it prints."""

import contextlib
import io
import json
import re
import shlex
from dataclasses import asdict, replace

import pytest

import megdet_cli
from megdet_d2.config import load_config
from megdet_d2.planner import hardware
from megdet_d2.planner.flops import count
from megdet_d2.planner.training_images import count_images, mean_megapixels
from tests.helpers.paths import CONFIGS, TINY
from tests.helpers.processes import finish, start
from tests.helpers.training import write_images


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def words_of(coco, output) -> list[str]:
    return [
        "DATASETS.COCO", json.dumps(coco), "DATASETS.TRAIN", '["mixed"]', "DATASETS.TEST", "[]",
        "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MEGDET.EPOCHS", "2.0", "OUTPUT_DIR", str(output),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def planned(coco, tmp_path_factory):
    """The plan of the tiny config for 2 processes, as json."""
    output, text = tmp_path_factory.mktemp("run"), io.StringIO()
    line = ["plan", TINY, "--json", "--gpus", "2", "--target-batch", "8", "--gpu-memory", "4"]
    with contextlib.redirect_stdout(text):
        megdet_cli.main([*line, *words_of(coco, output), "MEGDET.ACCUMULATION_STEPS", "2"])
    return output, json.loads(text.getvalue())


@pytest.mark.slow
def test_a_plan_of_a_config(planned):
    _, found = planned
    introduction = "\n".join(found["introduction"])
    assert "24 images per epoch" in introduction and "60 layers of CGBN" in introduction
    assert "Scaled by arithmetic" in introduction and "4 GB each" in introduction
    (row,) = found["settings"]
    assert (row["images_per_gpu"], row["micro_batches"], row["bn_size"]) == (2, 2, 4)
    assert row["resolved"]["iterations"] == 6 and row["resolved"]["lr"] == 0.01
    parts = dict(row["memory"])
    assert parts.pop("total") == sum(parts.values()) > 0
    assert "BN size 4 is under 16: the AP falls (Table 3)" in row["warnings"]
    assert set(row["step"]) >= {"compute", "norm", "gradients"}


@pytest.mark.slow
def test_the_launch_line_works_as_typed(planned):
    """The printed line starts a training, which takes just this mini-batch and schedule."""
    output, found = planned
    python, *script = shlex.split(found["settings"][0]["launch"])
    assert python == "python"
    # Another run of this user may have Detectron2's port.
    script[1:1] = ["--dist-url", "auto"]
    status, log = finish(start(*script))
    assert status == 0, log
    trained = load_config(output / "config.yaml")
    assert (trained.SOLVER.IMS_PER_BATCH, trained.MEGDET.ACCUMULATION_STEPS) == (8, 2)
    assert (trained.SOLVER.MAX_ITER, trained.SOLVER.BASE_LR) == (6, 0.01)
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert max(row["images_seen"] for row in rows if "images_seen" in row) == 6 * 8
    assert re.search(r"CGBN: \d+ layers, each over 4 images on 2 processes", log)


def test_the_images_of_a_users_json(coco):
    cfg = load_config(TINY, words_of(coco, "x"))
    found = count_images(cfg)
    assert (found.count, found.test, found.notes) == (24, 0, ())
    assert found.megapixels == pytest.approx(64 * 64 * 4 / 3 / 1e6)
    assert count_images(cfg, 500).count == 500


def test_the_images_of_test_time_augmentation(coco):
    words = [*words_of(coco, "x"), "DATASETS.TEST", '["mixed"]', "TEST.AUG.MIN_SIZES", "[30, 60]"]
    assert count_images(load_config(TINY, words)).augmented_megapixels == 0
    words += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MAX_SIZE", "60"]
    found = count_images(load_config(TINY, words))
    # Images of 4:3, mirrored too. A longer side of 60 bounds the second size.
    assert found.augmented_megapixels == pytest.approx(2 * (30 * 40 + 45 * 60) / 1e6)
    cfg = load_config(TINY, [*words, "INPUT.RANDOM_FLIP", "none"])
    assert count_images(cfg).augmented_megapixels == pytest.approx(found.augmented_megapixels / 2)


def test_data_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = load_config(CONFIGS / "COCO-Detection/megdet_R50_FPN_b16_normal.yaml")
    found = count_images(cfg)
    assert (found.count, found.test) == (118_000, 5000)
    assert "is not on this machine: an epoch is counted as 118,000 images" in found.notes[0]
    cfg.MEGDET.EPOCH_IMAGES = 0
    found = count_images(cfg)
    assert found.count == 118_287 and "COCO's train2017" in found.notes[0]
    own = load_config(TINY, words_of([["mixed", str(tmp_path / "no.json"), "x"]], "x"))
    with pytest.raises(FileNotFoundError, match="To plan without the data, give --images"):
        count_images(own)
    assert count_images(own, 300).count == 300


def test_mean_size():
    assert mean_megapixels([], 800, 1333) == pytest.approx(0.884, abs=1e-3)
    assert mean_megapixels([(480, 640), (640, 480)], 600, 1333) == pytest.approx(0.48)
    assert mean_megapixels([(100, 1000)], 800, 1000) == pytest.approx(0.1)
    assert mean_megapixels([(10, 20)], 0, 99) == pytest.approx(200e-6)


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("NVIDIA A40", "A40"),
        ("Tesla V100-SXM2-16GB", "V100-SXM-16GB"),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_the_gpu_here_is_found_among_the_presets(device, name):
    assert hardware.match(device) == name


def test_presets():
    zoo = hardware.presets()["V100-SXM-16GB"]
    assert zoo.memory == 16e9 and zoo.seconds_per_image == pytest.approx(0.1, rel=0.01)
    assert hardware.presets()["A40"].memory == 48e9
    with pytest.raises(ValueError, match="does not tell its memory; give --gpu-memory"):
        hardware.gigabytes("Z9")


def test_a_measured_file_is_read_as_it_was_written(tmp_path):
    measured = replace(hardware.presets()["A40"], slots=2, loader=50.0, config="a.yaml")
    path = measured.write(tmp_path / "new/hardware.json")
    assert hardware.find(str(path)) == (measured, "")
    assert (measured.sharing(1), measured.sharing(8), measured.memory_of_one(2)) == (1, 4, 24e9)
    for change, message in (
        ({"seconds_per_image": 0}, "seconds_per_image is 0; give a number above 0"),
        ({"flops": "many"}, "flops is 'many'"),
        ({"extra": 1}, "is no file of --measure"),
        ({"inside": {}}, "is no file of --measure"),
    ):
        path.write_text(json.dumps(asdict(measured) | change))
        with pytest.raises(ValueError, match=message):
            hardware.find(str(path))
    path.write_text("[")
    with pytest.raises(ValueError, match="is no file of --measure"):
        hardware.find(str(path))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        hardware.find("nowhere.json")
    with pytest.raises(ValueError, match="--hardware A99 is not in MLPerf's table; use one of"):
        hardware.find("A99")


def test_arithmetic_of_a_model():
    cfg = load_config(TINY)
    plain, again = count(cfg, 0.004), count(cfg, 0.004, ("res3", "res4"))
    assert plain.layers == 60 and plain.parameters == again.parameters > 300_000
    assert {"stem", "res2", "fpn", "rpn", "roi_heads"} <= set(plain.stages)
    assert 1.02 < again.step / plain.step < 1.3


def test_keys_that_only_the_machines_of_the_training_can_check(capsys):
    """No machine has these GPUs."""
    words = ["MODEL.DEVICE", "cuda", "MEGDET.AUTO_MICRO_BATCH", "True", "MODEL.CGBN.BN_SIZE", "8"]
    words += ["TEST.BACKGROUND", "True", "TEST.BACKGROUND_DEVICE", "cuda:99"]
    words += ["SOLVER.SGD_IMPLEMENTATION", "fused"]
    megdet_cli.main(["plan", TINY, "--gpus", "2", "--target-batch", "8", "--rows", "1", *words])
    out = capsys.readouterr().out
    assert "those before the last run beside the training" in out and "\n1: python " in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0"], "--gpus is 0; give a number above 0"),
        (["--machines", "1,2"], "--machines 1,2: a config is planned for one number"),
        (["--gpu-memory", "-1"], "--gpu-memory is -1"),
        (["--images", "0"], "--images is 0"),
        (["--variation", "-1"], "--variation is -1; give 0 or more"),
        (["MODEL.CGBN.ALGORITHM", "three"], "MODEL.CGBN.ALGORITHM is 'three'"),
        (["MODEL.NO", "1"], "Non-existent key: MODEL.NO"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(SystemExit) as error:
        megdet_cli.main(["plan", TINY, *words])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_not_there():
    with pytest.raises(SystemExit, match="there is no config no.yaml"):
        megdet_cli.main(["plan", "no.yaml"])
