"""Checks a dilated res5 alone and under the FPN: strides, values, a training step."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from tests.helpers.models import ATROUS, THIN_R50, build, reduced_config
from tests.helpers.step import check_two_steps, with_gradient

DC5 = [
    *THIN_R50, "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES5_DILATION", 2,
    "MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RPN.IN_FEATURES", ["res5"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["res5"],
]  # fmt: skip


def test_levels_have_the_stock_strides_and_sizes():
    atrous = build_backbone(reduced_config(*ATROUS))
    assert atrous.output_shape() == build_backbone(reduced_config(*THIN_R50)).output_shape()
    x = torch.zeros(2, 3, 96, 80)  # multiples of 16: p5's width is rounded up
    features = atrous(x)
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    for name, stride in zip(features, (4, 8, 16, 32, 64), strict=True):
        assert atrous.output_shape()[name].stride == stride
        assert features[name].shape == (2, 16, math.ceil(96 / stride), math.ceil(80 / stride))


def test_every_other_pixel_of_a_dilated_res5_is_the_stock_one():
    # With MSRA's stride, in the first 1×1, dilation computes the values of stride, and those
    # between.
    cfg = reduced_config(
        *THIN_R50, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", ["res5"]
    )
    stock = build_backbone_of("build_resnet_backbone", cfg)
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    dilated = build_backbone_of("build_resnet_backbone", cfg)
    dilated.load_state_dict(stock.state_dict())
    x = torch.randn(1, 3, 96, 128)
    dense, sparse = dilated(x)["res5"], stock(x)["res5"]
    assert dense.shape[2:] == (6, 8) and sparse.shape[2:] == (3, 4)
    torch.testing.assert_close(dense[:, :, ::2, ::2], sparse)


def build_backbone_of(name, cfg):
    cfg.MODEL.BACKBONE.NAME = name
    return build_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.RESNETS.RES5_DILATION", 1], "RES5_DILATION is 1.*set it to 2, or MODEL.BACKBONE"),
        (
            ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]],
            r"IN_FEATURES is \['res2', 'res3', 'res4', 'res5'\].*set IN_FEATURES, and",
        ),
        (["MODEL.FPN.IN_FEATURES", ["res2", "res3"]], "MODEL.FPN.IN_FEATURES is"),
        (["MODEL.ATROUS.BOTTOM_UP", "resnet"], "MODEL.ATROUS.BOTTOM_UP is 'resnet'.*use build_"),
        (
            ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]],
            "build_resnet_backbone .MODEL.ATROUS.BOTTOM_UP. has the outputs res2, res5; ",
        ),
    ],
)
def test_a_config_without_a_dilated_res5_on_top_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(reduced_config(*ATROUS, *overrides))


def test_trains_with_a_process_without_proposals(pool2):
    sums = check_two_steps(pool2, ATROUS)
    assert with_gradient(sums, "res5") and with_gradient(sums, "top_block.p5")


def test_dc5_trains_with_a_process_without_proposals(pool2):
    assert with_gradient(check_two_steps(pool2, DC5), "res5")
