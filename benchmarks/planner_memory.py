"""Compares the predicted memory of training steps with the measured one.

    python benchmarks/planner_memory.py --output FILE.json    # goes on where it was stopped
    python benchmarks/planner_memory.py --only mask           # some settings

A measurement is a step of the real model with real tensors on the CPU: its peak, with weights and
momentum, by the profiler's record of every allocation. The prediction sees neither these images nor
their proposals. Images for mask and keypoint heads have as many objects as the heads take regions,
since an untrained RPN finds few.
"""

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import SimpleTrainer
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile, record_function

import megdet_d2
from megdet_d2.engine import Trainer
from megdet_d2.engine.precision import build_inner_trainer
from megdet_d2.memory import STAGES
from megdet_d2.planner.memory import MemoryModel

CONFIGS = Path(__file__).parents[1] / "configs"

DEFAULT = ("res2", "res3", "res4", "res5", "fpn")
R18 = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
R101 = ("MODEL.RESNETS.DEPTH", 101)
ALL_TRAINED = ("MODEL.BACKBONE.FREEZE_AT", 0)
FASTER = "Base-MegDet-R50-FPN"
MASK = "Base-MegDet-Mask-R50-FPN"
RETINANET = "Base-MegDet-RetinaNet-R50-FPN"
FEWER = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 128)
KEYPOINT = (
    "MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NUM_CLASSES", 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32,
)  # fmt: skip
BFLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")
CASCADE = (
    "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True
)  # fmt: skip
SMALL, MEDIUM, LARGE = (192, 256), (256, 320), (480, 640)

# name, config, changes, height and width, objects per image, (images per GPU, stages), ...
SETTINGS: list[tuple[str, str, tuple, tuple[int, int], int, list[tuple[int, tuple]]]] = [
    ("Faster R18", FASTER, (*R18, *FEWER, *ALL_TRAINED), SMALL, 20,
     [(1, ()), (2, ()), (4, ()), (8, ()), (1, DEFAULT), (4, DEFAULT), (8, DEFAULT), (4, STAGES)]),
    ("Mask R18", MASK, (*R18, *FEWER), SMALL, 40, [(1, ()), (2, ()), (4, ()), (2, STAGES)]),
    ("RetinaNet R18", RETINANET, R18, SMALL, 20, [(1, ()), (4, ()), (8, ()), (4, DEFAULT)]),
    ("thin detector", "ablations/Base-study", (), (32, 32), 6,
     [(1, ()), (8, ()), (16, ()), (32, ()), (48, ()), (16, ("res2", "res3"))]),
    ("Mask R50", MASK, FEWER, MEDIUM, 40, [(1, ()), (2, DEFAULT)]),
    ("Keypoint R18", MASK, (*R18, *KEYPOINT), SMALL, 20, [(1, ())]),
    ("Faster R50", FASTER, (), MEDIUM, 20, [(1, ()), (3, ()), (4, ()), (2, DEFAULT)]),
    ("RetinaNet R50", RETINANET, (), MEDIUM, 20, [(2, ()), (2, STAGES[1:7])]),
    ("Faster R101", FASTER, R101, MEDIUM, 20, [(1, ()), (2, DEFAULT)]),
    ("Cascade R18", FASTER, (*R18, *CASCADE), SMALL, 20, [(2, ())]),
    ("Faster R18, bfloat16", FASTER, (*R18, *BFLOAT16), SMALL, 20, [(4, ())]),
    ("Faster R50, all trained", FASTER, ALL_TRAINED, LARGE, 12, [(1, ()), (1, DEFAULT)]),
]  # fmt: skip


def make_config(name: str, *changes: Any) -> CfgNode:
    """Returns a config of the repository with ``changes``, for random weights on a CPU."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.CGBN.BN_SIZE = "", "cpu", -1
    cfg.merge_from_list(list(changes))
    return cfg


def random_batch(cfg: CfgNode, images: int, size: tuple[int, int], objects: int) -> list[dict]:
    """Returns images of noise with overlapping objects."""
    generator = torch.Generator().manual_seed(1)
    height, width = size
    batch = []
    for _ in range(images):
        extent = torch.tensor([width, height])
        sides = (0.2 + 0.5 * torch.rand(objects, 2, generator=generator)) * extent
        corners = torch.rand(objects, 2, generator=generator) * (extent - sides)
        truth = Instances(size, gt_boxes=Boxes(torch.cat([corners, corners + sides], 1)))
        truth.gt_classes = torch.randint(
            cfg.MODEL.ROI_HEADS.NUM_CLASSES, (objects,), generator=generator
        )
        if cfg.MODEL.MASK_ON:
            corners_of = truth.gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3]].double().numpy()
            truth.gt_masks = PolygonMasks([[triangle] for triangle in corners_of])
        if cfg.MODEL.KEYPOINT_ON:
            points = torch.rand(objects, 17, 2, generator=generator) * sides[:, None]
            points = points + corners[:, None]
            truth.gt_keypoints = Keypoints(
                torch.cat([points, torch.full((objects, 17, 1), 2.0)], 2)
            )
        image = torch.randint(256, (3, height, width), generator=generator).to(torch.uint8)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


def measure(cfg: CfgNode, batch: list[dict]) -> tuple[int, float]:
    """Returns the measured peak of a step, and the regions of objects per image."""
    gc.collect()
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = Trainer.build_model(cfg).train()
        optimizer = Trainer.build_optimizer(cfg, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # as after a first step, there are momentum and gradients
        trainer = build_inner_trainer(SimpleTrainer(model, [batch] * 2, optimizer), cfg)
        trainer.iter = 0
        with EventStorage(0) as trainer.storage, record_function("the step"):
            trainer.run_step()
    # The profiler's public tables sum bytes by operator; only this list has each allocation.
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    started = False
    for event in events:
        started = started or event.name() == "the step"
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if started else 0
    return peak, trainer.storage.latest().get("roi_head/num_fg_samples", (0.0, 0))[0]


def run(only: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a row per setting that ``rows`` lacks: predicted and measured bytes."""
    done = [[row["model"], row["images"], list(row["sublinear"])] for row in rows]
    for name, file, changes, size, objects, cases in SETTINGS:
        model = MemoryModel(make_config(file, *changes), device="cpu", size=size, objects=objects)
        for images, stages in cases:
            if only.lower() not in name.lower() or [name, images, list(stages)] in done:
                continue
            start = time.process_time()
            predicted = model.predict(images, sublinear=stages)
            seconds = time.process_time() - start
            cfg = make_config(
                file, *changes, "SOLVER.IMS_PER_BATCH", images,
                "MODEL.SUBLINEAR.ENABLED", bool(stages), "MODEL.SUBLINEAR.STAGES", stages,
            )  # fmt: skip
            measured, regions = measure(cfg, random_batch(cfg, images, size, objects))
            yield {
                "model": name, "size": size, "images": images, "sublinear": stages,
                "predicted": predicted.total, "measured": measured, "parts": predicted.parts(),
                "seconds": round(seconds, 1), "regions_of_objects": float(regions),
            }  # fmt: skip


def tabulate_rows(rows: list[dict[str, Any]]) -> str:
    """Returns a table in Markdown, and a line with the worst errors."""
    table = [
        (
            row["model"], f"{row['size'][0]}x{row['size'][1]}", row["images"],
            ", ".join(row["sublinear"]) or "-", f"{row['predicted'] / 1e6:,.0f}",
            f"{row['measured'] / 1e6:,.0f}", f"{row['predicted'] / row['measured'] - 1:+.1%}",
        )
        for row in rows
    ]  # fmt: skip
    headers = ("model", "size", "images", "computed twice", "predicted MB", "measured MB", "error")
    errors = [row["predicted"] / row["measured"] - 1 for row in rows]
    summary = f"{len(rows)} settings: errors from {min(errors):+.1%} to {max(errors):+.1%}"
    return f"{tabulate(table, headers, 'pipe', disable_numparse=True)}\n\n{summary}"


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(args.threads)
    output = Path(args.output) if args.output else None
    rows = json.loads(output.read_text())["rows"] if output and output.exists() else []
    for row in run(args.only, rows):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if output:
            result = {
                "date": str(date.today()),
                "command": "python " + " ".join(sys.argv),
                "hardware": f"{platform.machine()} CPU, threads: {args.threads}; GPU: not run",
                "torch": torch.__version__,
                "rows": rows,
            }
            output.write_text(json.dumps(result, indent=1) + "\n")
    print(tabulate_rows(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this in their name")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU")
    parser.add_argument("--output", default="", metavar="FILE", help="JSON; its rows are kept")
    main(parser.parse_args())
