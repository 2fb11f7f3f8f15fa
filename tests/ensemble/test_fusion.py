"""Tests the fusion of boxes against its definitions."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou

pytest.importorskip("ensemble_boxes", reason="fusion needs the ensemble extra")

from megdet_d2.ensemble.fusion import IOU_THRESHOLDS, fuse
from tests.helpers.detections import assert_same, ordered, result

SIZES = {1: (200, 100), "b": (64, 96)}


def random_results(seed, count=24, apart=False):
    """Returns boxes of two classes in both images; with ``apart``, after NMS at 0.5."""
    rng = np.random.default_rng(seed)
    results = []
    for image_id, size in SIZES.items():
        start = rng.uniform(0, 0.6, (count, 2))
        box = torch.tensor(np.hstack([start, start + rng.uniform(0.1, 0.4, (count, 2))]))
        box *= torch.tensor([*size, *size])
        score, label = torch.tensor(rng.uniform(0.01, 1, count)), torch.arange(count) % 2
        for i in batched_nms(box, score, label, 0.5) if apart else range(count):
            x1, y1, x2, y2 = box[i].tolist()
            xywh = [x1, y1, x2 - x1, y2 - y1]
            results.append(result(xywh, score[i].item(), image_id, 5 + label[i].item()))
    return results


def test_weighted_boxes_are_the_means_by_score():
    a = [result([10, 20, 100, 40], 0.9), result([150, 10, 20, 20], 0.8)]
    b = [result([20, 20, 100, 40], 0.6), result([10, 20, 100, 40], 0.7, category_id=4)]
    # Scores 0.9 and 0.6 give a mean of the boxes by 3 : 2. A box of one model has half its score.
    expected = [
        result([14, 20, 100, 40], 0.75),
        result([150, 10, 20, 20], 0.4),
        result([10, 20, 100, 40], 0.35, category_id=4),
    ]
    assert_same(fuse([a, b], SIZES), expected)
    # With twice the weight for the first model: boxes by 1.8 : 0.6, scores by 2 : 1.
    expected = [
        result([12.5, 20, 100, 40], (2 * 0.9 + 0.6) / 3),
        result([150, 10, 20, 20], 2 * 0.8 / 3),
        result([10, 20, 100, 40], 0.7 / 3, category_id=4),
    ]
    assert_same(fuse([a, b], SIZES, weights=(2, 1)), expected)


def test_two_boxes_of_one_model_are_of_one_model():
    """The score is the mean times the share, by weight, of the models with a box."""
    twice = [result([10, 20, 100, 40], 0.9), result([14, 20, 100, 40], 0.8)]
    (lone,) = fuse([twice, []], SIZES)
    assert lone["score"] == pytest.approx(0.85 / 2)
    third = [result([10, 20, 100, 40], 0.7)]
    (both,) = fuse([twice, third], SIZES, weights=(4, 1))
    assert both["score"] == pytest.approx((4 * 0.9 + 4 * 0.8 + 0.7) / 9)


def plain_soft_nms(results, threshold):
    """Suppresses by Bodla et al., Figure 2 with Equation 2."""
    left = [dict(r) for r in results]
    while left:
        best = max(left, key=lambda r: r["score"])
        left = [r for r in left if r is not best]
        if best["score"] > 0:
            yield best
        for other in left:
            same = all(best[key] == other[key] for key in ("image_id", "category_id"))
            iou = overlap(best["bbox"], other["bbox"]) if same else 0
            if iou > threshold:
                other["score"] *= 1 - iou


def overlap(a, b):
    a, b = (torch.tensor([[x, y, x + w, y + h]]) for x, y, w, h in (a, b))
    return box_iou(a, b).item()


def plain_nms(results, threshold):
    for number, image_id in enumerate(SIZES):
        rows = [r for r in results if r["image_id"] == image_id]
        x, y, w, h = torch.tensor([r["bbox"] for r in rows], dtype=torch.double).T
        corners = torch.stack([x, y, x + w, y + h], 1)
        scores = torch.tensor([r["score"] for r in rows], dtype=torch.double)
        labels = torch.tensor([r["category_id"] + 10 * number for r in rows])
        yield from (rows[i] for i in batched_nms(corners, scores, labels, threshold))


@pytest.mark.parametrize(("method", "plain"), [("soft-nms", plain_soft_nms), ("nms", plain_nms)])
def test_suppression_is_the_plain_one(method, plain):
    models, threshold = [random_results(0), random_results(1)], 0.4
    options = {"method": method, "iou_threshold": threshold, "detections_per_image": 1000}
    assert_same(fuse(models, SIZES, **options), plain(sum(models, []), threshold))
    halved = [{**r, "score": r["score"] / 2} for r in models[1]]
    expected = list(plain(models[0] + halved, threshold))
    assert_same(fuse(models, SIZES, weights=(4, 2), **options), expected)


@pytest.mark.parametrize("method", IOU_THRESHOLDS)
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_model_with_itself_is_itself(method, copies, capsys):
    model = random_results(2, apart=True)
    fused = fuse([model] * copies, SIZES, method=method, iou_threshold=IOU_THRESHOLDS[method])
    assert_same(fused, model)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", IOU_THRESHOLDS)
def test_odd_boxes_make_no_odd_fusion(method, caplog, recwarn, capsys):
    odd = [
        result([-10, 20, 50, 40], 0.9),  # over the left edge
        result([150, 90, 100, 100], 0.8),  # over the corner
        result([300, 20, 10, 10], 0.7),  # outside
        result([20, 20, 0, 10], 0.6),  # without area
        result([100, 20, 10, 10], 0.0),  # in a mean its weight would be 0 / 0
        result([60, 20.004, 40, 80], 0.5),  # over the lower edge by rounding
    ]
    # One is alone in its image.
    odd.append(result([-5, 0, 5, 5], 0.9, image_id="b"))
    fused = fuse([odd, []], SIZES, method=method, weights=(1, 1))
    part = 0.5 if method == "wbf" else 1
    expected = [
        result([0, 20, 40, 40], 0.9 * part),
        result([150, 90, 50, 10], 0.8 * part),
        result([60, 20, 40, 80], 0.5 * part),
    ]
    keys, values = ordered(fused)
    assert len(keys) == 3
    np.testing.assert_allclose(values, ordered(expected)[1], atol=5e-3)
    assert "4 boxes reached over" in caplog.text and "3 without area" in caplog.text
    assert capsys.readouterr() == ("", "") and not recwarn.list
    assert fuse([[], []], SIZES, method=method) == []


def test_keeps_the_best_and_what_is_above_the_threshold():
    model = [result([10 * i, 5, 8, 8], 0.1 + 0.1 * i) for i in range(6)]
    kept = fuse([model], SIZES, skip_box_threshold=0.25, detections_per_image=3)
    assert [r["score"] for r in kept] == pytest.approx([0.6, 0.5, 0.4])
    kept = fuse([model], SIZES, skip_box_threshold=0.25)
    assert [r["score"] for r in kept] == pytest.approx([0.6, 0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match="method is 'mean'; use one of wbf, soft-nms, nms"):
        fuse([model], SIZES, method="mean")
