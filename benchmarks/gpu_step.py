"""Times a training step of Faster R-CNN R50-FPN on one GPU that runs as one of two processes.

    python benchmarks/gpu_step.py --output result.json

Without a group CGBN makes no collective and SyncBN is a plain batch norm. So one process runs the
code for two, see ``twin``. It does so without DDP, whose part is equal for all norms, and which
refuses such a group in torch 2.11. Model, images and norms are those of ``train_step``. bfloat16 is
autocast. The norms take turns; the table has medians.
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.events import EventStorage
from gpu_timing import DEVICE, GPU, Record
from norm import processor, seconds
from tabulate import tabulate
from train_step import make_config, make_inputs
from twin import join_twin

import megdet_d2

BOTH = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM")
NORMS: dict[str, dict[str, Any]] = {
    "FrozenBN": {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.FPN.NORM": ""},
    "SyncBN": dict.fromkeys(BOTH, "SyncBN"),
    "naiveSyncBN": dict.fromkeys(BOTH, "naiveSyncBN"),
    "CGBN": dict.fromkeys(BOTH, "CGBN"),
    "CGBN, fused": {**dict.fromkeys(BOTH, "CGBN"), "MODEL.CGBN.FUSE_ACTIVATION": True},
}


def build(changes: dict[str, Any]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Returns the model with random weights, in training mode, and its optimizer."""
    torch.manual_seed(0)
    model = megdet_d2.Trainer.build_model(make_config(changes, DEVICE)).train()
    for layer in model.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.weight.fill_(0.3)  # keeps the values of random weights bounded
    return model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: list[dict[str, Any]],
    dtype: torch.dtype,
) -> None:
    """Runs forward, backward and update."""
    optimizer.zero_grad()
    with EventStorage(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        losses = sum(model(inputs).values())
    losses.backward()
    optimizer.step()


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    join_twin()
    about = {
        "hardware": torch.cuda.get_device_name() if GPU else processor(),
        "torch": torch.__version__,
        "images": args.images,
        "size": (args.height, args.width),
    }
    record = Record(args.output, about)
    inputs = make_inputs(args)
    built = {name: build(changes) for name, changes in NORMS.items() if GPU or name != "SyncBN"}
    for dtype in args.dtypes:
        times: dict[str, list[float]] = {name: [] for name in built}
        for i in range(args.warm_up + args.repeats):
            for name, (model, optimizer) in built.items():
                one = functools.partial(step, model, optimizer, inputs, getattr(torch, dtype))
                elapsed = seconds(one, DEVICE)
                if i >= args.warm_up:
                    times[name].append(elapsed)
        medians = {name: statistics.median(values) for name, values in times.items()}
        table = []
        for name, median in medians.items():
            record.add({"norm": name, "dtype": dtype, "seconds": times[name]})
            frozen, cgbn = median / medians["FrozenBN"], median / medians["CGBN"]
            table.append((f"{name}, {dtype}", args.images / median, frozen, cgbn))
        headers = ("norm", "images / s", "time / FrozenBN", "time / CGBN")
        print(tabulate(table, headers, floatfmt=".2f", tablefmt="pipe"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2, help="images per step")
    parser.add_argument("--height", type=int, default=800, help="image height")
    parser.add_argument("--width", type=int, default=1344, help="image width")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--warm-up", type=int, default=2, help="steps per norm before those")
    parser.add_argument("--repeats", type=int, default=6, help="timed steps per norm")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file")
    main(parser.parse_args())
