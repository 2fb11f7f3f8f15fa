"""Compares the sizes of a data set's boxes with the anchors of a config."""

import math
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, ProposalNetwork, RetinaNet

from megdet_d2.data import Finding

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_FAR = 0.5  # a box is far from the anchors if none of its shape has a larger IoU
_MANY = 0.25  # part of the boxes


@dataclass(frozen=True)
class BoxSizes:
    """The sizes of a data set's boxes, in pixels.

    Attributes:
        in_file: (N, 2), float64: width and height in the image file.
        in_model: (N, 2): the same after ``INPUT`` has resized the image.
        best_ious: (N,): the IoU of each box with the best anchor, with the same centre; None for
            a model without anchors.
    """

    in_file: np.ndarray
    in_model: np.ndarray
    best_ious: np.ndarray | None

    def quantiles(self) -> list[dict[str, str]]:
        """Returns the rows of a table: quantiles of √(w h), of w / h and of the best IoU."""
        columns = {
            "size in the file": np.sqrt(self.in_file.prod(axis=1)),
            "size in the model": np.sqrt(self.in_model.prod(axis=1)),
            "width / height": self.in_file[:, 0] / self.in_file[:, 1],
        }
        if self.best_ious is not None:
            columns["IoU with the best anchor"] = self.best_ious
        return [
            {"boxes": f"{quantile:.0%} are below"}
            | {name: f"{np.quantile(values, quantile):.3g}" for name, values in columns.items()}
            for quantile in QUANTILES
        ]


def measure_boxes(cfg: CfgNode, coco: dict | None) -> BoxSizes | None:
    """Measures the boxes of a json's objects; returns None if there are none.

    Args:
        coco: the json's content, which may have faults: boxes that are none are left out.
    """
    content = coco or {}
    sizes = {
        str(image.get("id")): (image["width"], image["height"])
        for image in content.get("images", [])
        if _positive(image.get("width"), image.get("height"))
    }
    sides, scales = [], []
    for annotation in content.get("annotations", []):
        box, size = annotation.get("bbox"), sizes.get(str(annotation.get("image_id")))
        if size and is_box(box) and not annotation.get("iscrowd"):
            sides.append(box[2:])
            scales.append(_scale(cfg, *size))
    if not sides:
        return None
    in_file = np.array(sides, dtype=np.float64)
    in_model = in_file * np.array(scales)[:, None]
    return BoxSizes(in_file, in_model, _best_ious(cfg, in_model) if _has_anchors(cfg) else None)


def is_box(box: object) -> bool:
    """Returns True for four finite numbers with a width and a height above 0."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
        and _positive(*box[2:])
    )


def _positive(*numbers: object) -> bool:
    return all(isinstance(number, (int, float)) and number > 0 for number in numbers)


def _scale(cfg: CfgNode, width: float, height: float) -> float:
    """Returns the factor of Detectron2's ResizeShortestEdge in training, in the mean."""
    sides = cfg.INPUT.MIN_SIZE_TRAIN
    side = sum(sides) / len(sides) if isinstance(sides, (list, tuple)) else sides
    if not side:
        return 1.0
    return min(side / min(width, height), cfg.INPUT.MAX_SIZE_TRAIN / max(width, height))


def _has_anchors(cfg: CfgNode) -> bool:
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    anchored = (GeneralizedRCNN, ProposalNetwork, RetinaNet)
    return isinstance(kind, type) and issubclass(kind, anchored)


def _best_ious(cfg: CfgNode, boxes: np.ndarray) -> np.ndarray:
    keys = cfg.MODEL.ANCHOR_GENERATOR
    sizes, ratios = _flat(keys.SIZES), _flat(keys.ASPECT_RATIOS)
    best = np.zeros(len(boxes))
    for size in sizes:
        for ratio in ratios:  # height / width
            anchor = size / math.sqrt(ratio), size * math.sqrt(ratio)
            common = np.minimum(boxes, anchor).prod(axis=1)
            best = np.maximum(best, common / (boxes.prod(axis=1) + size**2 - common))
    return best


def _flat(levels: list) -> list[float]:
    return [x for level in levels for x in (level if isinstance(level, (list, tuple)) else [level])]


def find_anchor_faults(cfg: CfgNode, boxes: BoxSizes) -> list[Finding]:
    """Returns a warning, with sizes that fit, if no anchor is near many of the boxes."""
    if boxes.best_ious is None:
        return []
    far = float((boxes.best_ious < _FAR).mean())
    if far <= _MANY:
        return []
    levels = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    number = len(levels) if len(levels) > 1 else 1
    sizes = np.sqrt(boxes.in_model.prod(axis=1))
    # Each level gets the middle of an equal part of the boxes.
    fitting = np.quantile(sizes, (np.arange(number) + 0.5) / number)
    rows = [[max(1, round(float(size)))] for size in fitting]
    return [
        Finding(
            "warning",
            "anchors",
            f"MODEL.ANCHOR_GENERATOR.SIZES is {levels}",
            "",
            f"{far:.0%} of the boxes have no IoU above {_FAR} with an anchor, since their size in "
            f"the model, √(w h), is {sizes.min():.3g} to {sizes.max():.3g} pixels",
            f"try {rows}, or other INPUT.MIN_SIZE_TRAIN or ASPECT_RATIOS",
        )
    ]
