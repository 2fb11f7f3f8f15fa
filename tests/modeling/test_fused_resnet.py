"""Compares the fused blocks of MODEL.CGBN.FUSE_ACTIVATION with Detectron2's."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    ResNet,
)

import megdet_d2
from megdet_d2.modeling.fused_resnet import FusedBottleneckBlock, fuse_activations
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from tests.helpers.models import tiny_config

BLOCKS = {
    "stem": (lambda: BasicStem(4, 6, norm="CGBN"), 4),
    "basic": (lambda: BasicBlock(4, 4, norm="CGBN"), 4),
    "basic, projected": (lambda: BasicBlock(4, 6, stride=2, norm="CGBN"), 4),
    "bottleneck": (lambda: BottleneckBlock(4, 4, bottleneck_channels=2, norm="CGBN"), 4),
    "bottleneck, projected": (
        lambda: BottleneckBlock(4, 6, bottleneck_channels=2, stride=2, norm="CGBN"),
        4,
    ),
}


def outputs(block, x, training=True):
    block.train(training)
    x = x.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


def make_pair(name):
    torch.manual_seed(0)
    make, channels = BLOCKS[name]
    block = make()
    for p in block.parameters():
        torch.nn.init.normal_(p)  # Detectron2 starts some γ at 0
    return block, copy.deepcopy(block), channels


def run_block(rank, name):
    plain, fused, channels = make_pair(name)
    assert fuse_activations(fused) == 1
    assert list(plain.state_dict()) == list(fused.state_dict())
    x = torch.randn(2 - rank, channels, 9, 8)  # parts of different sizes
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for training in (True, False):
            laid_out = x.to(memory_format=memory_format)
            both = outputs(plain, laid_out, training), outputs(fused, laid_out, training)
            for a, b in zip(*both, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_is_unfused_on_two_processes(pool2, name):
    pool2.run(run_block, name)


def run_empty(rank):
    _, fused, channels = make_pair("bottleneck")
    fuse_activations(fused)
    x = torch.randn(2 * (1 - rank), channels, 9, 8, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_process_without_images(pool2):
    pool2.run(run_empty)


def make_resnet():
    stages = ResNet.make_default_stages(50, norm="CGBN")
    return ResNet(BasicStem(norm="CGBN"), stages, out_features=["res5"])


def test_a_frozen_stage_is_left_alone():
    resnet = make_resnet().freeze(2)
    blocks = sum(len(stage) for stage in resnet.stages)
    assert fuse_activations(resnet) == blocks - 3
    assert type(resnet.res2[0]) is BottleneckBlock
    assert type(resnet.res3[0]) is FusedBottleneckBlock
    assert isinstance(resnet.stem.conv1.norm, FrozenBatchNorm2d)
    assert fuse_activations(resnet) == 0, "fused already"


def test_the_keys_reach_the_model():
    cfg = tiny_config("MODEL.CGBN.FUSE_ACTIVATION", True, "MODEL.CGBN.IGNORE_PADDING", True)
    model = megdet_d2.Trainer.build_model(cfg)
    assert any(type(m).__name__.startswith("Fused") for m in model.backbone.modules())
    layers = [m for m in model.backbone.modules() if isinstance(m, CrossGPUBatchNorm)]
    assert layers and all(layer.valid_region is layers[0].valid_region for layer in layers)
    assert layers[0].valid_region is not None


@pytest.mark.parametrize("after", [megdet_d2.revert_cgbn, lambda model: model.freeze()])
def test_a_fused_block_outlives_its_cgbn(after):
    _, fused, channels = make_pair("bottleneck, projected")
    plain = copy.deepcopy(fused)
    fuse_activations(fused)
    x = torch.randn(2, channels, 9, 8)
    plain.eval(), after(fused).eval()
    assert not any(isinstance(m, CrossGPUBatchNorm) for m in fused.modules())
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_scripted_block_is_the_plain_one(name):
    plain, fused, channels = make_pair(name)
    fuse_activations(fused)
    x = torch.randn(2, channels, 9, 8)
    scripted = torch.jit.script(fused.eval())
    torch.testing.assert_close(scripted(x), plain.eval()(x))
