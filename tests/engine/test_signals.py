"""Tests trainings that are told to stop, or killed, in real processes; and their resumes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megdet_d2.engine.signals import REQUEUE
from tests.helpers.paths import TINY, TRAIN_NET
from tests.helpers.processes import children
from tests.helpers.training import read_rows, train

pytestmark = pytest.mark.usefixtures("datasets_root")
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
    """Starts the command in a new process group, waits for a file, and returns the process."""
    with open(Path(output, "said.txt"), "w") as said:  # a pipe without a reader fills up
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
def test_torchruns_of_two_machines_recover_from_a_killed_rank(coco, undisturbed, tmp_path, port):
    """One agent counts a restart. The other's process only waits, and that agent counts none."""
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


SLOW_EVALUATION = """
import os, sys, time
from pathlib import Path
from detectron2.engine import default_argument_parser
from detectron2.evaluation import COCOEvaluator
from megdet_d2 import Trainer, launch, setup

class Slow(COCOEvaluator):
    # Takes a minute in the iteration that SLOW_AT names; a marker says that it is amid it.
    def process(self, inputs, outputs):
        super().process(inputs, outputs)
        if self.slow:
            Path(os.environ["MARKER"]).touch()
            time.sleep(5)

class Mine(Trainer):
    def build_hooks(self):
        type(self).trainer = self
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg, name, output_dir=None):
        evaluator = Slow(name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")))
        evaluator.slow = str(cls.trainer.iter) == os.environ.get("SLOW_AT")
        return evaluator

def main(args):
    trainer = Mine(setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args, timeout=60)
"""
EVALUATED = (
    "DATASETS.TEST", "('mixed',)", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "100",
    "MODEL.CGBN.BN_SIZE", "4",
)  # fmt: skip


def evaluating(script, output, coco, processes):
    run = command(output, coco, *EVALUATED, processes=processes)
    if processes == 1:
        run[run.index("MODEL.CGBN.BN_SIZE") + 1] = "8"
    return [str(script) if part == TRAIN_NET else part for part in run]


@pytest.mark.parametrize(
    ("processes", "whom", "iteration", "saved"),
    [
        (1, "the launcher", 3, "model_0000003.pth"),
        (1, "the launcher", 9, "model_final.pth"),
        pytest.param(2, "the launcher", 3, "model_0000003.pth", marks=pytest.mark.slow),
        pytest.param(2, "one rank", 3, "model_0000003.pth", marks=pytest.mark.slow),
        pytest.param(2, "everyone", 9, "model_final.pth", marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_amid_an_evaluation(
    coco, tmp_path, monkeypatch, processes, whom, iteration, saved
):
    """An evaluation takes a minute or more, and SLURM kills after 60 s."""
    script, output, marker = tmp_path / "script.py", tmp_path / "run", tmp_path / "marker"
    script.write_text(SLOW_EVALUATION)
    output.mkdir()
    monkeypatch.setenv("SLOW_AT", str(iteration))
    monkeypatch.setenv("MARKER", str(marker))
    monkeypatch.setenv("PYTHONPATH", str(Path(TRAIN_NET).parent))
    run = evaluating(script, output, coco, processes)
    process = start(run, output, str(marker))
    began = time.monotonic()
    if whom == "the launcher":
        os.kill(process.pid, signal.SIGTERM)
    elif whom == "one rank":
        os.kill(children(process.pid)[-1], signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == REQUEUE, last_words(output)
    assert time.monotonic() - began < 45
    out = last_words(output)
    assert "SIGTERM received: saving, and leaving the evaluation" in out
    assert "continue with --resume" in out and "Traceback" not in out, out
    assert Path(output, "last_checkpoint").read_text() == saved
    state = torch.load(output / saved)
    assert len(state["processes"]["statistics"]) == processes
    assert state["progress"]["images_seen"] == 8 * min(iteration + 1, 9)

    monkeypatch.delenv("SLOW_AT")
    finish(insert_resume(run))
    rows = read_rows(output)
    assert rows[-1]["iteration"] >= 9 and "bbox/AP" in rows[-1]
    samples = (output / "samples.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[1]) for line in samples] == [24, 24, 24]


def signalled(rank, output, coco, when):
    """Trains until rank 1 receives SIGTERM in its third update; the status and the iteration."""
    seen = {}

    def send(trainer):
        seen["trainer"] = trainer
        inner = trainer._trainer

        def kill(*_):
            if rank == 1 and trainer.iter == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        if when == "in forward":
            trainer.checkpointer.model.roi_heads.register_forward_pre_hook(kill)
        else:
            inner.optimizer.register_step_pre_hook(kill)

    with pytest.raises(SystemExit) as error:
        train(rank, output, coco, ("MODEL.CGBN.BN_SIZE", 4), fault=send)
    return error.value.code, seen["trainer"].iter


@pytest.mark.parametrize(("when", "last"), [("in forward", 2), ("in the optimizer's step", 3)])
def test_a_signal_to_one_rank_stops_all_after_the_same_update(pool2, coco, tmp_path, when, last):
    """One that comes after the exchange of an update is in that of the next."""
    results = pool2.run(signalled, str(tmp_path), coco, when)
    assert results == [(REQUEUE, last)] * 2
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    state = torch.load(tmp_path / f"model_{last:07d}.pth")
    assert len(state["processes"]["statistics"]) == 2  # each BN group's
    assert state["progress"]["images_seen"] == 8 * (last + 1)
