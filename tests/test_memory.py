"""Compares sublinear memory with the plain model: equal bits, fewer bytes, no collective twice."""

import collections
import copy
import inspect
import pickle

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import megdet_d2
from megdet_d2.engine import prepare_config
from megdet_d2.memory import STAGES, checkpoint_modules, checkpoint_stages, kept_bytes
from tests.helpers.bitwise import (
    compare_detectors,
    count_calls,
    differing_tensors,
    images,
    train_step,
)
from tests.helpers.models import build, cpu_config, tiny_config, with_norm
from tests.helpers.paths import CONFIGS

DEFAULT = ("res2", "res3", "res4", "res5", "fpn")


@pytest.mark.parametrize("ddp", [False, True], ids=["bare", "DDP"])
@pytest.mark.parametrize("stages", [DEFAULT, STAGES], ids=["default", "all"])
def test_cgbn_equals_the_plain_run_to_the_last_bit(pool2, stages, ddp):
    for unequal, collectives in pool2.run(compare_detectors, ["MODEL.MASK_ON", True], stages, ddp):
        assert not unequal
        assert collectives >= 2 * 59  # CGBN layers, each way: the pool was in use


def test_fused_blocks_equal_the_plain_run_to_the_last_bit(pool2):
    overrides = ["MODEL.CGBN.FUSE_ACTIVATION", True]
    for unequal, collectives in pool2.run(compare_detectors, overrides, DEFAULT):
        assert not unequal and collectives >= 2 * 59


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
def test_other_norms_equal_the_plain_run(norm):
    overrides = [
        *with_norm(norm),
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        32,
        "MODEL.FPN.OUT_CHANNELS",
        32,
    ]
    overrides += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32]
    assert compare_detectors(0, overrides, STAGES) == ([], 0)


def test_a_synchronized_norm_of_others_equals_the_plain_run(pool2):
    for unequal, _ in pool2.run(compare_detectors, with_norm("naiveSyncBN"), STAGES):
        assert not unequal  # it gathers twice, in step on all ranks


def test_frozen_stages_and_basic_blocks():
    basic = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    for overrides in (["MODEL.BACKBONE.FREEZE_AT", 3], basic):
        assert compare_detectors(0, overrides, STAGES) == ([], 0)


class CountConvolutions(TorchDispatchMode):
    """A mode that counts the convolutions by weight: a kept output is not computed again."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.calls[args[1].data_ptr()] += 1
        return func(*args, **kwargs or {})


def test_wide_convolutions_are_computed_once():
    model = checkpoint_stages(build(tiny_config()), ("res4",))
    stage = model.backbone.bottom_up.res4
    with CountConvolutions() as count:
        stage(torch.randn(2, 64, 8, 8)).square().sum().backward()
    for block in stage:
        calls = [count.calls[c.weight.data_ptr()] for c in (block.conv1, block.conv2, block.conv3)]
        assert calls == [2, 1, 2]


RETINANET = CONFIGS / "Base-MegDet-RetinaNet-R50-FPN.yaml"


def test_retinanet_with_statistics_by_level():
    cfg = cpu_config(
        RETINANET, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
        "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RETINANET.NORM", "CGBN",
    )  # fmt: skip
    plain = build(cfg)
    ours = checkpoint_stages(copy.deepcopy(plain), (*DEFAULT, "rpn"))
    batch = images(0, 128, 128)
    train_step(copy.deepcopy(plain), batch)  # the scripted loss rounds differently at first
    for _ in range(2):  # the second forward must use the same level's norm
        assert not differing_tensors(train_step(ours, batch), train_step(plain, batch))


class Tower(nn.Module):
    """A backbone without Detectron2's structure."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
            for _ in range(4)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


def test_plain_batch_norm_is_updated_once():
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    plain = Tower()
    ours, naive = copy.deepcopy(plain), copy.deepcopy(plain)
    checkpoint_modules(ours.layers)
    assert not differing_tensors(train_step(ours, x), train_step(plain, x))
    assert ours.layers[0][1].num_batches_tracked == 1

    # torch's checkpoint updates them twice, which the line above would detect.
    y = checkpoint(naive.layers[0], x, use_reentrant=False)
    y.sum().backward()
    assert naive.layers[0][1].num_batches_tracked == 2


def test_state_dict_copies_and_pickles():
    plain = Tower()
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours.layers)
    checkpoint_modules(ours.layers)  # a second call changes nothing
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 8, 8)
    expected = train_step(plain, x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours):
        calls = count_calls(layer[0] for layer in other.layers)
        assert not differing_tensors(train_step(other, x), expected)
        assert calls == dict.fromkeys(range(4), 2)  # the copy's own layers, each computed twice


def test_compiled_model_equals_the_plain_one():
    plain = megdet_d2.convert_cgbn(Tower())
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours.layers)
    x = torch.randn(2, 3, 8, 8)
    expected = train_step(plain, x)
    losses = torch.compile(ours, backend="aot_eager")(x)
    losses["loss"].backward()
    assert torch.equal(losses["loss"], expected["loss loss"])
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[f"gradient {name}"])
    for name, value in ours.named_buffers():
        assert torch.equal(value, expected[f"buffer {name}"])


def test_evaluation_and_no_grad_run_as_ever():
    plain = Tower()
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours.layers)
    x = torch.randn(2, 3, 8, 8)
    for mode, gradients in ((True, False), (False, True), (False, False)):
        for model in (plain, ours):
            model.train(mode)
        with torch.set_grad_enabled(gradients), kept_bytes(ours) as ours_kept:
            got = ours(x)["loss"]
        with torch.set_grad_enabled(gradients), kept_bytes(plain) as plain_kept:
            expected = plain(x)["loss"]
        assert torch.equal(got, expected) and ours_kept() == plain_kept()


def kept(model, batch):
    torch.manual_seed(1)
    with EventStorage(), kept_bytes(model) as count:
        model(batch)
    return count()


def test_count_is_right_where_it_can_be_known():
    layer = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sigmoid(), nn.Sigmoid())
    x = torch.randn(2, 3, 8, 8)
    with kept_bytes(layer) as count:
        layer(x)
    assert count() == 4 * (x.numel() + 2 * 2 * 5 * 8 * 8)  # the weight is no activation


@pytest.mark.skipif(
    "respect_saved_tensors_hooks" not in inspect.signature(checkpoint).parameters,
    reason="this torch does not show hooks what a segment keeps",
)
def test_keeping_everything_scores_all_bytes():
    plain = build(tiny_config())
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours.backbone.bottom_up.res2, keep=lambda op, *args: True)
    checkpoint_modules(ours.backbone.output_convs, keep=lambda op, *args: True)
    assert kept(ours, images(0)) >= kept(plain, images(0))


def test_r50_fpn_keeps_at_most_35_percent():
    # The paper's detector at a small size, with fewer regions in proportion to the image.
    cfg = cpu_config(
        CONFIGS / "Base-MegDet-R50-FPN.yaml",
        "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 12,
    )  # fmt: skip
    model, batch = build(cfg), images(0, 128, 192, number=1)
    plain = kept(model, batch)
    default = kept(checkpoint_stages(model, DEFAULT), batch)
    everything = kept(checkpoint_stages(model, STAGES), batch)
    assert everything <= 0.35 * plain
    assert everything < default < 0.5 * plain


def test_unknown_stage_is_refused():
    with pytest.raises(ValueError, match=r"MODEL.SUBLINEAR.STAGES has 'res6'; use some of stem,"):
        prepare_config(tiny_config("MODEL.SUBLINEAR.STAGES", ("res2", "res6")))


def test_stage_that_the_model_lacks_is_refused():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.res2 = nn.Sequential()
    with pytest.raises(ValueError, match=r"has 'fpn', but the model has no such stage.*: res2"):
        checkpoint_stages(model, ("res2", "fpn"))


def test_trainer_builds_it_from_config():
    cfg = tiny_config("MODEL.SUBLINEAR.ENABLED", True)
    stock = kept(megdet_d2.Trainer.build_model(tiny_config()), images(0))
    assert kept(megdet_d2.Trainer.build_model(cfg), images(0)) < stock
