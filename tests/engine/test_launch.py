"""Processes of one start find each other, whatever an earlier one has left in the store."""

import argparse
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser

from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.launch import launch, name_start
from megdet_d2.engine.rendezvous import reserved_port
from megdet_d2.norm import collective
from tests.helpers import training


def start(store, ranks, delays=None):
    """The names that the ranks of one start agree on."""
    names = {}

    def run(rank):
        names[rank] = name_start(store, rank, len(ranks), 30)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own():
    store = dist.HashStore()
    first = start(store, [0, 1, 2])
    # The others before rank 0, so that they read what the first start has left.
    second = start(store, [2, 1, 0])
    assert len(first) == len(second) == 3
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert first[0] != second[0]


def test_nobody_joins_a_start_that_has_gone():
    """A process of which rank 0 knows nothing waits for it, and not for ever."""
    store = dist.HashStore()
    start(store, [0, 1])
    with pytest.raises(TimeoutError, match="Rank 0 did not answer rank 1 within 0.5 s"):
        name_start(store, 1, 2, 0.5)


SCRIPT = """
import argparse, glob, os
from detectron2.utils import comm
from megdet_d2.engine.launch import launch
def main(args):
    print("together", comm.all_gather(os.environ["TORCHELASTIC_RESTART_COUNT"]), flush=True)
if __name__ == "__main__":
    launch(main, argparse.Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto"))
    # A thread of gloo's that frees a tensor while Python ends would abort the process.
    names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
    print([name.strip() for name in names if "gloo" in name], "left", flush=True)
"""


def test_machines_that_have_counted_different_restarts_meet(tmp_path, port):
    """As torchrun's agents do when a process of one machine has died."""
    (tmp_path / "script.py").write_text(SCRIPT)
    processes = []
    for rank in range(2):
        env = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(rank),
            "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(tmp_path / "script.py")], env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=150)
        assert process.returncode == 0 and "together ['0', '1']\n[] left" in out, out


@pytest.mark.parametrize("given", ["auto", "tcp://127.0.0.1:{}"])
def test_the_port_is_kept_while_the_processes_start(monkeypatch, given):
    """Until rank 0 listens on it, seconds later."""
    with reserved_port() as free:
        pass
    seen = []

    def start_processes(main, dist_url, **_):
        port = int(dist_url.rpartition(":")[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        seen.append(port)

    module = sys.modules["megdet_d2.engine.launch"]  # whose name in the package is the function
    monkeypatch.setattr(module, "d2_launch", start_processes)
    args = argparse.Namespace(
        num_gpus=2, num_machines=1, machine_rank=0, dist_url=given.format(free)
    )
    launch(None, args)
    assert len(seen) == 1 and (given == "auto" or seen == [free])


WITHOUT_A_GPU = """
import argparse, os, time
from megdet_d2.engine.launch import launch
def main(args):
    print("in", os.getpid())
    time.sleep(3)
if __name__ == "__main__":
    args = argparse.Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto")
    launch(main, args, timeout=1)
    print("still in", os.getpid())
"""


def test_num_gpus_0_is_this_process_and_nothing_ends_it(tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT_A_GPU)
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    env |= {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py")], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert out.splitlines() == [f"in {process.pid}", f"still in {process.pid}"]


def test_out_of_step_on_a_gpu_stops_before_the_optimizer(tmp_path, monkeypatch):
    """The flag stands for what CUDA layers note on the device."""
    cfg = training.config(tmp_path, training.write_images(tmp_path))
    prepare_config(cfg)
    trainer = Trainer(cfg)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setitem(collective._mismatch, "group", torch.tensor(True))
    with pytest.raises(collective.OutOfStepError, match="in this step"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_flags_that_contradict_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = default_argument_parser().parse_args(["--num-gpus", "8"])
    with pytest.raises(ValueError, match="--num-gpus 8 .* leave these flags to torchrun"):
        launch(print, args)
