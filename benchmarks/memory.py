"""Measures what sublinear memory saves and costs: bytes kept for backward, peak memory, time.

    python benchmarks/memory.py                                   # R50-FPN, 800x1344, one image
    python benchmarks/memory.py --height 400 --width 672 --repeats 5

It runs training steps of Faster R-CNN R50-FPN with CGBN, nothing frozen, on random images.

* Kept bytes are ``megdet_d2.memory.kept_bytes`` of the forward pass.
* Peak is the most that torch's allocator held during forward and backward, with the gradients of
  the parameters, without the parameters. On CPU it comes from the profiler's record of every
  allocation and is the same in every run. It does not include work space of convolution libraries.
* Time is in seconds of the GPU, or of this process's CPU, so that other programs do not count.
  Plain and checkpointed models take turns; ratios are medians over the turns.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile

import megdet_d2
from megdet_d2.memory import STAGES, checkpoint_stages, kept_bytes

CONFIG = Path(__file__).parents[1] / "configs" / "Base-MegDet-R50-FPN.yaml"
DEFAULT = ("res2", "res3", "res4", "res5", "fpn")


def detector(device: torch.device) -> nn.Module:
    """Builds the detector in training mode, with random weights."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = str(device), "", 0
    torch.manual_seed(0)
    return build_model(cfg).train()


def random_images(number: int, height: int, width: int) -> list[dict[str, Any]]:
    """Returns images with twelve boxes each, as Detectron2's models take them."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(number):
        size = torch.tensor([width, height])
        corners = torch.rand(12, 2, generator=generator) * size * 0.6
        sizes = torch.rand(12, 2, generator=generator) * size * 0.35 + 8
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.gt_classes = torch.randint(0, 80, (12,), generator=generator)
        image = torch.randint(0, 255, (3, height, width), generator=generator)
        batch.append({"image": image, "instances": instances})
    return batch


def forward(model: nn.Module, batch: list[dict[str, Any]]) -> torch.Tensor:
    """Returns the sum of the losses."""
    torch.manual_seed(1)  # so that each model samples the same proposals
    with EventStorage():
        return sum(model(batch).values())


def step(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Runs forward and backward."""
    model.zero_grad(set_to_none=True)
    forward(model, batch).backward()


def kept(model: nn.Module, batch: list[dict[str, Any]]) -> int:
    """Returns the bytes that forward keeps for backward."""
    with kept_bytes(model) as count:
        forward(model, batch)
    return count()


def peak(model: nn.Module, batch: list[dict[str, Any]], device: torch.device) -> int:
    """Returns the most bytes that torch's allocator holds during a step, without parameters."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        step(model, batch)  # in the first step libraries allocate memory that they keep
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(model, batch)
    # The profiler's public tables sum bytes by operator; only this list has each allocation.
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def seconds(model: nn.Module, batch: list[dict[str, Any]], device: torch.device) -> float:
    """Returns the seconds of a step, of the GPU or of this process's CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(model, batch)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step(model, batch)
    return time.process_time() - start


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    batch = random_images(args.images, args.height, args.width)
    plain = detector(device)
    rows: list[dict[str, Any]] = [
        {"stages": "none", "kept": kept(plain, batch), "peak": peak(plain, batch, device)}
    ]
    for name, stages in (("default", DEFAULT), ("all", STAGES)):
        model = checkpoint_stages(copy.deepcopy(plain), stages, args.blocks)
        row = {"stages": name, "kept": kept(model, batch), "peak": peak(model, batch, device)}
        times = [
            [seconds(model, batch, device), seconds(plain, batch, device)]
            for _ in range(args.repeats)
        ]
        rows.append({**row, "seconds": times})
        print(rows[-1], file=sys.stderr, flush=True)
        del model
    for stage in STAGES:
        model = checkpoint_stages(copy.deepcopy(plain), (stage,), args.blocks)
        rows.append({"stages": stage, "kept": kept(model, batch)})
        print(rows[-1], file=sys.stderr, flush=True)
    report(rows, args, device, plain)


def report(
    rows: list[dict[str, Any]], args: argparse.Namespace, device: torch.device, model: nn.Module
) -> None:
    """Prints the table and writes the JSON file."""
    table = []
    for row in rows:
        line = [row["stages"]]
        for key in ("kept", "peak"):
            if key in row:
                line += [f"{row[key] / 1e6:,.0f}", f"{row[key] / rows[0][key]:.1%}"]
        if row.get("seconds"):
            line.append(f"{statistics.median(ours / base for ours, base in row['seconds']):.2f}")
        table.append(line)
    headers = ("computed twice", "kept MB", "of plain", "peak MB", "of plain", "time / plain")
    print(tabulate(table, headers, "pipe", disable_numparse=True))
    if args.output:
        gpu = device.type == "cuda"
        cpu = f"{platform.machine()} CPU, threads: {args.threads}"
        result = {
            "date": str(date.today()),
            "command": "python " + " ".join(sys.argv),
            "hardware": torch.cuda.get_device_name() if gpu else cpu,
            "torch": torch.__version__,
            "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "seconds": "of each pair the first checkpointed, the second plain",
            "rows": rows,
        }
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1, help="images per step")
    parser.add_argument("--height", type=int, default=800, help="image height")
    parser.add_argument("--width", type=int, default=1344, help="image width")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks per segment")
    parser.add_argument("--threads", type=int, default=1, help="threads on CPU")
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs of steps")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument("--output", default="", metavar="FILE", help="also write JSON to this file")
    main(parser.parse_args())
