"""Boxes of several detectors of one image into one set, by the package ensemble-boxes."""

import logging
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

logger = logging.getLogger(__name__)

# Method: boxes of one class that overlap by more are taken for one object.
IOU_THRESHOLDS = {"wbf": 0.55, "soft-nms": 0.5, "nms": 0.5}
# Pixels over the image's edge that are rounding.
_TOLERANCE = 1e-2


def load_ensemble_boxes() -> ModuleType:
    """The package; an ``ImportError`` that says how to install it where there is none."""
    try:
        import ensemble_boxes
    except ImportError as e:
        raise ImportError('Fusion needs ensemble-boxes: run  pip install -e ".[ensemble]"') from e
    return ensemble_boxes


def fuse(
    models: Sequence[Sequence[Mapping]],
    sizes: Mapping[int | str, tuple[float, float]],
    *,
    method: str = "wbf",
    iou_threshold: float = 0.55,
    weights: Sequence[float] | None = None,
    skip_box_threshold: float = 0.0,
    detections_per_image: int = 100,
) -> list[dict]:
    """Detections of several models, in COCO's result format, as those of one.

    "wbf", weighted boxes fusion (Solovyev et al., 2021): boxes of one class are clustered; a
    cluster's box is the mean weighted by the scores, its score their mean, times the part of the
    models that are in it. "soft-nms" (Bodla et al., 2017, Eq. 2): a score is multiplied by 1 - IoU
    with each better box that it overlaps. "nms": a box that overlaps a better one is left out. The
    last two scale the scores by the weights.

    Args:
        models: results of each model: dicts of image_id, category_id, bbox (XYWH in pixels) and
            score. Of score 0, or without area inside the image, they are left out.
        sizes: (width, height) of each image in pixels.
        weights: one a model, above 0; None for equal ones.

    Returns:
        At most ``detections_per_image`` an image, by falling score; boxes inside the image.

    Raises:
        ValueError: a method there is not. ImportError: ensemble-boxes is not installed.
    """
    if method not in IOU_THRESHOLDS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(IOU_THRESHOLDS)}")
    weights = np.ones(len(models)) if weights is None else np.asarray(weights, dtype=float)
    by_image: dict = {}
    for number, results in enumerate(models):
        for result in results:
            # A mean weighted by scores of 0 is none.
            if result["score"] >= max(skip_box_threshold, np.finfo(float).tiny):
                lists = by_image.setdefault(result["image_id"], [[] for _ in models])
                lists[number].append(result)

    fused, clipped, removed = [], 0, 0
    for image_id, lists in by_image.items():
        scale = np.tile(sizes[image_id], 2)
        boxes, scores, labels = [], [], []
        for results in lists:
            corners = np.array([result["bbox"] for result in results], dtype=float).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            inside = corners.clip(0, scale)
            clipped += int((abs(inside - corners) > _TOLERANCE).any(1).sum())
            keep = (inside[:, 2:] > inside[:, :2]).all(1)
            removed += int((~keep).sum())
            boxes.append(inside[keep] / scale)
            scores.append(np.array([result["score"] for result in results], dtype=float)[keep])
            labels.append(np.array([r["category_id"] for r in results], dtype=int)[keep])
        found = _fuse_image(boxes, scores, labels, weights, method, iou_threshold)
        best = sorted(zip(*found, strict=True), key=lambda item: -item[1])[:detections_per_image]
        for box, score, label in best:
            x1, y1, x2, y2 = (box.clip(0, 1) * scale).tolist()
            fused.append(
                {
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(score),
                }
            )
    if clipped or removed:
        logger.warning(
            f"{clipped} boxes reached over their image's edge and were clipped; {removed} without "
            "area inside it were left out"
        )
    return fused


def _fuse_image(boxes, scores, labels, weights, method: str, iou_threshold: float):
    """(n, 4) boxes, (n,) scores and (n,) labels from a list of each; corners as parts of 1."""
    package = load_ensemble_boxes()
    if not any(map(len, boxes)):
        return np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    if method == "wbf":
        # The package's default counts boxes for models: two of one model would be worth two.
        return package.weighted_boxes_fusion(
            boxes, scores, labels, weights, iou_threshold, conf_type="box_and_model_avg"
        )
    # The package would divide by the weights' sum: the scores of four equal models by four.
    scores = [s * w / weights.max() for s, w in zip(scores, weights, strict=True)]
    return _suppress(*map(np.concatenate, (boxes, scores, labels)), method, iou_threshold)


def _suppress(boxes, scores, labels, method: str, iou_threshold: float):
    # The package's soft_nms returns the scores as they were, so that duplicates stay on top. Its
    # inner function writes the new ones into what it gets, in the order of what it returns. That
    # does plain NMS too, without the package's second implementation, which is compiled first.
    from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float

    number = {"soft-nms": 1, "nms": 3}[method]
    found = []
    for label in np.unique(labels):
        own, decayed = boxes[labels == label], scores[labels == label].copy()
        keep = cpu_soft_nms_float(own, decayed, iou_threshold, sigma=0, thresh=0, method=number)
        found.append((own[keep], decayed[decayed > 0], np.full(len(keep), label)))
    return tuple(map(np.concatenate, zip(*found, strict=True)))
