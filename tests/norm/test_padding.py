"""Checks MODEL.CGBN.IGNORE_PADDING: statistics of the images without the padded border."""

import copy
import pickle

import pytest
import torch
from torch import nn

from megdet_d2.engine import Trainer
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.padding import ValidRegion, ignore_padding
from tests.helpers.models import retinanet_config, tiny_config

EPS = 1e-3
# Two images a process, and the size they are padded to, which differs between processes.
SIZES = [[(6, 4), (3, 5)], [(4, 8), (7, 2)]]
PADDED = [(6, 5), (7, 8)]


def make_batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 3, *PADDED[r], generator=generator, dtype=dtype) * 2 + 1 for r in (0, 1)]
    dys = [torch.randn(2, 3, *PADDED[r], generator=generator, dtype=dtype) for r in (0, 1)]
    return xs, dys


def crops(x, sizes):
    """Returns (C, values) of the images without their border."""
    return torch.cat(
        [image[:, :h, :w].flatten(1) for image, (h, w) in zip(x, sizes, strict=True)], 1
    )


def reference(xs, dys):
    """Computes the definition by autograd: all values normalised with μ and σ² of all crops."""
    xs = [x.clone().requires_grad_() for x in xs]
    values = torch.cat([crops(x, s) for x, s in zip(xs, SIZES, strict=True)], 1)
    mean, var = values.mean(1), values.var(1, unbiased=False)
    ys = [(x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + EPS).sqrt() for x in xs]
    sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True)).backward()
    return ys, [x.grad for x in xs], mean.detach(), values.detach().var(1)


def run_padded(rank, xs, dys, algorithm):
    layer = CrossGPUBatchNorm(3, EPS, momentum=1.0, algorithm=algorithm).double()
    layer.valid_region = ValidRegion(SIZES[rank], PADDED[rank])
    x = xs[rank].requires_grad_()
    y = layer(x)
    y.backward(dys[rank])
    return y.detach(), x.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("algorithm", ["one_reduce", "two_pass"])
def test_statistics_and_gradients_are_those_of_the_cropped_images(pool2, algorithm):
    xs, dys = make_batches()
    ys, dxs, mean, var = reference(xs, dys)
    for rank, result in enumerate(pool2.run(run_padded, xs, dys, algorithm)):
        expected = (ys[rank], dxs[rank], mean, var)
        for ours, right in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, right.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset, error", [(0, 1e-6), (1e4, 1e-5)])
def test_float32_far_from_zero(offset, error):
    x = torch.randn(2, 3, 40, 30, generator=torch.Generator().manual_seed(1)) + offset
    x[0, :, 20:], x[1, :, :, 15:] = float("inf"), 0  # what the border holds must not matter
    layer = CrossGPUBatchNorm(3, EPS, momentum=1.0)
    layer.valid_region = ValidRegion([(20, 30), (40, 15)], (40, 30))
    layer(x)
    right = crops(x, [(20, 30), (40, 15)]).double()
    torch.testing.assert_close(layer.running_var.double(), right.var(1), rtol=error, atol=0)
    torch.testing.assert_close(layer.running_mean.double(), right.mean(1), rtol=1e-6, atol=1e-6)


def test_relu_and_residual_beside_padding():
    layer = CrossGPUBatchNorm(3).double()
    layer.valid_region = ValidRegion([(2, 4), (5, 3)], (5, 4))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_()
    results = []
    for fused in (True, False):
        y = layer(x, residual, relu=True) if fused else torch.relu(layer(x) + residual)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, residual))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_region_of_a_strided_feature_map():
    region = ValidRegion([(64, 96), (33, 32)], (64, 96))
    mask = region.mask(torch.zeros(2, 7, 8, 12))  # stride 8
    assert mask.shape == (2, 1, 8, 12) and mask[0].all()
    assert mask[1, 0, :5, :4].all() and mask[1].sum() == 5 * 4, "33 rows need 5 cells of 8"
    assert region.mask(torch.zeros(3, 7, 8, 12)) is None, "three regions, not two images"
    region.sizes = [(64, 96), (64, 96)]
    assert region.mask(torch.zeros(2, 7, 8, 12)) is None, "nothing is padded"


class Detector(nn.Module):
    """A model that takes and pads its input as a Detectron2 model does."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), CrossGPUBatchNorm(4, momentum=1.0))
        self.roi_heads = nn.Sequential(CrossGPUBatchNorm(4))

    def forward(self, inputs):
        images = torch.zeros(len(inputs), 3, 16, 16)
        for image, item in zip(images, inputs, strict=True):
            h, w = item["image"].shape[-2:]
            image[:, :h, :w] = item["image"]
        return self.roi_heads(self.backbone(images))


def test_layers_share_the_mask_of_a_batch_and_the_next_batch_has_its_own():
    region = ValidRegion([(64, 96), (33, 32)], (64, 96))
    maps = [torch.zeros(2, channels, 16, 24) for channels in (3, 5)]
    first = region.mask(maps[0])
    assert region.mask(maps[1]) is first
    smaller = region.mask(torch.zeros(2, 3, 8, 12))
    assert smaller.shape == (2, 1, 8, 12) and region.mask(maps[0]) is first
    region.sizes = [(33, 32), (64, 96)]
    second = region.mask(maps[0])
    assert torch.equal(second, first.flip(0)) and len(region.masks) == 1
    region.padded = (128, 96)
    assert not torch.equal(region.mask(maps[0]), second)


def test_a_models_layers_learn_the_sizes_from_its_inputs():
    model = pickle.loads(pickle.dumps(copy.deepcopy(ignore_padding(Detector()))))
    assert model.roi_heads[0].valid_region is None
    model([{"image": torch.randn(3, 16, 10)}, {"image": torch.randn(3, 5, 16)}])
    conv, layer = model.backbone
    inputs = [{"image": torch.randn(3, 12, 16)}, {"image": torch.randn(3, 16, 7)}]
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(inputs)
    right = crops(seen[0], [(6, 8), (8, 4)])
    torch.testing.assert_close(layer.running_mean, right.mean(1))
    assert not torch.allclose(layer.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-2)


LARGE_KERNEL = ["MODEL.RPN.HEAD_NAME", "LargeKernelRPNHead", "MODEL.LARGE_KERNEL.NORM", "CGBN"]


@pytest.mark.parametrize(
    "cfg, head",
    [
        (tiny_config(*LARGE_KERNEL), "proposal_generator.rpn_head.conv.norm.3"),
        (retinanet_config("CGBN"), "head.bbox_subnet.4.4"),
    ],
    ids=["large kernel", "RetinaNet"],
)
def test_what_sees_whole_images_has_the_region_and_box_heads_have_not(cfg, head):
    cfg.MODEL.CGBN.IGNORE_PADDING = True
    model = Trainer.build_model(cfg)
    without = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, CrossGPUBatchNorm) and layer.valid_region is None
    ]
    assert all(name.startswith("roi_heads.box_head.") for name in without), without
    assert model.get_submodule(head).valid_region is not None
