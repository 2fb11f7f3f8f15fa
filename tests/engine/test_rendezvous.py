"""Machines that do not meet, do not fit together, or run different things."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed import TCPStore

from megdet_d2.engine.rendezvous import RendezvousError, rendezvous, reserved_port
from megdet_d2.engine.same_config import check_same_config
from tests.helpers.paths import ROOT, TINY, TRAIN_NET
from tests.helpers.processes import all_gone, finish, start
from tests.helpers.training import config

LAUNCH = ROOT / "docs" / "launch"


def meeting(*machines, timeout=20, last=None):
    """``meet`` of several machines at once; what each raises, or None.

    The machine ``last`` comes after one of the others has raised an error.
    """
    results = [None] * len(machines)

    def come(i, url, machine):
        try:
            rendezvous(url, *machine, timeout)
        except Exception as error:
            results[i] = error.with_traceback(None)  # which holds the store, and so the port

    with reserved_port() as port:
        url = f"tcp://127.0.0.1:{port}"
        threads = [
            threading.Thread(target=come, args=(i, url, machine))
            for i, machine in enumerate(machines)
        ]
        for thread in threads:
            thread.start()
        if last is not None:
            while not any(results):
                assert any(thread.is_alive() for thread in threads)
                time.sleep(0.05)
            rendezvous(url, *last, timeout)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    return results


def test_machines_that_fit_meet_and_leave_the_port_free(port):
    assert meeting((0, 3, 8), (1, 3, 8), (2, 3, 8)) == [None] * 3
    for _ in range(2):
        rendezvous(f"tcp://127.0.0.1:{port}", 0, 1, 4, 5)


def test_a_port_in_use():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RendezvousError, match=f"cannot listen on port {port}.*--dist-url auto"):
            rendezvous(f"tcp://127.0.0.1:{port}", 0, 1, 2, 5)
        with pytest.raises(RendezvousError, match=f"cannot listen on port {port}.*--dist-url auto"):
            with reserved_port(port):
                pass


def test_a_reserved_port_is_for_those_who_are_told():
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(reserved_port()) for _ in range(50)]
        assert len(set(ports)) == 50
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports[0]))
        store = TCPStore("127.0.0.1", ports[0], is_master=True, wait_for_workers=False)
        with pytest.raises(RuntimeError, match="in use"):
            TCPStore("127.0.0.1", ports[0], is_master=True, wait_for_workers=False)
        del store


def test_machine_0_is_not_there(port):
    url = f"tcp://127.0.0.1:{port}"
    with pytest.raises(RendezvousError, match="machine 0 did not answer at .* within 2 s"):
        rendezvous(url, 1, 2, 8, 2)


def test_machine_1_does_not_come():
    first, third = meeting((0, 3, 8), (2, 3, 8), timeout=3)
    for error in (first, third):
        assert isinstance(error, RendezvousError)
    assert "machine 1 of 3 did not come within 3 s" in str(first)


def test_unequal_numbers_of_gpus():
    for error in meeting((0, 2, 8), (1, 2, 4)):
        assert "the machines differ in --num-gpus (machine 0: 8, machine 1: 4)" in str(error)


def test_machines_that_count_differently():
    for error in meeting((0, 2, 8), (1, 3, 8)):
        assert "differ in --num-machines (machine 0: 2, machine 1: 3)" in str(error)


def test_a_machine_rank_given_twice():
    # Without the last machine the others wait. Else they might have met before the second 1 comes.
    results = meeting((0, 3, 8), (1, 3, 8), (1, 3, 8), last=(2, 3, 8), timeout=60)
    errors = [str(error) for error in results if error]
    assert len(errors) == 1 and "--machine-rank 1 is given to two machines" in errors[0]


def test_bad_flags():
    with pytest.raises(ValueError, match="--machine-rank is 2 of --num-machines 2"):
        rendezvous("tcp://127.0.0.1:1", 2, 2, 8, 1)
    with pytest.raises(ValueError, match="give tcp://HOST:PORT"):
        rendezvous("tcp://127.0.0.1", 0, 2, 8, 1)


# --- processes that differ -----------------------------------------------------------------------


def differ(rank, coco):
    cfg = config("out", coco, "SOLVER.BASE_LR", 0.02 * (1 + rank % 2))
    try:
        check_same_config(cfg, eval_only=rank == 1)
    except ValueError as error:
        return str(error)


def agree(rank, coco):
    return check_same_config(config("out", coco), eval_only=False)


def test_processes_of_different_configs(pool2):
    assert pool2.run(agree, []) == [None, None]
    first, second = pool2.run(differ, [])
    assert first == second
    assert "SOLVER.BASE_LR is 0.02 on rank 0; 0.04 on rank 1" in first
    assert "eval_only is False on rank 0; True on rank 1" in first
    assert "Start every machine with the same command" in first


def machine(rank, port, output, coco, *overrides, script=TRAIN_NET, **env):
    return start(
        script, "--config-file", TINY, "--num-gpus", 1, "--num-machines", 2,
        "--machine-rank", rank, "--dist-url", f"tcp://127.0.0.1:{port}",
        "DATASETS.COCO", repr(coco), "DATASETS.TRAIN", "('mixed',)", "DATASETS.TEST", "()",
        "MODEL.ROI_HEADS.NUM_CLASSES", 1, "TEST.EVAL_PERIOD", 0, "MEGDET.TIMEOUT", 60,
        "OUTPUT_DIR", output, *overrides, **env,
    )  # fmt: skip


@pytest.mark.slow
def test_two_machines_of_different_config_and_code(coco, tmp_path, port):
    """Two launchers over loopback; the second has another learning rate, and an edited package."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "megdet_d2", copy / "megdet_d2")
    shutil.copy(TRAIN_NET, copy)
    with open(copy / "megdet_d2" / "norm" / "functional.py", "a") as file:
        file.write("# edited\n")
    first = machine(0, port, tmp_path / "out", coco)
    second = machine(
        1, port, tmp_path / "out", coco, "MEGDET.REFERENCE_LR", 0.04,
        script=copy / "train_net.py", PYTHONPATH=str(copy),
    )  # fmt: skip
    for process in (first, second):
        status, out = finish(process)
        assert status != 0
        assert re.search(r"the code of megdet_d2 is '?\w+'? on rank 0; '?\w+'? on rank 1", out), out
        assert "MEGDET.REFERENCE_LR is 0.02 on rank 0; 0.04 on rank 1" in out
        all_gone(process.pid, 60)


@pytest.mark.slow
def test_two_nodes_of_torchrun_keep_groups_on_a_machine(coco, tmp_path, port):
    """Two agents over loopback, two processes each: four in all, and statistics over two."""
    nodes = [
        start(
            "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2,
            "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", f"127.0.0.1:{port}",
            TRAIN_NET, "--config-file", TINY, "DATASETS.COCO", repr(coco),
            "DATASETS.TRAIN", "('mixed',)", "DATASETS.TEST", "()",
            "MODEL.ROI_HEADS.NUM_CLASSES", 1, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", tmp_path,
        )
        for _ in range(2)
    ]  # fmt: skip
    outs = [finish(node, 280) for node in nodes]
    assert [status for status, _ in outs] == [0, 0], outs[0][1][-4000:] + outs[1][1][-4000:]
    assert re.search(
        r"CGBN: \d+ layers, each over 4 images on 2 processes", outs[0][1] + outs[1][1]
    )
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.slow
def test_torchrun_nodes_of_different_sizes(coco, tmp_path, port):
    nodes = [
        start(
            "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", count,
            "--rdzv-backend", "c10d", "--rdzv-id", "8", "--rdzv-endpoint", f"127.0.0.1:{port}",
            TRAIN_NET, "--config-file", TINY, "OUTPUT_DIR", tmp_path,
        )
        for count in (1, 2)
    ]  # fmt: skip
    outs = [finish(node, 280) for node in nodes]
    assert all(status != 0 for status, _ in outs)
    assert "different numbers of processes on the machines" in outs[0][1] + outs[1][1]
    assert "--nproc-per-node" in outs[0][1]


# --- scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slurm_1_node.sbatch", "slurm_16_nodes.sbatch"])
def test_slurm_scripts(name):
    path = str(LAUNCH / name)
    subprocess.run(["bash", "-n", path], check=True)
    text = Path(path).read_text()
    nodes = re.search(r"--nodes=(\d+)", text)[1]
    assert nodes == re.search(r"slurm_(\d+)_", name)[1]
    for config_file in re.findall(r"configs/\S+\.yaml", text):
        assert (ROOT / config_file).exists()
    if not shutil.which("shellcheck"):
        pytest.skip("bash -n passed; shellcheck is not installed")
    subprocess.run(["shellcheck", path], check=True)


FAKE_SRUN = """#!/bin/bash
# What SLURM would start on the first of its nodes.
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
RECORD = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD"
printf '%s' "$SRUN_CPUS_PER_TASK" > "$RECORD.cpus"
"""


@pytest.mark.parametrize("name, nodes", [("slurm_1_node.sbatch", 1), ("slurm_16_nodes.sbatch", 16)])
def test_what_the_slurm_scripts_start(tmp_path, name, nodes):
    """SLURM's commands stand in, since there is no SLURM here; the command line is real."""
    for tool, text in {
        "srun": FAKE_SRUN,
        "torchrun": RECORD,
        "scontrol": "#!/bin/bash\necho node0\n",
    }.items():
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": "node[0-15]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "48",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    subprocess.run(["bash", str(LAUNCH / name)], check=True, env=env, cwd=tmp_path)
    started = (tmp_path / "record").read_text().split("\n")
    assert (tmp_path / "record.cpus").read_text() == "48"
    assert started[started.index("--nnodes") + 1] == str(nodes)
    assert started[started.index("--nproc-per-node") + 1] == "8"
    assert "train_net.py" in started and "--resume" in started
    if nodes > 1:
        assert started[started.index("--rdzv-endpoint") + 1].startswith("node0:")


def test_kubernetes_job():
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert "backoffLimit" not in job["spec"]["runPolicy"]  # one fault restarts every pod
    nodes = sum(spec["replicas"] for spec in replicas.values())
    assert nodes == 16 and replicas["Master"]["replicas"] == 1
    for spec in replicas.values():
        pod = spec["template"]["spec"]
        [container] = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for that name
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        command = [*container["command"], *container.get("args", [])]
        assert command[0] == "torchrun" and "--nnodes=16" in command and "--resume" in command
        [config_file] = [word for word in command if word.endswith(".yaml")]
        assert (ROOT / config_file).exists()
        assert pod["terminationGracePeriodSeconds"] >= 60
        shared = [v for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
        assert shared  # /dev/shm, for the loaders
