"""Times training steps of Faster R-CNN R50-FPN with several norms, in images per second.

    python benchmarks/train_step.py                      # 2 gloo processes, small images
    python benchmarks/train_step.py --processes 1 --height 800 --width 1344 --images 8   # one GPU
    torchrun --nproc-per-node 8 benchmarks/train_step.py --height 800 --width 1344

A step is forward, backward and update with SGD, under DDP. The model is that of
configs/Base-MegDet-R50-FPN.yaml with random weights. The images are random, the same for all norms,
and in memory; the norms take turns. The norm is in the backbone, after FREEZE_AT 2, and in the FPN.
With FrozenBN, the paper's baseline, the FPN has none. In the paper CGBN costs 19 % more than frozen
batch norm: 39.5 hours against 33.2 (Table 3, "16, BN size 16" and "16-base"). The script prints a
table, and with --output writes JSON.
"""

import argparse
import functools
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from norm import seconds, write_json
from tabulate import tabulate

import megdet_d2
from megdet_d2.engine.launch import launch

BASE = Path(__file__).parent.parent / "configs" / "Base-MegDet-R50-FPN.yaml"
PAPER = 39.5 / 33.2


def norms(device: torch.device) -> dict[str, dict[str, Any]]:
    """Returns the config keys of each norm, by its name in the table."""
    both = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM")
    sync = "SyncBN" if device.type == "cuda" else "naiveSyncBN"
    return {
        "FrozenBN": {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.FPN.NORM": ""},
        sync: dict.fromkeys(both, sync),
        "CGBN": dict.fromkeys(both, "CGBN"),
        "CGBN, fused": {**dict.fromkeys(both, "CGBN"), "MODEL.CGBN.FUSE_ACTIVATION": True},
    }


def make_config(changes: dict[str, Any], device: torch.device) -> CfgNode:
    """Returns the base config with ``changes``, for random weights."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(BASE))
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", str(device)
    return cfg


def make_inputs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns random images of one size with ten boxes each."""
    generator = torch.Generator().manual_seed(comm.get_rank())
    inputs = []
    for _ in range(args.images):
        corners = torch.rand(10, 2, generator=generator) * 0.7
        extents = 0.1 + 0.2 * torch.rand(10, 2, generator=generator)
        boxes = torch.cat([corners, corners + extents], 1)
        boxes *= torch.tensor([args.width, args.height] * 2)
        instances = Instances((args.height, args.width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(80, (10,), generator=generator)
        image = torch.randint(256, (3, args.height, args.width), generator=generator)
        inputs.append({"image": image.to(torch.uint8), "instances": instances})
    return inputs


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: list[dict[str, Any]]
) -> None:
    """Runs forward, backward and update."""
    optimizer.zero_grad()
    with EventStorage():
        sum(model(inputs).values()).backward()
    optimizer.step()


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark in one process."""
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    inputs, steps = make_inputs(args), {}
    for name, changes in norms(device).items():
        torch.manual_seed(0)
        cfg = make_config(changes, device)
        model = megdet_d2.Trainer.build_model(cfg).train()
        for layer in model.modules():
            if isinstance(layer, FrozenBatchNorm2d):
                layer.weight.fill_(0.3)  # keeps the values of random weights bounded
        model = create_ddp_model(model, device_ids=[device.index] if gpu else None)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        steps[name] = functools.partial(step, model, optimizer, inputs)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.repeats + 2):
        for name, one in steps.items():
            comm.synchronize()
            elapsed = seconds(one, device)
            if i >= 2:  # the first two warm up
                times[name].append(elapsed)
    if comm.get_rank() > 0:
        return
    medians = {name: statistics.median(values) for name, values in times.items()}
    images = args.images * comm.get_world_size()
    rows: list[tuple[str, float | None, float, float | None]] = [
        (name, images / t, t / medians["FrozenBN"], t / medians["CGBN"])
        for name, t in medians.items()
    ]
    rows.append(("CGBN, the paper's cluster", None, PAPER, None))
    headers = ("norm", "images / s", "time / FrozenBN", "time / CGBN")
    print(tabulate(rows, headers, floatfmt=".2f", tablefmt="pipe"))
    write_json(args, device, {"columns": list(headers), "rows": rows, "seconds": times})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    started = "LOCAL_RANK" in os.environ  # by torchrun, which sets the number of processes
    processes = 1 if started else 2
    parser.add_argument(
        "--processes", type=int, metavar="N", default=processes, dest="num_gpus", help="processes"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads per process on CPU")
    parser.add_argument("--images", type=int, default=2, help="images per process")
    parser.add_argument("--height", type=int, default=192, help="image height")
    parser.add_argument("--width", type=int, default=256, help="image width")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps per norm")
    parser.add_argument("--output", default="", metavar="FILE", help="also write JSON to this file")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    launch(main, parser.parse_args())
