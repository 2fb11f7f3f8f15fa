"""Keeps mapped images in memory, for trainings whose augmentations always do the same.

Detectron2 reads and maps an image each time it comes. Where an image is small, or comes often, that
is a large part of a step.
"""

import copy
import logging
import pickle
from typing import Any

import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch.utils.data import IterableDataset

from .mapping import Mapper

logger = logging.getLogger(__name__)

_MB = 2**20


class Cache:
    """Keeps mapped images by their index in the data set, up to a number of bytes.

    Images that come when it is full are not kept.

    Args:
        megabytes: the limit, for this process. A loader's workers have one each.
    """

    def __init__(self, megabytes: int):
        self._left = megabytes * _MB
        self._kept: dict[int, dict] = {}

    def get(self, index: int) -> dict | None:
        """Returns a copy of an image's mapped data, or None if it is not kept."""
        kept = self._kept.get(index)
        return None if kept is None else _copy(kept)

    def keep(self, index: int, mapped: dict) -> None:
        """Keeps a copy of an image's mapped data, if there is room."""
        if self._left <= 0:
            return
        self._left -= len(pickle.dumps(mapped))
        if self._left <= 0:
            logger.warning(
                f"DATALOADER.CACHE_MB is full: {len(self._kept)} images are in it. The others are "
                "loaded each time"
            )
        else:
            self._kept[index] = _copy(mapped)


def find_cache_fault(megabytes: int, mapper: Mapper, dataset: Any) -> str:
    """Returns why a mapper's output cannot be kept, with the fix; "" if it can.

    Args:
        megabytes: ``DATALOADER.CACHE_MB``; 0 keeps nothing.
        mapper: of the training images.
        dataset: of the training images.
    """
    if megabytes == 0:
        return ""
    said = f"DATALOADER.CACHE_MB is {megabytes}"
    off = "; set DATALOADER.CACHE_MB 0"
    if isinstance(dataset, IterableDataset):
        return f"{said}, but the data set is an IterableDataset, whose images have no index{off}"
    if type(mapper) is not DatasetMapper:
        name = getattr(mapper, "__qualname__", type(mapper).__name__)  # of a function, else
        return f"{said}, but the mapper {name} may map an image differently each time{off}"
    stock: Any = mapper
    for augmentation in stock.augmentations.augs:
        fix = _fix(augmentation)
        if fix is not None:
            name = type(augmentation).__name__
            return f"{said}, but {name} may be random; set {fix}DATALOADER.CACHE_MB 0"
    return ""


def _fix(augmentation: Any) -> str | None:
    """Returns what makes an augmentation do the same each time, or ""; None where it does."""
    if isinstance(augmentation, (T.Transform, T.Resize)):
        return None
    if isinstance(augmentation, T.RandomFlip):
        return None if augmentation.prob in (0, 1) else 'INPUT.RANDOM_FLIP "none", or '
    if isinstance(augmentation, T.ResizeShortestEdge):
        one = len(set(augmentation.short_edge_length)) == 1
        return None if one else "one size in INPUT.MIN_SIZE_TRAIN, or "
    return ""


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, Instances):
        fields = {name: _copy(field) for name, field in value.get_fields().items()}
        return Instances(value.image_size, **fields)
    if isinstance(value, (torch.Tensor, Boxes)):
        return value.clone()
    return copy.deepcopy(value)
