"""Times batch norms side by side on the tensors of an R50-FPN detector, as ratios.

    python benchmarks/norm.py                               # 2 gloo processes, a thread each
    python benchmarks/norm.py --processes 1 --dtype bfloat16
    torchrun --nproc-per-node 8 benchmarks/norm.py          # NCCL, a GPU each

Forward and backward of CGBN, of torch's and of Detectron2's norms, in turns within one loop, so
that what else runs on the machine disturbs them alike; medians. "limit" is the time to move the
bytes that have to be moved, 3 S forward (x twice, y) and 5 S backward (x and dy twice, dx), at the
bandwidth of a copy measured in the same run. Writes a table, and with --output the numbers as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.engine.launch import launch

# Channels and stride of the norms of R50-FPN: the stem and the narrow ones of res2 to res5, then
# the wide ones, the first of which is the FPN's finest level too.
NARROW = [(64, 2), (64, 4), (128, 8), (256, 16), (512, 32)]
WIDE = [(256, 4), (512, 8), (1024, 16), (2048, 32)]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def contenders(channels: int, device: torch.device) -> dict[str, nn.Module]:
    """The norms that run here, ours first."""
    layers = {
        "CGBN": CrossGPUBatchNorm(channels),
        "CGBN two_pass": CrossGPUBatchNorm(channels, algorithm="two_pass"),
        "BatchNorm2d (local)": nn.BatchNorm2d(channels),
        "NaiveSync": NaiveSyncBatchNorm(channels),
        "NaiveSync N": NaiveSyncBatchNorm(channels, stats_mode="N"),
    }
    if device.type == "cuda":
        layers["SyncBatchNorm"] = nn.SyncBatchNorm(channels)
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
    if comm.get_rank() == 0:
        report(rows, args, device, bandwidth)


def report(rows: list, args: argparse.Namespace, device: torch.device, bandwidth: float) -> None:
    ours = {(row[0], row[1]): row[3] + row[4] for row in rows if row[2] == "CGBN"}
    table, ratios = [], {}
    for layout, shape, name, forward, backward, limit3, limit5 in rows:
        ratio = (forward + backward) / ours[layout, shape]
        ratios.setdefault((layout, name), []).append(ratio)
        milliseconds = (1e3 * t for t in (forward, backward))
        of_limit = (limit3 + limit5) / (forward + backward)
        table.append((layout, "×".join(map(str, shape)), name, *milliseconds, ratio, of_limit))
    headers = (
        "layout",
        "shape",
        "norm",
        "forward ms",
        "backward ms",
        "time / CGBN",
        "limit / time",
    )
    print(tabulate(table, headers, floatfmt=".2f", tablefmt="pipe"))
    medians = [(*key, statistics.median(values)) for key, values in ratios.items()]
    print(f"\nMedian over the shapes, {comm.get_world_size()} processes, {args.dtype}:\n")
    print(tabulate(medians, ("layout", "norm", "time / CGBN"), floatfmt=".2f", tablefmt="pipe"))
    if args.output:
        result = {
            "date": str(date.today()),
            "hardware": torch.cuda.get_device_name()
            if device.type == "cuda"
            else platform.machine(),
            "torch": torch.__version__,
            "processes": comm.get_world_size(),
            "copy_bandwidth": bandwidth,
            "arguments": {k: v for k, v in vars(args).items() if k != "output"},
            "columns": ["layout", "shape", "norm", "forward_s", "backward_s", "3S_s", "5S_s"],
            "rows": rows,
        }
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, dest="num_gpus")
    parser.add_argument("--threads", type=int, default=1, help="of each process on CPU")
    parser.add_argument("--images", type=int, default=2, help="of each process")
    parser.add_argument("--height", type=int, default=256, help="800 is the paper's")
    parser.add_argument("--width", type=int, default=416, help="1344 is the paper's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", default="", metavar="FILE", help="write JSON too")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    launch(main, parser.parse_args())
