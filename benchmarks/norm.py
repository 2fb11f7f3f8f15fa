"""Times batch norms side by side on the tensors of an R50-FPN detector, as ratios.

    python benchmarks/norm.py                               # 2 gloo processes, a thread each
    python benchmarks/norm.py --processes 1 --dtype bfloat16
    python benchmarks/norm.py --fake-group --height 800 --width 1344    # one GPU, as one of two
    torchrun --nproc-per-node 8 benchmarks/norm.py          # NCCL, a GPU each

Forward and backward of CGBN, of torch's and of Detectron2's norms, in turns within one loop, so
that what else runs on the machine disturbs them alike; medians. "limit" is the time to move the
bytes that have to be moved, 3 S forward (x twice, y) and 5 S backward (x and dy twice, dx), at the
bandwidth of a copy measured in the same run. Writes a table, and with --output the numbers as JSON.
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
from datetime import date
from pathlib import Path

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

# Channels and stride of the norms of R50-FPN: the stem and the narrow ones of res2 to res5, then
# the wide ones, the first of which is the FPN's finest level too.
NARROW = [(64, 2), (64, 4), (128, 8), (256, 16), (512, 32)]
WIDE = [(256, 4), (512, 8), (1024, 16), (2048, 32)]
# What a norm's time is divided by, where that is not CGBN's: local work by local work.
BASES = {
    "CGBN, no group": "BatchNorm2d, no group",
    "BatchNorm2d, no group": "BatchNorm2d, no group",
    "CGBN with ReLU": "CGBN, then ReLU",
    "CGBN, then ReLU": "CGBN, then ReLU",
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class WithReLU(CrossGPUBatchNorm):
    def forward(self, x):
        return super().forward(x, relu=True)


class ThenReLU(CrossGPUBatchNorm):
    def forward(self, x):
        return super().forward(x).relu_()


def contenders(channels: int, device: torch.device) -> dict[str, nn.Module]:
    """The norms that run here, ours first."""
    layers = {
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
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def time_layers(x: torch.Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of forward and of backward, by norm."""
    device, dy = x.device, torch.randn_like(x)
    layers = contenders(x.shape[1], device)
    times: dict[str, tuple[list, list]] = {name: ([], []) for name in layers}
    for i in range(repeats + 2):
        for name, layer in layers.items():
            comm.synchronize()
            out = []
            forward = seconds(lambda: out.append(layer(x)), device)  # noqa: B023
            inputs = (x, layer.weight, layer.bias)
            backward = seconds(lambda: torch.autograd.grad(out[0], inputs, dy), device)  # noqa: B023
            if i >= 2:  # two to warm up
                times[name][0].append(forward)
                times[name][1].append(backward)
    return {name: tuple(map(statistics.median, pair)) for name, pair in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a tensor that no cache holds."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * source.element_size() / best


def message_cost(device: torch.device, repeats: int = 200) -> list[tuple[int, float]]:
    """(length, median seconds) of an all-reduce: bare sums of 64 channels, and CGBN's message."""
    if comm.get_world_size() == 1:
        return []
    # 2 C + 1 sums; with room for ROOM channels, a count and the two stamps.
    messages = [torch.zeros(n, dtype=torch.float64, device=device) for n in (129, 2 * ROOM + 3)]
    times = [[] for _ in messages]
    for _ in range(repeats):
        for message, values in zip(messages, times, strict=True):
            values.append(seconds(functools.partial(dist.all_reduce, message), device))
    return [(len(m), statistics.median(t)) for m, t in zip(messages, times, strict=True)]


def main(args: argparse.Namespace) -> None:
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


def report(rows: list, args, device: torch.device, bandwidth: float, messages: list) -> None:
    total = {(layout, shape, name): f + b for layout, shape, name, f, b, *_ in rows}
    table, ratios = [], {}
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


def write_json(args: argparse.Namespace, device: torch.device, result: dict) -> None:
    """Writes ``--output``, if given: the result, and what a reader needs to judge it."""
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
    """The processor's name, and how many cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    started = "LOCAL_RANK" in os.environ  # by torchrun, which has its own number of them
    parser.add_argument("--processes", type=int, default=1 if started else 2, dest="num_gpus")
    parser.add_argument("--threads", type=int, default=1, help="of each process on CPU")
    parser.add_argument("--images", type=int, default=2, help="of each process")
    parser.add_argument("--height", type=int, default=256, help="800 is the paper's")
    parser.add_argument("--width", type=int, default=416, help="1344 is the paper's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--fake-group", action="store_true", help="one GPU that takes itself for one of two"
    )
    parser.add_argument("--output", default="", metavar="FILE", help="write JSON too")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or the launcher would choose NCCL
    if arguments.fake_group:
        # Collectives that return at once: every norm takes the path of several processes.
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        main(arguments)
    else:
        launch(main, arguments)
