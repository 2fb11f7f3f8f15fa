"""Measures what a norm layer costs the host and the GPU, forward and backward, in a group of two.

    python benchmarks/gpu_layer.py --output result.json

* Host: the least microseconds to call a layer on a small tensor, with no wait between calls.
* Device: the sum of the kernels' times on large tensors, by torch's profiler. Gaps do not count.
* Launches: the kernels of a layer, beside those of docs/results/launches.json, which was counted
  without a GPU. A collective is one kernel here, see ``twin``.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.layers import NaiveSyncBatchNorm
from gpu_timing import DEVICE, GPU, Record, device_events, host_seconds, synchronize
from norm import LAYOUTS, ThenReLU, WithReLU, processor
from torch import Tensor, nn
from twin import join_twin

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm.groups import SELF

COUNTED = Path(__file__).parents[1] / "docs" / "results" / "launches.json"
SMALL, LARGE = (2, 256, 10, 14), [(2, 256, 200, 336), (2, 1024, 50, 84)]
# The names of docs/results/launches.json.
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "CGBN": CrossGPUBatchNorm,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "BatchNorm2d": nn.BatchNorm2d,
    "CGBN, no group": lambda c: CrossGPUBatchNorm(c, process_group=SELF),
    "CGBN, two_pass": lambda c: CrossGPUBatchNorm(c, algorithm="two_pass"),
    "CGBN with ReLU": WithReLU,
    "CGBN, then ReLU": ThenReLU,
    "NaiveSyncBatchNorm": NaiveSyncBatchNorm,
    "NaiveSyncBatchNorm N": lambda c: NaiveSyncBatchNorm(c, stats_mode="N"),
}


class Layer:
    """A layer with an input and a gradient of its output.

    Args:
        make: takes the number of channels.
        shape: of the input.
    """

    def __init__(
        self, make: Callable[[int], nn.Module], shape: tuple[int, ...], dtype: str, layout: str
    ) -> None:
        x = torch.randn(shape, device=DEVICE).to(getattr(torch, dtype))
        self.x = x.to(memory_format=LAYOUTS[layout]).requires_grad_()
        self.module = make(shape[1]).to(DEVICE)
        self.inputs = [self.x, *self.module.parameters()]
        y = self.forward()
        self.dy = torch.randn_like(y)
        self.backward(y)

    def forward(self) -> Tensor:
        """Returns the output."""
        return self.module(self.x)

    def backward(self, y: Tensor) -> None:
        """Computes all gradients."""
        torch.autograd.grad(y, self.inputs, self.dy)

    def step(self) -> None:
        """Runs forward and backward."""
        self.backward(self.forward())


def launches(layer: Layer) -> dict[str, list[str]]:
    """Returns the names of the kernels of a forward and of a backward."""
    made: list[Tensor] = []
    forward = device_events(lambda: made.append(layer.forward()))
    backward = device_events(lambda: layer.backward(made[0]))
    return {"forward": [n for n, _ in forward], "backward": [n for n, _ in backward]}


def counted(name: str) -> str:
    """Returns the launches and collectives that were counted without a GPU, or an empty text."""
    passes = json.loads(COUNTED.read_text())["counts"].get(name, {})
    return " / ".join(str(c["launches"] + c["collectives"]) for c in passes.values())


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    join_twin()
    about = {
        "hardware": torch.cuda.get_device_name() if GPU else processor(),
        "torch": torch.__version__,
    }
    record = Record(args.output, about)
    names = [name for name in LAYERS if GPU or name != "SyncBatchNorm"]  # it refuses CPU tensors
    print(f"host, float32, {SMALL}: us forward and backward, and kernels (counted without a GPU)")
    for name in names:
        layer = Layer(LAYERS[name], SMALL, "float32", "NCHW")
        us = 1e6 * host_seconds(layer.step, repeats=args.repeats)
        kernels = launches(layer)
        found, expected = " / ".join(str(len(k)) for k in kernels.values()), counted(name)
        record.add(
            {"norm": name, "shape": SMALL, "host_us": us, "launches": kernels, "counted": expected}
        )
        note = f" (counted: {expected})" if expected else ""
        print(f"{name}: {us:.0f} us, {found} kernels{note}", flush=True)
    print("device: us of the kernels, forward and backward, and time over that of SyncBatchNorm")
    for shape in args.shapes:
        for dtype in ("bfloat16", "float32"):
            for layout in LAYOUTS:
                times = {n: device_us(n, shape, dtype, layout, args.repeats) for n in names}
                record.add({"shape": shape, "dtype": dtype, "layout": layout, "device_us": times})
                base = times.get("SyncBatchNorm") or times["BatchNorm2d"]
                cells = [f"{name} {t:.0f} ({t / base:.2f})" for name, t in times.items()]
                print(shape, dtype, layout, "; ".join(cells), flush=True)


def device_us(name: str, shape: tuple[int, ...], dtype: str, layout: str, repeats: int) -> float:
    """Returns the microseconds of the layer's kernels, or of the whole step without a GPU."""
    layer = Layer(LAYERS[name], shape, dtype, layout)
    if not GPU:
        return 1e6 * host_seconds(layer.step, 1, 1)

    def steps() -> None:
        for _ in range(repeats):
            layer.step()

    synchronize()
    return 1e6 * sum(seconds for _, seconds in device_events(steps)) / repeats


def parse() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    parser.add_argument("--repeats", type=int, default=10, help="timed repetitions")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file")
    args = parser.parse_args()
    args.shapes = [(2, 8, 4, 6)] if args.tiny else LARGE
    return args


if __name__ == "__main__":
    main(parse())
