"""A run that was stopped goes on as if it had not been."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megdet_d2.engine.metrics import cut_metrics
from megdet_d2.engine.progress import Layout, describe_resume, updates_done
from megdet_d2.engine.signals import REQUEUE
from tests.helpers.paths import TINY, TRAIN_NET
from tests.helpers.training import copy_checkpoint, differing, read_rows, train, write_images


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("mixed"))


def same(whole, resumed):
    """The resumed run is the rest of the whole one, bit by bit, in every process."""
    start = resumed[0]["start"]
    for rank, (a, b) in enumerate(zip(whole, resumed, strict=True)):
        assert b["images"] == a["images"][start:], f"rank {rank} sees other images"
        assert differing(a["state"], b["state"]) == [], f"rank {rank}"
        assert differing(a["momentum"], b["momentum"]) == [], f"rank {rank}"
        assert b["images_seen"] == a["images_seen"]
        assert b["lr"] == a["lr"]
    assert resumed[0]["loss"] == whole[0]["loss"]
    assert resumed[0]["rows"] == whole[0]["rows"]


@pytest.fixture(scope="module")
def four(pool4, coco, tmp_path_factory):
    """Four processes in groups of two, never stopped: 2 epochs of 24 images, 8 an update."""
    output = str(tmp_path_factory.mktemp("four"))
    overrides = ("MODEL.CGBN.BN_SIZE", 4)
    return output, pool4.run(train, output, coco, overrides, timeout=240)


@pytest.mark.parametrize("stopped_after", [0, 3])
def test_resumed_in_groups_smaller_than_the_world(pool4, coco, four, tmp_path, stopped_after):
    whole, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, f"model_{stopped_after:07d}.pth")
    resumed = pool4.run(train, output, coco, ("MODEL.CGBN.BN_SIZE", 4), True, timeout=240)
    assert resumed[0]["start"] == stopped_after + 1
    same(result, resumed)
    # the groups have seen different images, and each has its own statistics
    assert differing(resumed[0]["state"], resumed[1]["state"]) == []
    assert differing(resumed[0]["state"], resumed[2]["state"])


def test_a_micro_batch_is_of_one_orientation(four, coco):
    images = json.loads(Path(coco[0][1]).read_text())["images"]
    wide = {image["id"]: image["width"] > image["height"] for image in images}
    batches = [[wide[i] for i, _ in batch] for rank in four[1] for batch in rank["images"]]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert {batch[0] for batch in batches} == {True, False}


def test_a_random_seed_is_one_for_all_processes(pool2, coco, tmp_path):
    """Or they would draw from streams of their own, some images twice an epoch and some not."""
    overrides = ("SEED", -1, "DATALOADER.ASPECT_RATIO_GROUPING", False, "MEGDET.EPOCHS", 1.0,
                 "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", ())  # fmt: skip
    results = pool2.run(train, str(tmp_path), coco, overrides, timeout=120)
    seen = [i for rank in results for batch in rank["images"] for i, _ in batch]
    assert sorted(seen) == list(range(1, 25))


def test_a_signal_in_the_last_step_ends_training_as_ever(coco, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]

    def fault(trainer):
        def send(module, inputs):
            if trainer.iter == trainer.max_iter - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.model.register_forward_pre_hook(send)

    train(0, str(tmp_path), coco, ("SOLVER.CHECKPOINT_PERIOD", 100), fault=fault)
    assert (tmp_path / "model_final.pth").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_resumed_from_any_iteration_with_other_workers(coco, tmp_path):
    """One process; a random seed, which the checkpoint has."""
    whole = str(tmp_path / "whole")
    result = train(0, whole, coco, ("SEED", -1))
    for stopped_after, workers in [(0, 0), (1, 3), (2, 0), (4, 2)]:
        output = str(tmp_path / str(stopped_after))
        copy_checkpoint(whole, output, f"model_{stopped_after:07d}.pth")
        overrides = ("SEED", -1, "DATALOADER.NUM_WORKERS", workers)
        same([result], [train(0, output, coco, overrides, True)])


def test_retinanets_normalizer_goes_on(coco, tmp_path):
    """A moving average that is in no state_dict."""
    overrides = (
        "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 1,
        "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
        "MODEL.RETINANET.IN_FEATURES", ("p3", "p4", "p5", "p6", "p7"),
        "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [24], [32], [48]],
        "MODEL.RETINANET.NUM_CONVS", 1, "SOLVER.IMS_PER_BATCH", 4, "MEGDET.EPOCHS", 0.5,
        "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (), "MEGDET.WARMUP_EPOCHS", 0.0,
    )  # fmt: skip
    result = train(0, str(tmp_path / "whole"), coco, overrides)
    copy_checkpoint(str(tmp_path / "whole"), str(tmp_path / "resumed"), "model_0000000.pth")
    same([result], [train(0, str(tmp_path / "resumed"), coco, overrides, True)])


# --- another mini-batch --------------------------------------------------------------------------


def test_another_world_batch_and_accumulation(coco, four, tmp_path, caplog):
    """Four processes of two images become one of two micro-batches of three, after an update."""
    whole, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, "model_0000000.pth")
    overrides = ("SOLVER.IMS_PER_BATCH", 6, "MEGDET.ACCUMULATION_STEPS", 2)
    with caplog.at_level("INFO", "megdet_d2"):
        resumed = train(0, output, coco, overrides, True)

    assert resumed["start"] == 2  # 8 images are 1.33 updates of 6
    assert resumed["images_seen"] == 8 + 6 * (8 - 2)
    first = [image for rank in result for image, _ in rank["images"][0]]
    rest = [image for batch in resumed["images"] for image, _ in batch]
    # The order between epochs' ends depends on the grouping: nothing twice before all came once.
    assert len(first) == 8 and len(set(first)) == 8
    held = torch.load(f"{output}/model_final.pth")["progress"]["stream"]["pending"]
    counts = {i: (first + rest).count(i) + [j + 1 for _, j in held].count(i) for i in range(1, 25)}
    assert sum(counts.values()) == 44 + len(held) and set(counts.values()) <= {1, 2}

    # The rule's learning rate, warmed up over 12 images = 2 updates, decayed after an epoch = 4.
    assert resumed["lr"] == pytest.approx(
        {2: 0.0075, 3: 0.0075, 4: 0.00075, 5: 0.00075, 6: 0.00075, 7: 0.00075}
    )
    table = re.sub(r" +", " ", caplog.text)
    for row in (
        "| processes | 4 | 1 |", "| images per GPU and micro-batch | 2 | 3 |",
        "| MEGDET.ACCUMULATION_STEPS | 1 | 2 |", "| SOLVER.IMS_PER_BATCH | 8 | 6 |",
        "| SOLVER.BASE_LR | 0.01 | 0.0075 |", "| iterations done | 1 | 2 |",
        "the schedule continues 4 images ahead of the data",
    ):  # fmt: skip
        assert row in table, row
    # and back again, from the middle of that
    again = str(tmp_path / "again")
    copy_checkpoint(output, again, "model_0000003.pth")
    back = train(0, again, coco, (), True)
    assert back["start"] == 3 and back["images_seen"] == 20 + 8 * 3  # 20 images are 2.5 updates
    assert [row["images_seen"] for row in back["rows"] if "images_seen" in row][-1] == 44


def test_the_same_mini_batch_on_other_processes_keeps_the_schedule(coco, four, tmp_path):
    whole, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, "model_0000001.pth")
    resumed = train(0, output, coco, ("MEGDET.ACCUMULATION_STEPS", 4), True)
    assert resumed["start"] == 2 and resumed["images_seen"] == 48
    # The micro-batches of two are the four processes' in turn: to the pixel the same.
    expected = [rank["images"][step] for step in range(2, 6) for rank in result]
    assert resumed["images"] == expected
    assert resumed["lr"] == result[0]["lr"]


def test_without_a_policy_the_schedule_is_left_alone(coco, four, tmp_path, caplog):
    output = str(tmp_path / "resumed")
    copy_checkpoint(four[0], output, "model_0000003.pth")
    overrides = (
        "MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR",
        0.5, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (),
    )  # fmt: skip
    resumed = train(0, output, coco, overrides, True)
    assert resumed["start"] == 4 and resumed["images_seen"] == 32 + 4
    assert max(resumed["lr"].values()) < 0.02
    assert 'MEGDET.POLICY is "", so the learning rate and the iteration continue' in caplog.text


def test_a_checkpoint_of_detectron2s_own_trainer(coco, four, tmp_path, caplog):
    output = str(tmp_path / "resumed")
    os.makedirs(output)
    state = torch.load(f"{four[0]}/model_0000003.pth")
    del state["progress"], state["processes"]
    torch.save(state, f"{output}/model_0000003.pth")
    Path(output, "last_checkpoint").write_text("model_0000003.pth")
    resumed = train(0, output, coco, (), True)
    assert resumed["start"] == 4 and resumed["images_seen"] == 48
    assert "taking its 4 iterations for 32 images" in caplog.text


def test_nothing_changed_is_not_worth_a_table():
    layout = Layout(4, 1, 2)
    assert describe_resume(layout, layout, 16, (2, 2), (0.01, 0.01)) == ""
    other = Layout(2, 1, 4)
    table = describe_resume(layout, other, 16, (2, 2), (0.01, 0.01))
    assert "IMS_PER_BATCH" not in table and "processes" in table and "ahead" not in table
    assert [updates_done(n, 8) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [
        {"iteration": 19, "images_seen": 160}, {"iteration": 39, "images_seen": 320},
        {"iteration": 15, "images_seen": 336}, {"iteration": 17, "bbox/AP": 1.0},
        {"iteration": 19, "images_seen": 400},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"iteration": 2')
    with path.open("a") as writer:  # as Detectron2's, which opened it before
        cut_metrics(str(path), 16, 352)
        writer.write(json.dumps({"iteration": 18}) + "\n")
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left == rows[:3] + [{"iteration": 18}]
    cut_metrics(str(path), 99, 9999)
    assert [json.loads(line) for line in path.read_text().splitlines()] == left
    cut_metrics(str(tmp_path / "none.json"), 1, 1)


# --- killed and told to stop, for real -----------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


_started: list[int] = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    for group in _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    _started.clear()


def command(output, coco, *overrides, processes=2, launcher=()):
    flags = () if launcher else ("--num-gpus", str(processes), "--dist-url", "auto")
    return [
        sys.executable, "-W", "ignore", *launcher, TRAIN_NET, "--config-file", TINY, *flags,
        "DATASETS.COCO", repr(coco), "DATASETS.TRAIN", "('mixed',)", "DATASETS.TEST", "()",
        "MODEL.ROI_HEADS.NUM_CLASSES", "1", "TEST.EVAL_PERIOD", "0", "MEGDET.EPOCHS", "3.0",
        "OUTPUT_DIR", str(output), *overrides,
    ]  # fmt: skip


def insert_resume(command):
    at = command.index("--config-file")
    return [*command[:at], "--resume", *command[at:]]


def finish(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def start(command, output, until):
    """Runs the command until a file is there, in a process group of its own; it itself."""
    with open(Path(output, "said.txt"), "w") as said:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    _started.append(process.pid)
    deadline = time.monotonic() + 240
    while not Path(output, until).exists():
        assert process.poll() is None and time.monotonic() < deadline, last_words(output)
        time.sleep(0.05)
    return process


def last_words(output):
    return Path(output, "said.txt").read_text()


def children(pid):
    """Processes that a process has started, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if (
            int(fields[1]) == pid
            and b"resource_tracker" not in (stat.parent / "cmdline").read_bytes()
        ):
            found.append(int(stat.parent.name))
    return sorted(found)


def final(output):
    state = torch.load(Path(output, "model_final.pth"))
    return state["model"], state["trainer"]["_trainer"]["optimizer"]["state"]


def equal(a, b):
    model, optimizer = final(a)
    other_model, other_optimizer = final(b)
    assert all(torch.equal(model[name], other_model[name]) for name in model | other_model)
    for index in optimizer | other_optimizer:
        assert torch.equal(
            optimizer[index]["momentum_buffer"], other_optimizer[index]["momentum_buffer"]
        )
    assert read_rows(a)[-1] == read_rows(b)[-1]
    assert (a / "samples.csv").read_text() == (b / "samples.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(coco, tmp_path_factory):
    """Nine updates on two processes, each a BN group, with loader workers."""
    output = tmp_path_factory.mktemp("undisturbed")
    finish(command(output, coco, *DISTURBED))
    return output


DISTURBED = (
    "MODEL.CGBN.BN_SIZE",
    "4",
    "SOLVER.CHECKPOINT_PERIOD",
    "2",
    "DATALOADER.NUM_WORKERS",
    "1",
)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the launcher", "one rank", "everyone"])
def test_told_to_stop(coco, undisturbed, tmp_path, whom):
    """By a scheduler's SIGTERM or by Ctrl-C: saved, a status to requeue, no traceback."""
    run = command(tmp_path, coco, *DISTURBED)
    process = start(run, tmp_path, "model_0000001.pth")
    if whom == "the launcher":
        os.kill(process.pid, signal.SIGTERM)
    elif whom == "one rank":
        os.kill(children(process.pid)[-1], signal.SIGTERM)
    else:  # the loaders' workers too, as by Ctrl-C in a terminal or by scancel
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == REQUEUE, last_words(tmp_path)
    out = last_words(tmp_path)
    assert "Traceback" not in out, out
    stopped = int(re.search(r"saved after iteration (\d+) and stopped with status 75", out)[1])
    assert Path(tmp_path, "last_checkpoint").read_text() == f"model_{stopped:07d}.pth"
    assert not Path(tmp_path, "model_final.pth").exists()
    finish(insert_resume(run))
    equal(undisturbed, tmp_path)


@pytest.mark.slow
def test_killed_and_resumed(coco, undisturbed, tmp_path):
    run = command(tmp_path, coco, *DISTURBED)
    process = start(run, tmp_path, "model_0000003.pth")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    finish(insert_resume(run))
    equal(undisturbed, tmp_path)


@pytest.mark.slow
def test_torchrun_recovers_from_a_killed_rank(coco, undisturbed, tmp_path):
    """Without --resume, and past the checkpoints of an older run."""
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    launcher = (
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    )  # fmt: skip
    run = command(tmp_path, coco, *DISTURBED, launcher=launcher)
    process = start(run, tmp_path, "model_0000003.pth")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=280) == 0, last_words(tmp_path)
    out = last_words(tmp_path)
    assert "Restarted by torchrun: resuming" in out
    assert (tmp_path / "last_checkpoint.old").read_text() == "model_0000099.pth"
    equal(undisturbed, tmp_path)


@pytest.mark.slow
def test_torchruns_of_two_machines_recover_from_a_killed_rank(coco, undisturbed, tmp_path):
    """One agent counts a restart. The other's process only waits, and that agent counts none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = (
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts",
        "2", "--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"127.0.0.1:{port}",
    )  # fmt: skip
    run = command(tmp_path, coco, *DISTURBED, launcher=launcher)
    (tmp_path / "second").mkdir()
    with open(tmp_path / "second" / "said.txt", "w") as said:
        second = subprocess.Popen(
            run, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    _started.append(second.pid)
    first = start(run, tmp_path, "model_0000003.pth")
    os.kill(children(first.pid)[-1], signal.SIGSTOP)  # as one that is in NCCL
    os.kill(children(second.pid)[-1], signal.SIGKILL)
    for process, output in ((second, tmp_path / "second"), (first, tmp_path)):
        assert process.wait(timeout=280) == 0, last_words(output)
    assert "Restarted by torchrun: resuming" in last_words(tmp_path) + last_words(
        tmp_path / "second"
    )
    equal(undisturbed, tmp_path)


def test_a_signal_before_training_ends_the_launcher_quietly(tmp_path):
    """While the processes still import: 128 + the signal, as a shell has it."""
    code = (
        "import argparse, time; from megdet_d2.engine import launch\n"
        "def main(args): open(args.flag, 'w'); time.sleep(100)\n"
        "if __name__ == '__main__':\n"
        "    args = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0,\n"
        f"        dist_url='auto', flag={str(tmp_path / 'up')!r})\n"
        "    launch(main, args)\n"
    )
    (tmp_path / "script.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(TRAIN_NET).parent)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py")], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "up").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, out
    assert "Traceback" not in out
