"""Compares the predicted memory of training steps with the measured one.

    python benchmarks/planner_memory.py                                    # all settings, on CPU
    python benchmarks/planner_memory.py --only mask --output FILE.json

A measurement is two steps of the real model with real tensors: the second one's peak, with weights
and momentum, by the profiler's record of every allocation. It shares no code with the prediction.
The images are random, and each has as many objects as the heads sample, like after some training.
"""

import argparse
import gc
import json
import platform
import sys
import time
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
from megdet_d2.planner.memory import MemoryModel

CONFIGS = Path(__file__).parents[1] / "configs"


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
