"""Compares the predicted memory of a step with the measured one, and tests parts and allocator.

``benchmarks/planner_memory.py`` does the same for forty settings.
"""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from benchmarks.planner_memory import (
    FASTER,
    MASK,
    R18,
    RETINANET,
    make_config,
    measure,
    random_batch,
)
from megdet_d2.engine import Trainer
from megdet_d2.planner.allocator import reserved_bytes
from megdet_d2.planner.memory import MemoryModel, largest_image
from tests.helpers.models import tiny_config

SIZE = (100, 130)  # padded to 128 x 160
MB = 1 << 20
THIN = (
    *R18, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
)  # fmt: skip


@pytest.mark.parametrize(
    "config, images, stages",
    [
        (FASTER, 2, ()),
        (FASTER, 3, ("res2", "res3", "res4", "res5", "fpn")),
        (MASK, 2, ()),
        (RETINANET, 2, ()),
    ],
    ids=["Faster", "Faster, sublinear, interpolated", "Mask", "RetinaNet"],
)
def test_predicts_the_measured_peak(config, images, stages):
    changes = (
        *THIN, "SOLVER.IMS_PER_BATCH", images,
        "MODEL.SUBLINEAR.ENABLED", bool(stages), "MODEL.SUBLINEAR.STAGES", stages,
    )  # fmt: skip
    cfg = make_config(config, *changes)
    predicted = MemoryModel(cfg, device="cpu", size=SIZE, objects=12).predict(
        images, sublinear=stages
    )
    measured, _ = measure(cfg, random_batch(cfg, images, SIZE, 12))
    assert 0.97 * measured <= predicted.total <= 1.10 * measured


@pytest.fixture(scope="module")
def tiny():
    return MemoryModel(tiny_config(), size=(64, 64), objects=4)


def test_parts_of_a_training(tiny):
    one, many = tiny.predict(2), tiny.predict(2, world_size=8)
    assert one.total == sum(one.parts().values())
    assert one.buckets == 0 and one.average == 0
    assert many.buckets == one.optimizer == many.total - one.total
    assert 0 < one.norm < one.parameters
    assert one.slack > 0


def test_more_images_need_more(tiny):
    totals = [tiny.predict(images).activations for images in (1, 2, 3, 4)]
    assert totals == sorted(totals)


def test_average_of_the_weights_is_one_more_copy():
    cfg = tiny_config("MEGDET.EMA_DECAY", 0.999)
    memory = MemoryModel(cfg, device="cpu", size=(64, 64), objects=4).predict(1)
    assert memory.average == memory.parameters + memory.norm


@pytest.mark.timeout(120)  # the first import of timm reads a thousand files
def test_the_state_of_an_optimizer():
    """One number per weight is SGD's momentum; LAMB has two moments. AGVM keeps half a gradient."""
    found = {}
    for name in ("sgd", "lamb", "agvm"):
        cfg = tiny_config("MEGDET.OPTIMIZER", name)
        found[name] = MemoryModel(cfg, device="cpu", size=(64, 64), objects=4)
    sgd, lamb, agvm = (found[name].predict(1) for name in ("sgd", "lamb", "agvm"))
    weights = sum(4 * p.numel() for p in Trainer.build_model(tiny_config()).parameters())
    assert sgd.optimizer == agvm.optimizer == weights and lamb.optimizer == 2 * weights
    assert agvm.gradients == sgd.gradients + weights
    assert found["agvm"].predict(1, world_size=2).gradients == sgd.gradients
    assert not any(model.notes for model in found.values())


def test_frozen_stages_have_neither_gradients_nor_momentum():
    frozen = tiny_config("MODEL.BACKBONE.FREEZE_AT", 3)
    options = {"device": "cpu", "size": (64, 64), "objects": 4}
    some = MemoryModel(frozen, **options).predict(2)
    every = MemoryModel(tiny_config(), **options).predict(2)
    assert some.optimizer < every.optimizer and some.activations < every.activations


def test_images_without_objects(tiny):
    empty = MemoryModel(tiny_config(), size=(64, 64), objects=0)
    assert not empty.notes
    assert empty.predict(1).total <= tiny.predict(1).total


class OfTheUser(nn.Module):
    """Builds a model that leaves torch in the middle of its forward."""

    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, batch):
        features = self.layer(torch.stack([image["image"].float() for image in batch]))
        weight = torch.from_numpy(features.detach().numpy().mean(axis=1, keepdims=True))
        return {"loss": (features * weight).mean()}


def test_a_model_that_cannot_be_traced_runs_a_real_step(monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OfTheUser", OfTheUser)
    cfg = tiny_config("MODEL.META_ARCHITECTURE", "OfTheUser")
    model = MemoryModel(cfg, device="cpu", size=(64, 64))
    memory = model.predict(4)
    assert "OfTheUser cannot be traced" in model.notes[0]
    image = 8 * 62 * 62 * 4
    assert 4 * image <= memory.activations <= 16 * image


def test_invalid_input_names_the_fix(tiny):
    with pytest.raises(ValueError, match="images_per_gpu is 0; give 1 or more"):
        tiny.predict(0)
    with pytest.raises(ValueError, match="res9"):
        tiny.predict(1, sublinear=("res9",))


def test_largest_image():
    cfg = tiny_config("INPUT.MIN_SIZE_TRAIN", (640, 800), "INPUT.MAX_SIZE_TRAIN", 1333)
    assert largest_image(cfg) == (800, 1333)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert largest_image(cfg) == (1333, 1333)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    with pytest.raises(ValueError, match="INPUT.MIN_SIZE_TRAIN"):
        largest_image(cfg)


@pytest.mark.parametrize(
    "events, reserved",
    [
        ([(0, 1)], 2 * MB),  # a small segment
        ([(0, MB), (1, MB)], 2 * MB),  # shared
        ([(0, MB), (1, 1), (2, MB)], 4 * MB),
        ([(0, 2 * MB), (1, 9 * MB), (2, 9 * MB)], 20 * MB),
        ([(0, 2 * MB), (1, 9 * MB), (2, 9 * MB), (3, 2 * MB)], 40 * MB),
        ([(0, 11 * MB), (1, 13 * MB)], 12 * MB + 14 * MB),
        ([(0, 12 * MB), (0, -12 * MB), (1, 12 * MB)], 12 * MB),  # used again
        ([(0, 12 * MB), (0, -12 * MB), (1, 14 * MB)], 26 * MB),  # too small
        # 6 + 6 of a segment are free, and join
        ([(0, 6 * MB), (1, 6 * MB), (0, -6 * MB), (1, -6 * MB), (2, 16 * MB)], 20 * MB),
    ],
)
def test_caching_allocator(events, reserved):
    assert reserved_bytes(events) == reserved
