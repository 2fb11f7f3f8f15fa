"""Counts the kernels and collectives that a batch norm launches on a GPU, without a GPU.

    python benchmarks/launches.py --output docs/results/launches.json

A launch costs the host 3 to 10 us, and a detector has some 60 norms. The layers run on fake CUDA
tensors, which have a shape and no values, in a group of two that does not exist. Each operator of
ATen that makes values counts as one launch, each Triton kernel and each collective too. Views and
allocations do not. It prints a table, and with --output writes the numbers as JSON.
"""

import argparse
import contextlib
import json
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules._functions import SyncBatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import batch_norm as layer_module
from megdet_d2.norm import collective, functional
from megdet_d2.norm.groups import SELF
from megdet_d2.norm.kernels import elementwise, launch, per_channel, reductions

SHAPE = (2, 256, 20, 20)
# Operators that launch nothing.
VIEWS = set(
    "view _unsafe_view detach alias slice select split split_with_sizes squeeze unsqueeze expand "
    "unbind t transpose permute as_strided reshape view_as lift_fresh _reshape_alias".split()
)
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
TRITON = [
    (module, name)
    for module in (reductions, elementwise, per_channel)
    for name, value in vars(module).items()
    if hasattr(value, "arg_names")
]


class Record(TorchDispatchMode):
    """A record of the launches, collectives and allocations of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        library, name = str(func).split(".")[:2]
        if library == "prim":  # reads a tensor's device
            pass
        elif name in ALLOCATIONS:
            self.allocations += 1
        elif name not in VIEWS:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))

    def clear(self) -> None:
        """Removes everything."""
        self.launches: list[str] = []
        self.collectives: list[str] = []
        self.allocations = 0

    def counts(self) -> dict[str, Any]:
        """Returns the numbers, and the names of what was launched."""
        return {
            "launches": len(self.launches),
            "collectives": len(self.collectives),
            "allocations": self.allocations,
            "names": dict(Counter(self.launches + self.collectives)),
        }


class Kernel:
    """A stand-in for a Triton kernel, which records that it was launched."""

    def __init__(self, name: str, record: Record) -> None:
        self.name, self.record = name, record

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.record.launches.append(f"triton.{self.name}")


def native(name: str, outputs: str, record: Record) -> Any:
    """Returns a stand-in for a kernel of ATen that has no fake version.

    Args:
        outputs: "x" for an output of x's shape, "c" for one value per channel.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        record.launches.append(name)
        x = next(a for a in args if isinstance(a, Tensor))
        made = [torch.empty_like(x) if o == "x" else x.new_empty(x.shape[1]) for o in outputs]
        return made[0] if len(made) == 1 else tuple(made)

    return call


NATIVE = {
    "batch_norm_stats": "cc",
    "batch_norm_update_stats": "cc",
    "batch_norm_elemt": "x",
    "batch_norm_gather_stats_with_counts": "cc",
    "batch_norm_backward_reduce": "cccc",
    "batch_norm_backward_elemt": "x",
}


class Group:
    """A group of two processes that does not exist."""

    group_name = "fake"

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0

    def _get_backend_name(self) -> str:
        return "nccl"


@contextlib.contextmanager
def on_fake_gpu(record: Record, triton: bool) -> Iterator[None]:
    """Runs the body with fake tensors, and records its Triton kernels and collectives."""

    def collective_call(name: str) -> Any:
        return lambda *args, **kwargs: record.collectives.append(name)

    group = Group()
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        for module, name in TRITON:
            patch(module, name, Kernel(name, record))
        for name, outputs in NATIVE.items():
            patch(torch, name, native(name, outputs, record))
        patch(functional, "use_triton", lambda x: triton)
        for name in ("statistics", "normalize", "gradients"):
            patch(functional, name, functional.implementations[name])
        patch(layer_module, "statistics", functional.implementations["statistics"])
        for module in (collective, layer_module):
            patch(module, "find_group", lambda *args: group)
        patch(launch, "on_device_of", lambda x: contextlib.nullcontext())
        patch(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single"):
            if hasattr(dist, name):  # the last in torch 2.15, in place of the one before
                patch(dist, name, collective_call(name))
        patch(dist, "is_initialized", lambda: True)
        patch(dist, "get_world_size", lambda *args: 2)
        patch(comm, "get_world_size", lambda: 2)
        yield


def count(
    layer: nn.Module, shape: tuple[int, ...], triton: bool, **options: Any
) -> dict[str, dict[str, Any]]:
    """Returns the counts of a forward and a backward of ``layer``, whose buffers exist already.

    Args:
        layer: made under a ``FakeTensorMode``, with its parameters on "cuda".
        options: of the layer's forward: relu, residual (True for a tensor of x's shape).
    """
    record = Record()
    x = torch.empty(shape, device="cuda", requires_grad=True)
    if options.get("residual"):
        options["residual"] = torch.empty_like(x).requires_grad_()
    result = {}
    with on_fake_gpu(record, triton):
        for _ in range(2):  # the first pass makes what is kept: the group's flag, the counters
            record.clear()
            with record:
                y = layer(x, **options)
            result["forward"] = record.counts()
            record.clear()
            context = y.grad_fn
            dy = torch.empty_like(y)
            with record, torch.no_grad():
                functional.Normalization.backward(context, dy)
            result["backward"] = record.counts()
    return result


def count_sync_batch_norm(shape: tuple[int, ...] = SHAPE) -> dict[str, dict[str, Any]]:
    """Returns the counts of torch's ``SyncBatchNorm``, as it is captured in a CUDA graph.

    Outside a capture it also looks for processes without images: up to 8 more launches, and one
    wait for the device.
    """
    record, channels = Record(), shape[1]
    with FakeTensorMode(allow_non_fake_inputs=True), on_fake_gpu(record, False):
        x = torch.empty(shape, device="cuda", requires_grad=True)
        weight, bias = torch.empty(2, channels, device="cuda").unbind()
        running = torch.empty(2, channels, device="cuda").unbind()
        tracked = torch.empty((), dtype=torch.int64, device="cuda")
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        arguments = (x, weight, bias, *running, 1e-5, 0.1, Group(), 2)
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
            record,
        ):
            tracked.add_(1)
            y = SyncBatchNorm.apply(*arguments)
        result = {"forward": record.counts()}
        record.clear()
        dy = torch.empty_like(y)
        with record, torch.no_grad():
            SyncBatchNorm.backward(y.grad_fn, dy)
        result["backward"] = record.counts()
    return result


def count_naive(stats_mode: str, shape: tuple[int, ...] = SHAPE) -> dict[str, dict[str, Any]]:
    """Returns the counts of Detectron2's ``NaiveSyncBatchNorm``, made of plain operators."""
    record = Record()
    with on_fake_gpu(record, False):
        # Tensors without a device: autograd would take those of a GPU to another thread.
        layer = NaiveSyncBatchNorm(shape[1], stats_mode=stats_mode).to("meta").train()
        x = torch.empty(shape, device="meta", requires_grad=True)
        with record:
            y = layer(x)
        result = {"forward": record.counts()}
        record.clear()
        with record:
            y.backward(torch.empty_like(y))
        result["backward"] = record.counts()
    return result


def variants() -> dict[str, dict[str, Any]]:
    """Returns the ways to run CGBN that have their own launches: arguments of ``count_cgbn``."""
    relu, both = {"relu": True}, {"relu": True, "residual": True}
    return {
        "CGBN": {},
        "CGBN with ReLU": {"options": relu},
        "CGBN with addition and ReLU": {"options": both},
        "CGBN, two_pass": {"layer": {"algorithm": "two_pass"}},
        "CGBN, momentum None": {"layer": {"momentum": None}},
        "CGBN without γ and β": {"layer": {"affine": False}},
        "CGBN without running statistics": {"layer": {"track_running_stats": False}},
        "CGBN, padding left out": {"padding": True},
        "CGBN, no group": {"layer": {"process_group": SELF}},
        "CGBN, no group, addition and ReLU": {"layer": {"process_group": SELF}, "options": both},
        "CGBN by ATen": {"triton": False},
    }


def count_cgbn(
    layer: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    padding: bool = False,
    triton: bool = True,
    shape: tuple[int, ...] = SHAPE,
) -> dict[str, dict[str, Any]]:
    """Returns the counts of a forward and a backward of ``CrossGPUBatchNorm``."""
    _clear_what_is_kept()
    with FakeTensorMode(allow_non_fake_inputs=True):
        norm = CrossGPUBatchNorm(shape[1], device="cuda", **(layer or {}))
        if norm._group_name is None:
            norm._group_name, norm._group_size = "fake", 2
        if padding:
            mask = torch.empty(shape[0], 1, *shape[2:], dtype=torch.bool, device="cuda")
            norm.valid_region = mock.Mock(mask=lambda x: mask)
        result = count(norm, shape, triton, **(options or {}))
    _clear_what_is_kept()
    return result


def _clear_what_is_kept() -> None:
    collective._mismatch.clear()
    launch._counters.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    args = parser.parse_args()
    counts = {name: count_cgbn(**arguments) for name, arguments in variants().items()}
    counts["SyncBatchNorm, captured"] = count_sync_batch_norm()
    counts["NaiveSyncBatchNorm"] = count_naive("")
    counts["NaiveSyncBatchNorm N"] = count_naive("N")
    rows = [
        [name, *(f"{c['launches']} + {c['collectives']}" for c in passes.values())]
        for name, passes in counts.items()
    ]
    print(tabulate(rows, ["launches + collectives", "forward", "backward"], tablefmt="github"))
    if args.output:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "hardware": "none: fake tensors",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "shape": SHAPE,
            "counts": counts,
        }
        args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
