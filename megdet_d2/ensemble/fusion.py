"""Fuses the boxes that several detectors find in an image, by the package ensemble-boxes."""

import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# The methods, each with its default threshold: boxes of one class that overlap more are one object.
IOU_THRESHOLDS = {"wbf": 0.55, "soft-nms": 0.5, "nms": 0.5}
# Pixels. A box that reaches less far over the image's edge does so by rounding.
_TOLERANCE = 1e-2


def load_ensemble_boxes() -> ModuleType:
    """Imports and returns the package ensemble-boxes.

    Raises:
        ImportError: it is not installed; the message has the command to install it.
    """
    try:
        import ensemble_boxes
    except ImportError as e:
        raise ImportError('Fusion needs ensemble-boxes: run  pip install -e ".[ensemble]"') from e
    return ensemble_boxes


def fuse(
    models: Sequence[Sequence[Mapping[str, Any]]],
    sizes: Mapping[int | str, tuple[float, float]],
    *,
    method: str = "wbf",
    iou_threshold: float = 0.55,
    weights: Sequence[float] | None = None,
    skip_box_threshold: float = 0.0,
    detections_per_image: int = 100,
) -> list[dict[str, Any]]:
    """Returns one set of detections, in COCO's result format, from those of several models.

    * "wbf", weighted boxes fusion (Solovyev et al., 2021), clusters the boxes of a class. The box
      of a cluster is the mean weighted by the scores. Its score is the mean score times the share
      of the models that have a box in the cluster.
    * "soft-nms" (Bodla et al., 2017, Eq. 2) multiplies a score by 1 - IoU for each better box that
      the box overlaps.
    * "nms" leaves out a box that overlaps a better one.

    The last two multiply the scores of a model by its weight over the largest weight.

    Args:
        models: the results of each model: dicts of image_id, category_id, bbox (x, y, width,
            height in pixels) and score. Boxes of score 0, or without area inside the image, are
            left out.
        sizes: (width, height) of each image in pixels.
        iou_threshold: boxes of one class that overlap more are one object.
        weights: one per model, above 0; by default all are equal.
        skip_box_threshold: boxes with a lower score are left out.
        detections_per_image: the most that are kept.

    Returns:
        The detections by image, in the order of falling scores; the boxes are inside the image.

    Raises:
        ValueError: ``method`` is unknown.
        ImportError: ensemble-boxes is not installed.
    """
    if method not in IOU_THRESHOLDS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(IOU_THRESHOLDS)}")
    factors = np.ones(len(models)) if weights is None else np.asarray(weights, dtype=float)
    by_image: dict[int | str, list[list[Mapping[str, Any]]]] = {}
    for number, results in enumerate(models):
        for result in results:
            # The mean of a cluster whose scores are all 0 would be 0 / 0.
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
        found = _fuse_image(boxes, scores, labels, factors, method, iou_threshold)
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


_Detections = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(n, 4) boxes as corners in parts of the image, (n,) scores and (n,) labels."""


def _fuse_image(
    boxes: list[np.ndarray],
    scores: list[np.ndarray],
    labels: list[np.ndarray],
    weights: np.ndarray,
    method: str,
    iou_threshold: float,
) -> _Detections:
    """Fuses the detections in one image; each list has one array per model."""
    package = load_ensemble_boxes()
    if not any(map(len, boxes)):
        return np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    if method == "wbf":
        # The package's default counts boxes instead of models: two boxes of one model count twice.
        return package.weighted_boxes_fusion(
            boxes, scores, labels, weights, iou_threshold, conf_type="box_and_model_avg"
        )
    # The package would divide by the sum of the weights: the scores of four equal models by four.
    scores = [s * w / weights.max() for s, w in zip(scores, weights, strict=True)]
    joined = np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels)
    return _suppress(joined, method, iou_threshold)


def _suppress(detections: _Detections, method: str, iou_threshold: float) -> _Detections:
    # The package's soft_nms returns the scores as they were, so duplicates keep their rank. Its
    # inner function writes the new scores into its argument, in the order of what it returns. It
    # also does plain NMS, for which the package otherwise compiles a second implementation.
    from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float

    boxes, scores, labels = detections
    number = {"soft-nms": 1, "nms": 3}[method]
    found = []
    for label in np.unique(labels):
        own, decayed = boxes[labels == label], scores[labels == label].copy()
        keep = cpu_soft_nms_float(own, decayed, iou_threshold, sigma=0, thresh=0, method=number)
        found.append((own[keep], decayed[decayed > 0], np.full(len(keep), label)))
    kept_boxes, kept_scores, kept_labels = map(np.concatenate, zip(*found, strict=True))
    return kept_boxes, kept_scores, kept_labels
