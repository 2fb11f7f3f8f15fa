"""OUTPUT_DIR that cannot be written, and weights that cannot be downloaded, are named."""

import errno
import os

import pytest

from megdet_d2.engine import Trainer, evaluate, prepare_config
from megdet_d2.engine.disk import check_output_dir, naming_output_dir
from tests.helpers.training import config, train

FULL = "/dev/full"  # each write to it fails as on a full disk
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="needs Linux's /dev/full")


@pytest.mark.parametrize("below", ["", "a", "a/b"])
@pytest.mark.parametrize("eval_only", [False, True])
def test_a_file_in_place_of_a_folder(coco, tmp_path, below, eval_only):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / below)
    with pytest.raises(NotADirectoryError, match="OUTPUT_DIR is '.*file.*no folder; give another"):
        prepare_config(config(output, coco), eval_only)


def test_a_folder_that_may_not_be_written():
    """Of the kernel, so that root may not write to it either."""
    with pytest.raises(PermissionError, match="OUTPUT_DIR is '/proc/1/out.*may not write"):
        check_output_dir("/proc/1/out")


@pytest.mark.parametrize("folder", ["", "output/new/folder", "s3://bucket/run"])
def test_what_can_be_made_is_welcome(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    check_output_dir(folder)
    assert not os.listdir(tmp_path)


def test_only_faults_of_the_disk_are_named_anew(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "no such file", "x"), ValueError("x")):
        with pytest.raises(type(error)) as raised, naming_output_dir("out"):
            raise error
        assert raised.value is error


@needs_full
@pytest.mark.parametrize("file", ["metrics.json", "samples.csv",
                                  "inference/coco_instances_results.json"])  # fmt: skip
def test_a_disk_that_is_full_is_named(coco, tmp_path, file):
    (tmp_path / "inference").mkdir()
    (tmp_path / file).symlink_to(FULL)
    with pytest.raises(OSError, match="OUTPUT_DIR") as error:
        train(0, str(tmp_path), coco, ("DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 2))
    assert error.value.errno == errno.ENOSPC
    for words in (str(tmp_path), "No space left on device", "Make room", "--resume"):
        assert words in str(error.value)


@needs_full
def test_a_disk_that_is_full_in_an_evaluation(coco, tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "coco_instances_results.json").symlink_to(FULL)
    cfg = config(tmp_path, coco, "DATASETS.TEST", ("mixed",))
    prepare_config(cfg, eval_only=True)
    with pytest.raises(OSError, match="could not write .*No space left.*in OUTPUT_DIR"):
        evaluate(cfg)


def test_weights_without_a_network(coco, tmp_path, port):
    address = f"http://127.0.0.1:{port}/R-50.pkl?matching_heuristics=True"  # no server
    cfg = config(tmp_path, coco, "MODEL.WEIGHTS", address)
    prepare_config(cfg)
    trainer = Trainer(cfg)
    for load in (lambda: trainer.resume_or_load(False), lambda: evaluate(cfg)):
        with pytest.raises(OSError, match="MODEL.WEIGHTS is 'http.*could not be downloaded") as e:
            load()
        assert "Download http://127.0.0.1" in str(e.value) and "path of the file" in str(e.value)
