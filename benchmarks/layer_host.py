"""Times what the host does for one layer, forward and backward, beside torch's batch norms.

    python benchmarks/layer_host.py --output docs/results/layer_host_<date>.json

The first table has the layers on a CPU in one process, on small tensors, with all their arithmetic.
The second has the host's part of a GPU's work: the code before and between launches. Kernels and
collectives are stand-ins that do nothing, so the time of a launch is in no number. BatchNorm2d runs
on a tensor of 64 values there, and its arithmetic on them is in its number.

The layers take turns in one loop. The clock is the CPU time of the thread, which other programs
disturb less than the time of day. The smallest and the median of many short repeats are reported.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import functional, kernels
from megdet_d2.norm.groups import SELF

SMALL = [(16, 64, 8, 8), (2, 256, 2, 2)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TINY = (2, 8, 2, 2)
# torch's kernels of SyncBatchNorm: "x" for an output of x's shape, "c" for one value per channel.
NATIVE = {
    "batch_norm_stats": "cc",
    "batch_norm_elemt": "x",
    "batch_norm_gather_stats_with_counts": "cc",
    "batch_norm_backward_reduce": "cccc",
    "batch_norm_backward_elemt": "x",
}
Step = Callable[[], Any]


def times(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Returns microseconds of CPU time per call, for each round and step; the steps take turns."""
    result: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):  # the first two warm up
        for name, step in steps.items():
            start = time.thread_time()
            for _ in range(repeats):
                step()
            if round_ >= 2:
                result[name].append(1e6 * (time.thread_time() - start) / repeats)
    return result


def both(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Step:
    """Returns a forward and backward of ``layer``."""
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def small_tensors(shape: tuple[int, ...], layout: torch.memory_format) -> dict[str, Step]:
    """Returns the steps of layers in one process: training, and evaluation's forward."""
    x, dy = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    steps: dict[str, Step] = {}
    for name, layer in (
        ("BatchNorm2d", nn.BatchNorm2d(shape[1])),
        ("CGBN", CrossGPUBatchNorm(shape[1], process_group=SELF)),
    ):
        steps[name] = both(layer, x, dy)
        steps[f"{name}, evaluation"] = functools.partial(type(layer)(shape[1]).eval(), x)
    return steps


class NoKernel:
    """A stand-in for a Triton kernel, which launches nothing."""

    def __getitem__(self, grid: Any) -> "NoKernel":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def triton_kernels() -> Iterator[tuple[ModuleType, str]]:
    """Yields where each Triton kernel of the norm is: a module and a name in it."""
    for module in list(vars(kernels).values()):
        if isinstance(module, ModuleType) and module.__name__.startswith(kernels.__name__):
            for name, value in list(vars(module).items()):
                if hasattr(value, "arg_names"):
                    yield module, name


def native(outputs: str) -> Callable:
    """Returns a stand-in for a kernel of torch, which makes the outputs and computes nothing."""

    def call(x: torch.Tensor, *args: Any) -> Any:
        if x.dim() == 1 or len(outputs) == 2 and x.dim() < 3:  # gathers statistics
            x = args[0] if isinstance(args[0], torch.Tensor) else x
        made = [torch.empty_like(x) if o == "x" else x.new_empty(x.shape[1]) for o in outputs]
        return made[0] if len(made) == 1 else tuple(made)

    return call


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Runs the body as one of two processes, with kernels and collectives that do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    with contextlib.ExitStack() as stack:
        for module, name in triton_kernels():
            stack.enter_context(mock.patch.object(module, name, NoKernel()))
        for name, outputs in NATIVE.items():
            stack.enter_context(mock.patch.object(torch, name, native(outputs)))
        stack.enter_context(mock.patch.object(functional, "use_triton", lambda x: True))
        for name in ("all_gather", "all_gather_into_tensor", "all_gather_single"):
            if hasattr(dist, name):  # SyncBatchNorm's, which the fake backend refuses
                stack.enter_context(mock.patch.object(dist, name, lambda *a, **k: None))
        yield
    dist.destroy_process_group()


def host_of_a_gpu() -> dict[str, Step]:
    """Returns the steps of layers whose kernels do nothing."""
    x, dy, channels = torch.randn(TINY).requires_grad_(), torch.randn(TINY), TINY[1]
    steps = {
        "BatchNorm2d": both(nn.BatchNorm2d(channels), x, dy),
        "CGBN": both(CrossGPUBatchNorm(channels), x, dy),
        "CGBN, no group": both(CrossGPUBatchNorm(channels, process_group=SELF), x, dy),
    }
    torchs = nn.BatchNorm2d(channels)  # SyncBatchNorm's forward refuses a CPU; this is its rest
    world = dist.group.WORLD
    inputs = [x, *torchs.parameters()]

    def sync_batch_norm() -> Any:
        assert torchs.num_batches_tracked is not None
        torchs.num_batches_tracked.add_(1)
        y = SyncBatchNorm.apply(
            x, torchs.weight, torchs.bias, torchs.running_mean, torchs.running_var, 1e-5, 0.1,
            world, 2,
        )  # fmt: skip
        return torch.autograd.grad(y, inputs, dy)

    steps["SyncBatchNorm"] = sync_batch_norm
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=20, help="calls in a round")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = {}
    for shape in SMALL:
        for layout, memory_format in LAYOUTS.items():
            name = f"{'x'.join(map(str, shape))} {layout}"
            measured[name] = times(small_tensors(shape, memory_format), args.rounds, args.repeats)
    if kernels.available():
        with without_kernels():
            measured["host of a GPU"] = times(host_of_a_gpu(), args.rounds, args.repeats)
    rows = []
    for case, steps in measured.items():
        for name, values in steps.items():
            base = steps["BatchNorm2d, evaluation" if "evaluation" in name else "BatchNorm2d"]
            ratios = (f(values) / f(base) for f in (min, statistics.median))
            rows.append((case, name, min(values), statistics.median(values), *ratios))
    heads = ("case", "layer", "least us", "median us", "least ratio", "median ratio")
    print(tabulate(rows, heads, "github", floatfmt=(".0f",) * 4 + (".2f",) * 2))
    if args.output:
        about = {
            "command": shlex.join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": os.getloadavg(),
            "torch": torch.__version__,
            "columns": heads,
            "rows": rows,
        }
        args.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
