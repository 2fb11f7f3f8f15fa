"""Times all-reduces between processes of this machine, by gloo on CPUs and by NCCL on GPUs."""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from .step_time import FIRST_BUCKET, STATISTICS
from .topology import ACHIEVED, BASE_LARGE, BASE_SMALL, Link

SMALL, LARGE = STATISTICS, int(FIRST_BUCKET)
"""Bytes of CGBN's message, and of a bucket of DDP."""
REPEATS = {SMALL: 200, LARGE: 10}
WARM_UP = 5
"""All-reduces before those that count."""


def measure_link(processes: int, device: str) -> Link:
    """Returns the link between ``processes`` processes of this machine, see ``to_link``."""
    times = time_all_reduces(processes, device)
    return to_link(processes, times[SMALL], times[LARGE])


def to_link(processes: int, small: float, large: float) -> Link:
    """Returns the link with which ``all_reduce`` takes these seconds.

    Args:
        processes: P, 2 or more.
        small, large: seconds of a message of CGBN, and of a bucket of DDP.
    """
    hops = 2 * (processes - 1)
    alpha = max(0.0, small - BASE_SMALL) / hops
    moved = 2 * (processes - 1) / processes * LARGE
    transfer = max(large - BASE_LARGE - hops * alpha, 1e-9)
    return Link(alpha, alpha, moved / (ACHIEVED * transfer))


def time_all_reduces(processes: int, device: str) -> dict[int, float]:
    """Returns the median seconds of an all-reduce, by its bytes.

    Args:
        processes: on this machine, 2 or more.
        device: "cuda" for NCCL with a GPU each, or "cpu" for gloo.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_time, (processes, device, folder), nprocs=processes)
        found = json.loads(Path(folder, "times.json").read_text())
    return {int(size): seconds for size, seconds in found.items()}


def _time(rank: int, processes: int, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
    )
    found = {}
    for size, repeats in REPEATS.items():
        message = torch.ones(size // 4, device=where)
        seconds = []
        for _ in range(WARM_UP + repeats):
            began = time.perf_counter()
            dist.all_reduce(message)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        found[size] = statistics.median(seconds[WARM_UP:])
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
