"""Times training steps of Faster R-CNN R50-FPN with several norms and switches, by images/s.

    python benchmarks/train_step.py                      # 2 gloo processes, small images, switches
    python benchmarks/train_step.py --processes 1 --height 800 --width 1344 --images 8   # one GPU
    torchrun --nproc-per-node 8 benchmarks/train_step.py --height 800 --width 1344

A step is forward, backward and update with SGD, under DDP. The model is that of
configs/Base-MegDet-R50-FPN.yaml with random weights. The images are random, the same for all norms,
and in memory; the norms take turns. The norm is in the backbone, after FREEZE_AT 2, and in the FPN.
With FrozenBN, the paper's baseline, the FPN has none. In the paper CGBN costs 19 % more than frozen
batch norm: 39.5 hours against 33.2 (Table 3, "16, BN size 16" and "16-base").

On CPUs, or with --switches, there is a row for CGBN with each switch of docs/training.md alone and
rows with all of them. They are compared with stock Detectron2, which is the row FrozenBN. Rows take
turns, and the table has medians. The script prints a table, and with --output writes JSON. Its last
line is the goal's figure: how many times faster than stock all switches are, without MODEL.COMPILE
where --no-compile leaves that out.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from norm import seconds, write_json
from tabulate import tabulate

import megdet_d2
from megdet_d2.engine.ema import build_average
from megdet_d2.engine.launch import launch
from megdet_d2.engine.sgd import set_sgd_implementation

BASE = Path(__file__).parent.parent / "configs" / "Base-MegDet-R50-FPN.yaml"
PAPER = 39.5 / 33.2
ALL, UNCOMPILED = "CGBN, all switches", "CGBN, all but compile"
SWITCHES: dict[str, dict[str, Any]] = {
    "channels_last": {"MODEL.CHANNELS_LAST": True},
    "compile": {"MODEL.COMPILE": True},
    "bfloat16": {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bfloat16"},
    "fused SGD": {"SOLVER.SGD_IMPLEMENTATION": "fused"},
    "EMA": {"MEGDET.EMA_DECAY": 0.9998},
    "float32 high": {"FLOAT32_PRECISION": "high"},
}


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


def with_switches() -> dict[str, dict[str, Any]]:
    """Returns the config keys of CGBN with each switch alone, and with all together."""
    cgbn = dict.fromkeys(("MODEL.RESNETS.NORM", "MODEL.FPN.NORM"), "CGBN")
    rows = {f"CGBN, {name}": {**cgbn, **keys} for name, keys in SWITCHES.items()}
    together = {key: value for keys in SWITCHES.values() for key, value in keys.items()}
    uncompiled = {**cgbn, **together, "MODEL.COMPILE": False}
    return {**rows, UNCOMPILED: uncompiled, ALL: {**cgbn, **together}}


def make_config(changes: dict[str, Any], device: torch.device) -> CfgNode:
    """Returns the base config with ``changes``, for random weights."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(BASE))
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", str(device)
    cfg.SOLVER.BASE_LR = 1e-4
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


class Step:
    """A training step of one row: forward, backward and update.

    Args:
        changes: the config keys of the row.
        device: of the model.
        inputs: the images of this process.
    """

    def __init__(self, changes: dict[str, Any], device: torch.device, inputs: list[dict[str, Any]]):
        torch.manual_seed(0)
        cfg = make_config(changes, device)
        model = megdet_d2.Trainer.build_model(cfg).train()
        for layer in model.modules():
            if isinstance(layer, FrozenBatchNorm2d):
                layer.weight.fill_(0.3)  # keeps the values of random weights bounded
        self._optimizer = build_optimizer(cfg, model)
        set_sgd_implementation(self._optimizer, cfg.SOLVER.SGD_IMPLEMENTATION)
        self._device, self._inputs = device, inputs
        index = None if device.index is None else [device.index]
        self._model = create_ddp_model(model, device_ids=index)
        self._average = build_average(cfg, model)
        self._bfloat16 = cfg.SOLVER.AMP.ENABLED
        self._float32 = cfg.FLOAT32_PRECISION or "highest"

    def __call__(self) -> None:
        """Runs the step."""
        torch.set_float32_matmul_precision(self._float32)
        self._optimizer.zero_grad()
        bfloat16 = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)
        with EventStorage(), bfloat16:
            loss = sum(self._model(self._inputs).values())
        loss.backward()
        self._optimizer.step()
        if self._average is not None:
            self._average.update()


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark in one process."""
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    repeats = args.repeats or (10 if gpu else 5)
    inputs, rows_of = make_inputs(args), norms(device)
    if args.switches or (args.switches is None and not gpu):
        rows_of |= with_switches()
    if not args.compile:
        rows_of = {name: row for name, row in rows_of.items() if not row.get("MODEL.COMPILE")}
    steps = {name: Step(changes, device, inputs) for name, changes in rows_of.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 2):
        for name, one in steps.items():
            comm.synchronize()
            cpu = time.process_time()
            elapsed = seconds(one, device)
            if i >= 2:  # the first two warm up
                times[name].append(elapsed)
                cpu_times[name].append(time.process_time() - cpu)
    if comm.get_rank() > 0:
        return
    medians = {name: statistics.median(values) for name, values in times.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_times.items()}
    images = args.images * comm.get_world_size()
    rows: list[tuple[str, float | None, float, float | None, float | None]] = [
        (
            name,
            images / t,
            t / medians["FrozenBN"],
            t / medians["CGBN"],
            cpu_medians[name] / cpu_medians["FrozenBN"],
        )
        for name, t in medians.items()
    ]
    rows.append(("CGBN, the paper's cluster", None, PAPER, None, None))
    headers = ("norm", "images / s", "time / FrozenBN", "time / CGBN", "CPU time / FrozenBN")
    print(tabulate(rows, headers, floatfmt=".2f", tablefmt="pipe"))
    result = {"columns": list(headers), "rows": rows, "seconds": times, "cpu_seconds": cpu_times}
    write_json(args, device, result)
    goal = medians.get(ALL, medians.get(UNCOMPILED))
    if goal:
        print(f"ratio train_step {medians['FrozenBN'] / goal:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    started = "LOCAL_RANK" in os.environ  # by torchrun, which sets the number of processes
    processes = 1 if started else 2
    parser.add_argument(
        "--processes", type=int, metavar="N", default=processes, dest="num_gpus", help="processes"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads per process on CPU")
    parser.add_argument("--images", type=int, default=1, help="images per process (default 1)")
    parser.add_argument("--height", type=int, default=192, help="image height")
    parser.add_argument("--width", type=int, default=256, help="image width")
    parser.add_argument("--repeats", type=int, help="timed steps per row (10, or 5 on CPUs)")
    parser.add_argument(
        "--switches",
        action=argparse.BooleanOptionalAction,
        help="also time CGBN with each switch and with all (default: on CPUs)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time the rows with MODEL.COMPILE, whose first step takes minutes",
    )
    parser.add_argument("--output", default="", metavar="FILE", help="also write JSON to this file")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    launch(main, parser.parse_args())
