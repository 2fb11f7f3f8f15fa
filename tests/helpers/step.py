"""Trains a small detector for two steps on two processes, one of which has no proposal."""

import contextlib

import torch
from detectron2.engine.defaults import create_ddp_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.helpers.models import build, reduced_config

SIDE = 48


def image(boxes):
    instances = Instances((SIDE, SIDE))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    pixels = torch.randint(0, 255, (3, SIDE, SIDE), dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "height": SIDE, "width": SIDE}


def train_two_steps(rank, overrides, half=False):
    """Runs two steps under DDP; the second one fails if a parameter had no gradient.

    Rank 1 has an image without a box, and no proposal. Returns the sums of all gradients by name,
    equal on all ranks, and the number of regions in the box head.
    """
    model = build(reduced_config(*overrides))
    boxes = [[6, 6, 22, 26], [20, 18, 40, 44]]
    if rank == 1:
        model.proposal_generator.post_nms_topk[True] = 0
        boxes = []
    regions = []
    model.roi_heads.box_head.register_forward_pre_hook(lambda _, x: regions.append(len(x[0])))
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    autocast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    for _ in range(2):
        model.zero_grad()
        with EventStorage(), autocast:
            losses = ddp([image(boxes), image(boxes)])
        sum(losses.values()).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad.isfinite().all() for _, p in trained)
    return {n: p.grad.double().sum().item() for n, p in trained}, regions[0]


def check_two_steps(pool, overrides, half=False):
    """Checks the results of ``train_two_steps``; returns the sums of the gradients by name."""
    (sums, regions), (others, none) = pool.run(train_two_steps, list(overrides), half, timeout=120)
    assert regions > 0 and none == 0
    assert sums == others
    return sums


def with_gradient(sums, part):
    """Returns True if some parameters have ``part`` in their name, and all a gradient."""
    found = [value for name, value in sums.items() if part in name]
    return bool(found) and all(value != 0 for value in found)
