"""Times batch norms on the tensors of an R50-FPN detector, and compares them as ratios.

    python benchmarks/norm.py                               # 2 gloo processes of one thread each
    python benchmarks/norm.py --processes 1 --dtype bfloat16
    python benchmarks/norm.py --fake-group --height 800 --width 1344    # one GPU, as one of two
    torchrun --nproc-per-node 8 benchmarks/norm.py          # NCCL, one GPU per process

It times forward and backward of CGBN, of torch's and of Detectron2's norms, and reports medians.
The norms take turns within one loop, so other programs on the machine affect all of them alike.
"limit" is the time to move the bytes that must be moved, at the bandwidth of a copy in the same
run: 3 S forward (x twice, y) and 5 S backward (x and dy twice, dx), where S is the size of x. It
prints a table, and with --output writes the numbers as JSON.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.engine.launch import launch
from megdet_d2.norm.collective import ROOM
from megdet_d2.norm.groups import SELF

# Channels and stride of the norms in R50-FPN: first the stem and the narrow norms of res2 to res5,
# then the wide ones. The first wide shape is also that of the FPN's finest level.
NARROW = [(64, 2), (64, 4), (128, 8), (256, 16), (512, 32)]
WIDE = [(256, 4), (512, 8), (1024, 16), (2048, 32)]
# The base of a norm's time, if it is not CGBN: norms without communication are compared with each
# other.
BASES = {
    "CGBN, no group": "BatchNorm2d, no group",
    "BatchNorm2d, no group": "BatchNorm2d, no group",
    "CGBN with ReLU": "CGBN, then ReLU",
    "CGBN, then ReLU": "CGBN, then ReLU",
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class WithReLU(CrossGPUBatchNorm):
    """Applies CGBN and ReLU in one pass over x."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor:
        return super().forward(x, residual, relu)


class ThenReLU(CrossGPUBatchNorm):
    """Applies CGBN, then ReLU in place."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        return super().forward(x, residual, relu).relu_()


def contenders(channels: int, device: torch.device) -> dict[str, nn.Module]:
    """Returns the norms that can run on ``device``, CGBN first."""
    layers: dict[str, nn.Module] = {
        "CGBN": CrossGPUBatchNorm(channels),
        "CGBN two_pass": CrossGPUBatchNorm(channels, algorithm="two_pass"),
        "CGBN, no group": CrossGPUBatchNorm(channels, process_group=SELF),
        "BatchNorm2d, no group": nn.BatchNorm2d(channels),
        "NaiveSync": NaiveSyncBatchNorm(channels),
        "NaiveSync N": NaiveSyncBatchNorm(channels, stats_mode="N"),
    }
    if device.type == "cuda":
        layers["SyncBatchNorm"] = nn.SyncBatchNorm(channels)
        layers["CGBN, then ReLU"] = ThenReLU(channels)
        layers["CGBN with ReLU"] = WithReLU(channels)
    return {name: layer.to(device) for name, layer in layers.items()}


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds that ``step`` takes."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def time_layers(x: torch.Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """Returns the median seconds of forward and backward, by norm."""
    device, dy = x.device, torch.randn_like(x)
    layers = contenders(x.shape[1], device)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in layers}
    for i in range(repeats + 2):
        for name, layer in layers.items():
            comm.synchronize()
            out: list[torch.Tensor] = []
            forward = seconds(lambda: out.append(layer(x)), device)  # noqa: B023
            inputs = (x, *layer.parameters())
            backward = seconds(lambda: torch.autograd.grad(out[0], inputs, dy), device)  # noqa: B023
            if i >= 2:  # the first two warm up
                times[name][0].append(forward)
                times[name][1].append(backward)
    return {name: (statistics.median(f), statistics.median(b)) for name, (f, b) in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Returns bytes per second, read and written, of a copy that does not fit into a cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * source.element_size() / best


def message_cost(device: torch.device, repeats: int = 200) -> list[tuple[int, float]]:
    """Returns (length, median seconds) of two all-reduces of float64.

    The first has only the 2 C + 1 sums of C = 64 channels, the second is CGBN's message.
    """
    if comm.get_world_size() == 1:
        return []
    # CGBN's message has room for the sums of ROOM channels, a count and two stamps.
    messages = [torch.zeros(n, dtype=torch.float64, device=device) for n in (129, 2 * ROOM + 3)]
    times: list[list[float]] = [[] for _ in messages]
    for _ in range(repeats):
        for message, values in zip(messages, times, strict=True):
            values.append(seconds(functools.partial(dist.all_reduce, message), device))
    return [(len(m), statistics.median(t)) for m, t in zip(messages, times, strict=True)]


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark in one process."""
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    dtype = getattr(torch, args.dtype)
    bandwidth = copy_bandwidth(device)
    rows = []
    for layout, memory_format in LAYOUTS.items():
        for channels, stride in NARROW + WIDE:
            shape = (args.images, channels, args.height // stride, args.width // stride)
            x = torch.randn(shape, device=device).to(dtype).to(memory_format=memory_format)
            x.requires_grad_()
            limit = x.numel() * x.element_size() / bandwidth
            for name, (forward, backward) in time_layers(x, args.repeats).items():
                rows.append((layout, shape, name, forward, backward, 3 * limit, 5 * limit))
    messages = message_cost(device)
    if comm.get_rank() == 0:
        report(rows, args, device, bandwidth, messages)


def report(
    rows: Sequence[tuple],
    args: argparse.Namespace,
    device: torch.device,
    bandwidth: float,
    messages: list[tuple[int, float]],
) -> None:
    """Prints the tables and writes the JSON file.

    Args:
        rows: layout, shape, norm, seconds forward and backward, limits forward and backward.
        bandwidth: bytes per second.
        messages: length and seconds of all-reduces.
    """
    total = {(layout, shape, name): f + b for layout, shape, name, f, b, *_ in rows}
    table = []
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for layout, shape, name, forward, backward, limit3, limit5 in rows:
        base = BASES.get(name, "CGBN")
        ratio = (forward + backward) / total[layout, shape, base]
        ratios.setdefault((layout, name, base), []).append(ratio)
        milliseconds = (1e3 * t for t in (forward, backward))
        of_limit = (limit3 + limit5) / (forward + backward)
        table.append((layout, "×".join(map(str, shape)), name, *milliseconds, ratio, of_limit))
    units = ("forward ms", "backward ms", "time / base", "limit / time")
    print(tabulate(table, ("layout", "shape", "norm", *units), floatfmt=".2f", tablefmt="pipe"))
    medians = [(*key, statistics.median(values)) for key, values in ratios.items()]
    print(f"\nMedian over the shapes, {comm.get_world_size()} processes, {args.dtype}:\n")
    print(tabulate(medians, ("layout", "norm", "base", "time / base"), "pipe", floatfmt=".2f"))
    for length, t in messages:
        print(f"\nAll-reduce of {length} float64: {1e6 * t:.0f} us")
    result = {
        "copy_bandwidth": bandwidth,
        "columns": ["layout", "shape", "norm", "forward_s", "backward_s", "3S_s", "5S_s"],
        "rows": rows,
        "medians": medians,
        "all_reduce_s": messages,
    }
    write_json(args, device, result)


def write_json(args: argparse.Namespace, device: torch.device, result: dict[str, Any]) -> None:
    """Writes the result, with command, date and hardware, to the file of ``--output``, if given."""
    if not args.output:
        return
    gpu = device.type == "cuda"
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": str(date.today()),
        "hardware": torch.cuda.get_device_name() if gpu else processor(),
        "torch": torch.__version__,
        "processes": comm.get_world_size(),
    }
    with open(args.output, "w") as file:
        json.dump({**about, **result}, file, indent=1)
        file.write("\n")


def processor() -> str:
    """Returns the name of the CPU and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    started = "LOCAL_RANK" in os.environ  # by torchrun, which sets the number of processes
    processes = 1 if started else 2
    parser.add_argument(
        "--processes", type=int, metavar="N", default=processes, dest="num_gpus", help="processes"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads per process on CPU")
    parser.add_argument("--images", type=int, default=2, help="images per process")
    parser.add_argument("--height", type=int, default=256, help="image height (paper: 800)")
    parser.add_argument("--width", type=int, default=416, help="image width (paper: 1344)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=10, help="timed repetitions")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument(
        "--fake-group",
        action="store_true",
        help="run one process as one of two, with collectives that do nothing",
    )
    parser.add_argument("--output", default="", metavar="FILE", help="also write JSON to this file")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise the launcher chooses NCCL
    if arguments.fake_group:
        # The collectives return at once, but every norm takes the path for several processes.
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        main(arguments)
    else:
        launch(main, arguments)
