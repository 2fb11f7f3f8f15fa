"""Checks the segmentation loss: labels pixel by pixel, the loss, and no cost in inference."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from megdet_d2.modeling.segmentation import IGNORED, segmentation_loss, semantic_labels
from megdet_d2.norm.padding import ignore_padding
from tests.helpers.bitwise import images
from tests.helpers.models import build, tiny_config

CLASSES, STRIDE, GRID = 4, 4, (8, 10)


def target(size, boxes, classes):
    boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return Instances(size, gt_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64))


# The second is padded to the first's size and has a row that is cut through; the last is empty.
TARGETS = [
    target((32, 40), [[2, 2, 30, 30], [10, 8, 20, 18], [0, 0, 40, 32]], [1, 3, 0]),
    target((23, 33), [[5, 4, 29.5, 21]], [2]),
    target((32, 40), [], []),
]


def expected_label(image, i, j):
    x, y = (j + 0.5) * STRIDE, (i + 0.5) * STRIDE
    if y >= image.image_size[0] or x >= image.image_size[1]:
        return IGNORED
    over = [
        ((right - left) * (bottom - top), c)
        for (left, top, right, bottom), c in zip(
            image.gt_boxes.tensor.tolist(), image.gt_classes.tolist(), strict=True
        )
        if left <= x < right and top <= y < bottom
    ]
    return min(over)[1] if over else CLASSES


def test_labels_from_boxes_pixel_by_pixel():
    labels = semantic_labels(TARGETS, GRID, STRIDE, CLASSES)
    expected = [
        [[expected_label(image, i, j) for j in range(GRID[1])] for i in range(GRID[0])]
        for image in TARGETS
    ]
    assert labels.tolist() == expected
    assert set(labels.unique().tolist()) == {IGNORED, 0, 1, 2, 3, CLASSES}


def with_masks(kind):
    """Makes an image with half of each box as the mask, and an image without objects."""
    image = target((32, 40), [[2, 2, 30, 30], [10, 8, 20, 18]], [1, 3])
    triangles = [[right, top, right, bottom, left, bottom]
                 for left, top, right, bottom in image.gt_boxes.tensor.tolist()]  # fmt: skip
    polygons = PolygonMasks([[np.array(triangle)] for triangle in triangles])
    is_polygon = kind is PolygonMasks
    image.gt_masks = polygons if is_polygon else BitMasks.from_polygon_masks(polygons, 32, 40)
    return [image, TARGETS[2]]


def test_labels_from_masks():
    polygons, bits = (
        semantic_labels(with_masks(kind), GRID, STRIDE, CLASSES, masks=True)
        for kind in (PolygonMasks, BitMasks)
    )
    assert torch.equal(polygons, bits)
    masks = with_masks(BitMasks)[0].gt_masks.tensor[:, 2::4, 2::4]
    small, large = masks[1], masks[0] & ~masks[1]
    expected = torch.full(GRID, CLASSES)
    expected[large], expected[small] = 1, 3
    assert torch.equal(bits[0], expected) and (bits[1] == CLASSES).all()
    assert (bits[0] != semantic_labels(with_masks(BitMasks), GRID, STRIDE, CLASSES)[0]).any()
    with pytest.raises(ValueError, match="objects without masks; use"):
        semantic_labels(TARGETS, GRID, STRIDE, CLASSES, masks=True)


def test_loss_is_a_mean_over_cells_of_images():
    labels = semantic_labels(TARGETS, GRID, STRIDE, CLASSES)
    logits = torch.randn(3, CLASSES + 1, *GRID, requires_grad=True)
    counted = [
        -logits[n, :, i, j].log_softmax(0)[c]
        for (n, i, j), c in zip(np.ndindex(labels.shape), labels.flatten().tolist(), strict=True)
        if c != IGNORED
    ]
    torch.testing.assert_close(segmentation_loss(logits, labels), torch.stack(counted).mean())
    for none in (torch.full_like(labels, IGNORED), labels[:0]):
        loss = segmentation_loss(logits[: len(none)], none)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("targets", ["boxes", "masks"])
def test_the_loss_is_that_of_the_head_on_the_features(targets):
    """Trains with the weight and targets of the config; the features learn from the loss."""
    model = build(
        tiny_config(
            "MODEL.ROI_HEADS.NAME", "SegmentationROIHeads", "MODEL.MASK_ON", True,
            "INPUT.MASK_FORMAT", "bitmask", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4,
            "MODEL.SEGMENTATION.TARGETS", targets, "MODEL.SEGMENTATION.LOSS_WEIGHT", 0.3,
        )
    )  # fmt: skip
    seen = {}
    model.backbone.register_forward_hook(lambda _, __, maps: seen.update(maps=maps))
    head = model.roi_heads.segmentation_head
    head.register_forward_hook(lambda _, __, logits: seen.update(logits=logits))
    batch = images(0)
    with EventStorage():
        loss = model(batch)["loss_segmentation"]
    logits = seen["logits"]
    labels = semantic_labels(
        [image["instances"] for image in batch], logits.shape[-2:],
        64 // logits.shape[-1], model.roi_heads.num_classes, masks=targets == "masks",
    )  # fmt: skip
    torch.testing.assert_close(loss, 0.3 * segmentation_loss(logits, labels))
    (gradient,) = torch.autograd.grad(loss, seen["maps"]["p3"])
    assert gradient.any()


def test_inference_is_stock_and_costs_nothing():
    stock = build(tiny_config()).eval()
    keys = ["MODEL.ROI_HEADS.NAME", "SegmentationROIHeads", "MODEL.SEGMENTATION.NORM", "CGBN"]
    ours = ignore_padding(build(tiny_config(*keys)))
    calls = []
    ours.roi_heads.segmentation_head.register_forward_hook(lambda *_: calls.append(1))
    layers = dict(ours.named_modules())
    assert layers["roi_heads.segmentation_head.conv1.norm"].valid_region is not None
    assert layers["roi_heads.box_head.conv1.norm"].valid_region is None
    with EventStorage():
        assert "loss_segmentation" in ours(images(0))
    assert calls == [1]

    result = ours.load_state_dict(stock.state_dict(), strict=False)
    assert all("segmentation_head" in name for name in result.missing_keys)
    with torch.no_grad():
        got, expected = (model.eval()(images(0)) for model in (ours, stock))
    for image, same in zip(got, expected, strict=True):
        a, b = image["instances"], same["instances"]
        assert len(a) and torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert calls == [1]


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [("TARGETS", "pixels", "boxes, masks"), ("TARGETS", "masks", "MASK_ON True"),
     ("IN_FEATURE", "p2", "p3, p4, p5, p6")],
)  # fmt: skip
def test_errors_name_the_key(key, value, fix):
    keys = ["MODEL.ROI_HEADS.NAME", "SegmentationROIHeads", f"MODEL.SEGMENTATION.{key}", value]
    with pytest.raises(ValueError, match=f"MODEL.SEGMENTATION.{key} is .{value}.*{fix}"):
        build(tiny_config(*keys))
