"""Frozen layers that no weights were loaded into are an error before the first update."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import resnet18

from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.frozen import find_frozen_at_random
from tests.helpers.training import config, settle

FROZEN = ("MODEL.BACKBONE.FREEZE_AT", 3)


class Pretrained(Trainer):
    """A project that loads the weights of its backbone itself."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        for name, buffer in model.backbone.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-1, 1)
        return model


def start(kind, output, coco, *overrides):
    cfg = config(output, coco, *overrides)
    prepare_config(cfg)
    trainer = kind(cfg)
    trainer.resume_or_load(False)
    return trainer


@pytest.mark.parametrize("norm", ["CGBN", "BN", "FrozenBN", "GN"])
def test_frozen_stages_without_weights_are_refused(coco, tmp_path, norm):
    keys = ("MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    if norm == "GN":
        keys += ("MODEL.RESNETS.WIDTH_PER_GROUP", 32)
    with pytest.raises(ValueError, match="stem.conv1.*are frozen with random weights") as error:
        start(Trainer, tmp_path, coco, *FROZEN, *keys).train()
    for words in ("MODEL.WEIGHTS ''", "FREEZE_AT is 3", "Set MODEL.BACKBONE.FREEZE_AT 0"):
        assert words in str(error.value)


def save(output, coco, without="nothing"):
    trainer = start(Trainer, output, coco, "MODEL.BACKBONE.FREEZE_AT", 0)
    model = settle(trainer.model)
    state = {k: v for k, v in model.state_dict().items() if without not in k}
    torch.save({"model": state}, output / "weights.pth")
    return ("MODEL.WEIGHTS", str(output / "weights.pth"))


def test_loaded_weights_are_welcome(coco, tmp_path):
    weights = save(tmp_path, coco)
    trainer = start(Trainer, tmp_path, coco, *FROZEN, *weights)
    trainer.train()
    assert trainer.images_seen == 48


def test_weights_that_lack_a_frozen_stage_are_refused(coco, tmp_path):
    weights = save(tmp_path, coco, without="res3")
    with pytest.raises(ValueError, match=r"res3\.0\.\w+, .*weights.pth' has none for them"):
        start(Trainer, tmp_path, coco, *FROZEN, *weights).train()


def test_a_backbone_that_loads_its_weights_itself_is_welcome(coco, tmp_path):
    trainer = start(Pretrained, tmp_path, coco, *FROZEN)
    trainer.train()
    assert trainer.images_seen == 48


@pytest.mark.parametrize("keys", [(0, "CGBN"), (0, "FrozenBN")])
def test_layers_that_train_are_welcome(coco, tmp_path, keys):
    trainer = start(Trainer, tmp_path, coco, "MODEL.BACKBONE.FREEZE_AT", keys[0],
                    "MODEL.RESNETS.NORM", keys[1])  # fmt: skip
    assert find_frozen_at_random(trainer.model) == []


def test_detectron2s_folded_norms_count_as_loaded():
    """Its ImageNet weights have mean 0 and variance 1; scale and shift contain them."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model = build_model(cfg)
    assert len(find_frozen_at_random(model)) == 5  # the stem and two blocks of res2
    for name, buffer in model.backbone.named_buffers():
        if name.endswith(("norm.weight", "norm.bias")):
            buffer.uniform_(0.5, 2)
    assert find_frozen_at_random(model) == []


def test_a_neighbouring_norm_tells_too():
    model = resnet18()
    assert find_frozen_at_random(model) == []
    model.requires_grad_(False)
    names = find_frozen_at_random(model)
    assert "conv1" in names and "layer4.1.conv2" in names
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_()
    assert find_frozen_at_random(model) == []
