"""Processes that are killed, hang or fail alone: all end in bounded time, and nothing is lost."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.faulty import OVERRIDES
from tests.helpers.processes import all_gone, children, finish, session, start, wait_for
from tests.helpers.training import differing, train

pytestmark = pytest.mark.slow

# MEGDET.TIMEOUT: more than a loader's worker takes to start where the machine is busy, and less
# where nothing else ends the training.
TIMEOUT = 60
SHORT = {"hung": 20}
# Beside it: torch's launcher waits 30 s before it kills, a loader's worker looks every 5 s whether
# its process lives, and the processes import for long on a small machine.
GRACE = 60


@pytest.fixture(scope="module")
def undisturbed(pool2, coco, tmp_path_factory):
    return pool2.run(train, str(tmp_path_factory.mktemp("whole")), coco, OVERRIDES, timeout=120)


def fault(name, output, coco, launcher=()):
    timeout = SHORT.get(name, TIMEOUT)
    return start(*launcher, "-m", "tests.helpers.faulty", name, output, json.dumps(coco), timeout)


def resumes(pool2, coco, output, undisturbed):
    """The rest of the run is what it would have been, bit by bit."""
    start = int(re.search(r"\d+", Path(output, "last_checkpoint").read_text())[0]) + 1
    assert start in (2, 4)  # of images that were loaded already the last step can be made
    results = pool2.run(train, str(output), coco, OVERRIDES, True, timeout=120)
    for whole, result in zip(undisturbed, results, strict=True):
        assert result["start"] == start
        assert result["images"] == whole["images"][start:]
        assert differing(result["state"], whole["state"]) == []
        assert differing(result["momentum"], whole["momentum"]) == []
    assert results[0]["loss"] == undisturbed[0]["loss"]


# Of the one that was killed, or, where that one came first, of one that missed it.
KILLED = "was ended by SIGKILL|Connection closed by peer|another process has ended"


@pytest.mark.parametrize(
    "name, said",
    [
        ("in_forward", KILLED),
        ("in_backward", KILLED),
        ("while_saving", KILLED),
        ("hung", "timed out|Timed out"),
        ("worker_stopped", "Timeout|Timed out|timed out"),
        (
            "unused_on_one_rank",
            r"Rank 1 has no gradient for roi_heads\.box_predictor\.cls_score\.weight, "
            r"roi_heads\.box_predictor\.cls_score\.bias in iteration 3.*\d+\.png, ",
        ),
        ("rpn_of_one_rank", "diverged in iteration 3, on rank 1 alone: Predicted boxes.*png"),
    ],
)
def test_in_training(pool2, coco, tmp_path, undisturbed, name, said):
    process = fault(name, tmp_path, coco)
    status, out = finish(process)
    assert status != 0 and re.search(said, out), out[-6000:]
    all_gone(process.pid, TIMEOUT + GRACE)
    assert not (tmp_path / "model_final.pth").exists()
    if name == "while_saving":
        assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    resumes(pool2, coco, tmp_path, undisturbed)


@pytest.mark.parametrize(
    "name, said",
    [
        ("in_evaluation", KILLED),
        ("error_in_evaluation", "out of luck"),
    ],
)
def test_in_evaluation(coco, tmp_path, name, said):
    process = fault(name, tmp_path, coco)
    status, out = finish(process)
    assert status != 0 and re.search(said, out), out[-6000:]
    all_gone(process.pid, TIMEOUT + GRACE)
    # saved before it began
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_the_launcher_is_killed(coco, tmp_path):
    """The ranks save and stop; nobody is left, loader workers neither."""
    process = fault("slow_steps", tmp_path, coco)
    wait_for(tmp_path / "slow", process)
    assert len(session(process.pid)) >= 5  # the launcher, two ranks, a worker each
    os.kill(process.pid, signal.SIGKILL)
    all_gone(process.pid, TIMEOUT + GRACE)
    _, out = finish(process, 10)
    assert "saved after iteration" in out, out[-6000:]
    last = int(re.search(r"\d+", Path(tmp_path, "last_checkpoint").read_text())[0])
    assert last >= 3 and not (tmp_path / "model_final.pth").exists()


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")  # fmt: skip


def test_torchrun_is_killed(coco, tmp_path):
    """Which, unlike Detectron2's launcher, does not ask the kernel to tell its processes."""
    process = fault("slow_steps", tmp_path, coco, TORCHRUN)
    wait_for(tmp_path / "slow", process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() - began < TIMEOUT + GRACE
        time.sleep(0.2)
    all_gone(process.pid, GRACE)
    _, out = finish(process, 10)
    assert f"The launcher, process {process.pid}, has gone: stopping" in out, out[-6000:]
    assert "saved after iteration" in out


def test_a_rank_of_torchrun_is_killed(coco, tmp_path):
    process = fault("in_backward", tmp_path, coco, TORCHRUN)
    status, out = finish(process)
    assert status != 0 and "SIGKILL" in out, out[-6000:]
    all_gone(process.pid, TIMEOUT + GRACE)


def test_a_disk_that_fills_up(coco, tmp_path):
    """By the second checkpoint, on a file system of its own; else covered by test_checkpoint.py."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=6m none {folder} 2>/dev/null"):
        pytest.skip("cannot mount a file system of six megabytes")
    try:
        process = fault("slow_steps", folder, coco)
        status, out = finish(process)
        assert status != 0
        assert re.search(r"could not write .*Make room in OUTPUT_DIR", out), out[-6000:]
        assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
        all_gone(process.pid, TIMEOUT + GRACE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.system(f"umount -l {folder}")
