"""Compares the regions of the context with slices of the features."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch.nn import functional as F

from megdet_d2.modeling.context import ContextPooler, ContextROIHeads, enlarge
from tests.helpers.bitwise import images
from tests.helpers.models import build, tiny_config


def pooler(**kwargs):
    # One sample for each cell of a box as large as the output, four for one of twice its size.
    stock = ROIPooler(4, scales=[1 / 4], sampling_ratio=0, pooler_type="ROIAlignV2")
    context = ContextPooler(stock, channels=5, **kwargs)
    context.image_sizes = [(32, 64), (64, 32)]  # of a batch padded to 64 x 64
    return context


def test_regions_equal_slices():
    x = torch.randn(2, 5, 16, 16)
    boxes = [
        Boxes(torch.tensor([[8.0, 8.0, 24.0, 24.0]])),
        Boxes(torch.tensor([[8.0, 16.0, 24.0, 32.0], [8.0, 40.0, 24.0, 56.0]])),
    ]
    context = pooler(scales=(2.0,), whole_image=True)
    own, larger, whole = context.regions([x], boxes)
    expected = [x[0, :, 2:6, 2:6], x[1, :, 4:8, 2:6], x[1, :, 10:14, 2:6]]
    torch.testing.assert_close(own, torch.stack(expected))

    twice = [x[0, :, 0:8, 0:8], x[1, :, 2:10, 0:8], x[1, :, 8:16, 0:8]]
    torch.testing.assert_close(larger, F.avg_pool2d(torch.stack(twice), 2))

    images = [x[0, :, :8, :], x[1, :, :, :8], x[1, :, :, :8]]  # without the padding
    images = [F.adaptive_avg_pool2d(image, 4) for image in images]
    torch.testing.assert_close(whole, torch.stack(images))

    weight, bias = context.join.weight[..., 0, 0], context.join.bias
    joined = torch.cat([own, larger, whole], dim=1).movedim(1, -1) @ weight.T + bias
    torch.testing.assert_close(context([x], boxes), joined.relu().movedim(-1, 1))


def test_enlarged_boxes_end_at_the_image():
    boxes = Boxes(torch.tensor([[10.0, 20.0, 20.0, 40.0], [0.0, 0.0, 30.0, 30.0]]))
    assert enlarge(boxes, 1.8, (45, 100)).tensor.tolist() == [
        [6.0, 12.0, 24.0, 45.0],
        [0.0, 0.0, 42.0, 42.0],
    ]


def test_no_boxes_still_reach_the_features():
    x = torch.randn(2, 5, 16, 16, requires_grad=True)
    context = pooler()
    out = context([x], [Boxes(torch.zeros(0, 4))] * 2)
    assert out.shape == (0, 5, 4, 4)
    out.sum().backward()
    assert x.grad is not None and context.join.weight.grad is not None


def test_the_image_is_without_its_padding():
    model = build(tiny_config("MODEL.ROI_HEADS.NAME", "ContextROIHeads")).eval()
    small, large = images(0, 32, 48, 1)[0], images(1, 64, 64, 1)[0]
    with torch.no_grad():
        together = model([small, large])[0]["instances"]
    assert model.roi_heads.box_pooler.image_sizes == [(32, 48), (64, 64)]
    assert len(together)


def test_no_context_pooler_is_an_error():
    """Uses a stock pooler, as a LazyConfig that only names the class does."""
    model = build(tiny_config("MODEL.ROI_HEADS.NAME", "ContextROIHeads"))
    assert isinstance(model.roi_heads, ContextROIHeads)
    model.roi_heads.box_pooler = model.roi_heads.box_pooler.pooler
    with pytest.raises(TypeError, match="a ROIPooler as box_pooler.*use ContextPooler"):
        model.eval()(images(0))


def test_errors_name_the_key():
    shapes = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in (3, 4, 5)}
    keys = ["MODEL.ROI_HEADS.NAME", "ContextROIHeads", "MODEL.CONTEXT.SCALES"]
    with pytest.raises(ValueError, match=r"SCALES is .*-1.0.*; give"):
        build_roi_heads(tiny_config(*keys, (-1.0,)), shapes)
    with pytest.raises(ValueError, match="SCALES is empty and WHOLE_IMAGE False.*set scales"):
        build_roi_heads(tiny_config(*keys, (), "MODEL.CONTEXT.WHOLE_IMAGE", False), shapes)
