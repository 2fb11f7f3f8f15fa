"""Checks images and annotations while they load; an error names the image."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from megdet_d2._moved import renamed

# Takes an entry of a data set, returns an input of the model, or None to draw another image.
Mapper: TypeAlias = Callable[[dict], dict | None]


class BadImageError(ValueError):
    """An image that cannot be trained on; the message names its file and what is wrong."""


class CheckedMapper:
    """A mapper of Detectron2 that raises ``BadImageError`` on every failure.

    Boxes and the mapper's output are checked too. Without the checks, a box or pixel that is not
    finite, or an unknown class, is dropped silently, makes the loss NaN, or fails a GPU assertion.

    Args:
        mapper: takes an entry of the data set and returns a model's input, or None to draw another
            image.
        num_classes: number of classes of the model; None to leave classes unchecked.

    Raises:
        BadImageError: the image cannot be read or mapped, or the mapper's output is invalid.
    """

    def __init__(self, mapper: Mapper, num_classes: int | None = None):
        self._mapper = mapper
        self._num_classes = num_classes

    def __call__(self, entry: dict) -> dict | None:
        name = entry.get("file_name") or f"image {entry.get('image_id', '?')}"
        for annotation in entry.get("annotations", ()):
            box = annotation.get("bbox", ())
            if not all(map(math.isfinite, box)):  # Detectron2 would take it for an empty one
                raise BadImageError(f"{name}: the box {box} is not finite")
        try:
            mapped = self._mapper(entry)
        except MemoryError:
            raise
        except Exception as error:  # PIL alone raises OSError, ValueError, SyntaxError and more
            raise BadImageError(f"{name}: {type(error).__name__}: {error}") from error
        fault = find_invalid(mapped, self._num_classes) if mapped is not None else ""
        if fault:
            raise BadImageError(f"{name}: {fault}")
        return mapped


def find_invalid(mapped: dict[str, Any], num_classes: int | None) -> str:
    """Returns the fault of a model's input, or ""."""
    image, instances = mapped.get("image"), mapped.get("instances")
    if torch.is_tensor(image) and image.is_floating_point() and not image.isfinite().all():
        return "a pixel is not finite"
    if instances is None:
        return ""
    if instances.has("gt_boxes"):
        boxes = instances.gt_boxes.tensor
        wrong = boxes[~boxes.isfinite().all(dim=1)]
        if len(wrong):
            return f"the box {wrong[0].tolist()} is not finite"
    if instances.has("gt_classes") and num_classes is not None:
        classes = instances.gt_classes
        wrong = classes[(classes < 0) | (classes >= num_classes)]
        if len(wrong):
            return f"the class {int(wrong[0])} is none of the model's, 0 to {num_classes - 1}"
    return ""


__getattr__ = renamed(__name__, find_fault="find_invalid")
