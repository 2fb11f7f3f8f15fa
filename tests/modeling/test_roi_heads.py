"""Trains the appendix's ROI heads on two processes with CGBN, one of them without a proposal."""

import copy

import torch
from detectron2.engine.defaults import create_ddp_model

from megdet_d2.memory import STAGES, checkpoint_stages
from megdet_d2.norm.batch_norm import cgbn_layers
from tests.helpers.bitwise import differing_tensors, images, train_step
from tests.helpers.models import build, tiny_config

NAMES = ["OHEMROIHeads", "ContextROIHeads", "SegmentationROIHeads", "ChallengeROIHeads"]


def step(model, batch):
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    left = train_step(ddp, batch)
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    return left, unused


def train_without_proposals(rank, name, amp):
    """Trains a step; rank 1 has no objects, and an RPN without proposals."""
    cfg = tiny_config("MODEL.ROI_HEADS.NAME", name, "MODEL.SEGMENTATION.NORM", "CGBN")
    batch = images(rank)
    if rank == 1:
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 0
        for image in batch:
            image["instances"] = image["instances"][:0]
    plain = build(cfg)
    sublinear = checkpoint_stages(copy.deepcopy(plain), STAGES)
    proposals = []
    for model in (plain, sublinear):
        model.roi_heads.box_head.register_forward_pre_hook(
            lambda _, args: proposals.append(len(args[0]))
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        (left, unused), (again, _) = step(plain, batch), step(sublinear, batch)
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    layers = len(cgbn_layers(plain))
    return {
        "proposals": proposals,
        "unused": unused,
        "unequal": differing_tensors(again, left),
        "collectives": int(left["all-reduces"]) - 2 * layers,
        "sums": {name: g.double().sum().item() for name, g in gradients.items()},
        "finite": all(g.isfinite().all().item() for g in gradients.values()),
    }


def test_a_process_without_proposals_stays_in_step(pool2):
    for name, amp in [*((name, False) for name in NAMES), ("ChallengeROIHeads", True)]:
        first, second = pool2.run(train_without_proposals, name, amp)
        assert set(second["proposals"]) == {0} and min(first["proposals"]) > 0
        for reply in (first, second):
            assert not reply["unused"] and reply["finite"], (name, reply["unused"])
            assert not reply["unequal"], (name, amp, reply["unequal"])
            assert reply["collectives"] == 0, name  # one a layer and direction: none for mining
        assert first["sums"] == second["sums"]  # DDP's average: both had the same parameters
