"""Measures the bandwidth of the four kernels of CGBN on a GPU, beside ATen's and a copy.

    python benchmarks/gpu_kernels.py --output result.json

Each kernel runs in a replayed CUDA graph, so the time is the device's alone. The inputs of a graph
are together larger than the cache. A kernel must move a number of times the size S of x: the sums
of x read it (1 S), the normalisation reads it and writes y (2 S), the sums of the gradient read dy
and x (2 S), and the input gradient reads both and writes dx (3 S). The share is the bandwidth of
these bytes over that of a copy. A share above 1 means that the cache held a part of them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_timing import DEVICE, GPU, Record, device_seconds
from norm import LAYOUTS, NARROW, WIDE, processor
from torch import Tensor

from megdet_d2.norm import kernels
from megdet_d2.norm.kernels import launch

# The heads on 512 regions of each of two images, and res5 of an image with an odd size.
OTHER = [(1024, 256, 7, 7), (2, 2048, 25, 43)]
CACHE = 300_000_000  # bytes; several times the cache of a GPU
PASSES = {"moments": 1, "normalize": 2, "gradient_sums": 2, "input_gradient": 3}

Pass = Callable[[tuple[Tensor, Tensor]], Any]


def shapes(height: int, width: int) -> list[tuple[int, ...]]:
    """Returns the shapes of the norms in R50-FPN for two images of this size, and two others."""
    sizes = dict.fromkeys((c, height // s, width // s) for c, s in NARROW + WIDE)
    return [*((2, *size) for size in sizes), *OTHER]


def our_passes(channels: int, dtype: torch.dtype, relu: bool) -> dict[str, Pass]:
    """Returns the passes of CGBN over (x, dy), by name."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    message = torch.empty(2 * channels + 1, dtype=torch.float64, device=DEVICE)
    sums = torch.zeros(2 * channels, dtype=torch.float64, device=DEVICE)
    count = torch.ones(1, dtype=torch.float64, device=DEVICE)
    stats = torch.rand(4, channels, dtype=statistics, device=DEVICE) + 0.5
    passes: dict[str, Pass] = {
        "normalize": lambda s: kernels.normalize(s[0], stats, None, relu),
        "gradient_sums": lambda s: kernels.gradient_sums(
            s[1], s[0], stats, relu, None, message, None
        ),
        "input_gradient": lambda s: kernels.input_gradient(
            s[1], s[0], stats, sums, count, None, relu
        ),
    }
    if not relu:
        passes["moments"] = lambda s: kernels.power_sums(s[0], None, message, None)
    return passes


def aten_passes(channels: int) -> dict[str, Pass]:
    """Returns ATen's passes over (x, dy), which torch's SyncBatchNorm uses, by our names."""
    mean, invstd, weight, bias = torch.rand(4, channels, device=DEVICE) + 0.5
    count = torch.ones(1, dtype=torch.int32, device=DEVICE)
    return {
        "moments": lambda s: torch.batch_norm_stats(s[0], 1e-5),
        "normalize": lambda s: torch.batch_norm_elemt(s[0], weight, bias, mean, invstd, 1e-5),
        "gradient_sums": lambda s: torch.batch_norm_backward_reduce(
            s[1], s[0], mean, invstd, weight, True, True, True
        ),
        "input_gradient": lambda s: torch.batch_norm_backward_elemt(
            s[1], s[0], mean, invstd, weight, bias, bias, count
        ),
    }


def copy_bandwidth() -> float:
    """Returns the bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.ones(2**30 if GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(lambda _: target.copy_(source), [None])


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    bandwidth = copy_bandwidth()
    about = {
        "hardware": torch.cuda.get_device_name() if GPU else processor(),
        "torch": torch.__version__,
        "copy_bandwidth": bandwidth,
        "columns": "us on the device; share of the copy's bandwidth, for the bytes in `sizes`",
        "sizes": PASSES,
    }
    record = Record(args.output, about)
    print(f"copy {bandwidth / 1e12:.2f} TB/s; us (share of it) for CGBN, with ReLU, ATen")
    # Counters that a capture would clear before each kernel; outside of one they are kept.
    kept = torch.zeros(2**16, dtype=torch.int32, device=DEVICE)
    every = [
        (d, n, s) for s in shapes(args.height, args.width) for d in args.dtypes for n in LAYOUTS
    ]
    with mock.patch.object(launch, "_tickets", lambda x, groups: kept[:groups]):
        for dtype, layout, shape in every[: args.limit]:
            row = measure(shape, getattr(torch, dtype), layout)
            for column, passes in row["us"].items():
                row.setdefault("share", {})[column] = {
                    name: PASSES[name] * row["bytes"] / bandwidth / (1e-6 * us)
                    for name, us in passes.items()
                }
            record.add({"dtype": dtype, "layout": layout, "shape": shape, **row})
            print(dtype, layout, "x".join(map(str, shape)), f"{row['bytes'] / 1e6:.0f} MB", end=" ")
            for name in PASSES:
                cells = [
                    f"{row['us'][column][name]:.1f} ({row['share'][column][name]:.0%})"
                    for column in row["us"]
                    if name in row["us"][column]
                ]
                print(f"| {name}", *cells, end=" ")
            print(flush=True)


def measure(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """Returns the bytes of x, and the microseconds of each pass."""
    size = dtype.itemsize * torch.Size(shape).numel()
    number = max(2, min(24, -(-CACHE // size))) if GPU else 1
    memory_format = LAYOUTS[layout]
    tensors = [
        torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=memory_format)
        for _ in range(2 * number)
    ]
    inputs = list(zip(tensors[:number], tensors[number:], strict=True))
    columns = {
        "CGBN": our_passes(shape[1], dtype, False),
        "ReLU": our_passes(shape[1], dtype, True),
    }
    if GPU:
        columns["ATen"] = aten_passes(shape[1])
    us = {
        column: {name: 1e6 * device_seconds(one, inputs) for name, one in passes.items()}
        for column, passes in columns.items()
    }
    return {"bytes": size, "us": us}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--height", type=int, default=800, help="image height")
    parser.add_argument("--width", type=int, default=1344, help="image width")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file")
    main(parser.parse_args())
