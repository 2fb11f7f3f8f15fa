"""Compares maxout with its definition; checks the box head after NoC's convolutions."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import build_box_head

from megdet_d2.modeling.maxout import Maxout
from tests.helpers.models import build, reduced_config
from tests.helpers.step import check_two_steps, with_gradient

MAXOUT = ["MODEL.ROI_BOX_HEAD.NAME", "MaxoutBoxHead", "MODEL.MAXOUT.PIECES", 3]


def test_equals_the_definition():
    layer = Maxout(5, 4, pieces=3)
    torch.nn.init.normal_(layer.linear.bias)
    x = torch.randn(6, 5)
    weight, bias = layer.linear.weight, layer.linear.bias
    h = layer(x)
    assert h.shape == (6, 4)
    for row in range(6):
        for i in range(4):
            z = [weight[3 * i + j] @ x[row] + bias[3 * i + j] for j in range(3)]
            torch.testing.assert_close(h[row, i], max(z))


def head_of(*overrides):
    shape = ShapeSpec(channels=6, height=4, width=4)
    return build_box_head(reduced_config(*MAXOUT, *overrides), shape)


def test_head_is_nocs_convolutions_and_then_maxout():
    head = head_of("MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.NUM_FC", 2).eval()
    x = torch.randn(3, 6, 4, 4)
    expected = head.fc2(head.fc1(head.conv2(head.conv1(x)).flatten(1)))
    torch.testing.assert_close(head(x), expected)
    assert (head(x) < 0).any(), "no ReLU follows"
    assert [type(head.fc1), type(head.fc2)] == [Maxout, Maxout]
    assert head.output_shape.channels == expected.shape[1] == 16


def test_no_region_goes_through_and_reaches_every_parameter():
    head = head_of("MODEL.ROI_BOX_HEAD.NUM_CONV", 1)
    y = head(torch.zeros(0, 6, 4, 4))
    assert y.shape == (0, 16)
    y.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.MAXOUT.PIECES", 1], "MODEL.MAXOUT.PIECES is 1; give 2 or more"),
        (["MODEL.ROI_BOX_HEAD.NUM_FC", 0], "MODEL.ROI_BOX_HEAD.NUM_FC is 0"),
    ],
)
def test_bad_keys_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(reduced_config(*MAXOUT, *overrides))


def test_trains_with_a_process_without_proposals(pool2):
    assert with_gradient(check_two_steps(pool2, MAXOUT), "box_head.fc1")
