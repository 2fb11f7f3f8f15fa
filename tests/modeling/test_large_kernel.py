"""Compares large separable kernels with the equal dense kernel; checks the two heads."""

import pytest
import torch
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.roi_heads.box_head import build_box_head
from torch.nn import functional as F

from megdet_d2.modeling.large_kernel import LargeKernel, LargeKernelBoxHead, LargeKernelRPNHead
from tests.helpers.models import build, reduced_config
from tests.helpers.step import check_two_steps, with_gradient

RPN = ["MODEL.RPN.HEAD_NAME", "LargeKernelRPNHead", "MODEL.LARGE_KERNEL.MID_CHANNELS", 8]
BOX = ["MODEL.ROI_BOX_HEAD.NAME", "LargeKernelBoxHead"]


def dense(layer):
    """Returns the k×k kernel (C', C, k, k) that both paths add up to."""
    v1, h2 = (conv.weight[..., 0] if i == 0 else conv.weight[:, :, 0] for i, conv in
              enumerate(layer.vertical_first))  # fmt: skip
    h1, v2 = (conv.weight[:, :, 0] if i == 0 else conv.weight[..., 0] for i, conv in
              enumerate(layer.horizontal_first))  # fmt: skip
    return torch.einsum("mia,omb->oiab", v1, h2) + torch.einsum("mib,oma->oiab", h1, v2)


def test_equals_the_dense_kernel():
    layer = LargeKernel(3, 4, size=5, mid_channels=2)
    biases = [layer.vertical_first[1].bias, layer.horizontal_first[1].bias]
    for bias in biases:
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 3, 7, 4)  # narrower than the kernel: the border counts
    y = F.conv2d(x, dense(layer), sum(biases), padding=2)
    torch.testing.assert_close(layer(x), y.relu())

    layer = LargeKernel(3, 4, size=5, mid_channels=2, norm=get_norm("BN", 4))
    y = F.conv2d(x, dense(layer), padding=2)
    torch.testing.assert_close(layer(x), F.batch_norm(y, None, None, training=True).relu())


@pytest.mark.parametrize("norm", ["", "CGBN"])
def test_no_region_goes_through_and_reaches_every_parameter(norm):
    cfg = reduced_config(*BOX, "MODEL.ROI_BOX_HEAD.NORM", norm)
    head = build_box_head(cfg, ShapeSpec(channels=6, height=5, width=5))
    assert isinstance(head, LargeKernelBoxHead)
    assert head(torch.randn(2, 6, 5, 5)).shape == (2, head.output_shape.channels) == (2, 16)
    y = head(torch.zeros(0, 6, 5, 5))
    assert y.shape == (0, 16)
    y.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_box_head_is_the_kernel_and_then_the_layers():
    head = LargeKernelBoxHead(
        ShapeSpec(channels=6, height=5, width=5), size=3, mid_channels=2, channels=4, fc_dims=[8]
    )
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(head(x), head.fc1(head.conv1(x).flatten(1)).relu())
    assert head.fc1.in_features == 4 * 5 * 5
    assert type(head.conv1) is LargeKernel and sum(p.numel() for p in head.parameters()) == (
        2 * (6 * 2 * 3 + 2 * 4 * 3 + 4) + 100 * 8 + 8
    )


def test_every_level_has_running_statistics_of_its_own():
    cfg = reduced_config(*RPN, "MODEL.LARGE_KERNEL.NORM", "CGBN", "MODEL.LARGE_KERNEL.SIZE", 3)
    head = build(cfg).proposal_generator.rpn_head
    assert isinstance(head, LargeKernelRPNHead) and isinstance(head.conv.norm, CycleBatchNormList)
    levels = [torch.randn(2, 16, 6, 6), 9 * torch.randn(2, 16, 3, 3), torch.randn(2, 16, 2, 2) + 5]
    before = [F.conv2d(x, dense(head.conv), padding=1) for x in levels]
    head(levels)
    for norm, y in zip(head.conv.norm, before, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.1 * y.mean(dim=(0, 2, 3)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*RPN, "MODEL.LARGE_KERNEL.SIZE", 14], "size is 14; give an odd number for MODEL.LARGE"),
        ([*BOX, "MODEL.LARGE_KERNEL.BOX_SIZE", 0], "size is 0; give an odd number"),
        ([*RPN, "MODEL.LARGE_KERNEL.MID_CHANNELS", 0], "has 0 middle and .*give 1 or more"),
        ([*RPN, "MODEL.RPN.CONV_DIMS", [-1, -1]], "MODEL.RPN.CONV_DIMS has 2 entries"),
    ],
)
def test_bad_keys_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(reduced_config(*overrides))


def test_trains_with_a_process_without_proposals(pool2):
    sums = check_two_steps(pool2, [*RPN, "MODEL.LARGE_KERNEL.NORM", "CGBN", *BOX])
    assert with_gradient(sums, "rpn_head.conv") and with_gradient(sums, "box_head.conv1.vertical")
