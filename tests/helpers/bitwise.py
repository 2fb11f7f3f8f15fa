"""Compares one training step of two detectors to the last bit."""

import collections
import copy

import torch
from detectron2.engine.defaults import create_ddp_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from megdet_d2.memory import checkpoint_stages
from tests.helpers.collectives import counted_all_reduces
from tests.helpers.models import build, tiny_config


def images(rank, height=64, width=64, number=2):
    """Makes inputs of a detector: random pixels, boxes, classes and masks."""
    generator = torch.Generator().manual_seed(rank)
    batch = []
    for _ in range(number):
        corners = torch.rand(4, 2, generator=generator) * torch.tensor([width, height]) / 2
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + 24], dim=1))
        instances.gt_classes = torch.arange(4)
        instances.gt_masks = BitMasks(torch.rand(4, height, width, generator=generator) > 0.5)
        image = torch.randint(0, 255, (3, height, width), generator=generator)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def train_step(model, batch):
    """Makes one step, and returns all that it leaves behind, as tensors by name."""
    torch.manual_seed(1)  # for the proposals that are sampled
    with EventStorage(), counted_all_reduces() as lengths:
        losses = model(batch)
        sum(losses.values()).backward()
    left = {f"loss {name}": value.detach() for name, value in losses.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            left[f"gradient {name}"] = parameter.grad
    left |= {f"buffer {name}": value for name, value in model.named_buffers()}
    left["all-reduces"] = torch.tensor(len(lengths))
    return left


def differing_tensors(got, expected):
    """Returns the names of the tensors that are not equal to the last bit."""
    assert got.keys() == expected.keys()
    return [name for name in got if not torch.equal(got[name], expected[name])]


def count_calls(modules):
    """Returns a counter of calls, by the index of the module; it goes on counting."""
    calls = collections.Counter()
    for i, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    return calls


def compare_detectors(rank, overrides, stages, ddp=False):
    """Compares a step with the activations of ``stages`` computed again to a plain one.

    Returns the names of the tensors that differ, and the number of all-reduces.
    """
    cfg = tiny_config(*overrides)
    plain = build(cfg)
    ours = checkpoint_stages(copy.deepcopy(plain), stages)
    calls = count_calls(ours.backbone.bottom_up.res4)
    if ddp:
        options = {"broadcast_buffers": False, "device_ids": None}
        plain, ours = (create_ddp_model(model, **options) for model in (plain, ours))
    expected, got = train_step(plain, images(rank)), train_step(ours, images(rank))
    assert set(calls.values()) == {2}, calls  # otherwise nothing was computed again
    assert any(name.startswith("gradient") for name in got)
    return differing_tensors(got, expected), int(got["all-reduces"])
