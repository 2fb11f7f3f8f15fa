"""Checks images and annotations while they load; an error names the image."""

import math
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from detectron2.data import DatasetMapper
from PIL import Image

from megdet_d2._moved import renamed

from .images import depth_fault

_PNG = b"\x89PNG\r\n\x1a\n"

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
        self._reads_8_bits = reads_8_bits(mapper)

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
        if self._reads_8_bits:
            fault = fault or _find_depth_fault(name)
        if fault:
            raise BadImageError(f"{name}: {fault}")
        return mapped


def reads_8_bits(mapper: Mapper) -> bool:
    """Returns True if Detectron2 reads the images, which cuts values above 255."""
    mapper = getattr(mapper, "stock", mapper)  # of a TorchvisionMapper
    return type(mapper).__call__ is DatasetMapper.__call__


def _find_depth_fault(path: str) -> str:
    # A JPEG has 8 bits, and most images are JPEGs.
    if path.lower().endswith((".jpg", ".jpeg")) or not os.path.isfile(path):
        return ""
    # PIL takes 20 times as long to open a PNG as to read the byte that says it.
    with open(path, "rb") as file:
        header = file.read(25)
    if header.startswith(_PNG) and header[24:] <= b"\x08":
        return ""
    with Image.open(path) as image:
        fault = depth_fault(image)
    if not fault:
        return ""
    return (
        f"it has more than 8 bits per channel ({fault}), and Detectron2 reads values above 255 as "
        "255; convert it to 8 bits, or read it by a mapper of Trainer.build_mapper"
    )


def find_invalid(mapped: dict[str, Any], num_classes: int | None) -> str:
    """Returns the fault of a model's input, or ""."""
    image, instances = mapped.get("image"), mapped.get("instances")
    if torch.is_tensor(image) and image.is_floating_point() and not image.isfinite().all():
        return "a pixel is not finite"
    if instances is None:
        return ""
    if instances.has("gt_boxes"):
        boxes = instances.gt_boxes.tensor
        if not boxes.isfinite().all():
            wrong = boxes[~boxes.isfinite().all(dim=1)]
            return f"the box {wrong[0].tolist()} is not finite"
    if instances.has("gt_classes") and num_classes is not None:
        for label in instances.gt_classes.tolist():
            if not 0 <= label < num_classes:
                return f"the class {label} is none of the model's, 0 to {num_classes - 1}"
    return ""


__getattr__ = renamed(__name__, find_fault="find_invalid")
