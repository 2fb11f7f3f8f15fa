"""Measures the training loss of a model on a set of images that stays the same."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from megdet_d2.engine.random_state import RandomState
from megdet_d2.norm.batch_norm import bare_model


class FixedLoss:
    """The mean loss of a model over fixed images, in fixed mini-batches, without augmentation.

    A detector has a loss only in training mode, so norms use the statistics of each mini-batch. The
    random choice of anchors and proposals is seeded, and is the same for every model. The images
    come from DATASETS.TEST: a branch has not trained on them, whatever its seed. Without a test set
    they come from DATASETS.TRAIN.

    Args:
        cfg: a config whose data sets are registered.
        images: the most images to take. They are spread evenly over the data set.
        micro_batch: images per forward pass. The images taken are a multiple of it.

    Attributes:
        images: the number of images that are taken.
        source: the data sets and the number of images, for a table.

    Raises:
        ValueError: the data set has fewer images with annotations than ``micro_batch``.
    """

    def __init__(self, cfg: CfgNode, images: int, micro_batch: int):
        key = "TEST" if cfg.DATASETS.TEST else "TRAIN"
        records = get_detection_dataset_dicts(
            cfg.DATASETS[key], filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        self.images = min(images, len(records)) // micro_batch * micro_batch
        if not self.images:
            raise ValueError(
                f"DATASETS.{key} {tuple(cfg.DATASETS[key])} has {len(records)} images with "
                f"annotations and --loss-images is {images}, but a forward pass takes "
                f"{micro_batch}: give more images, or a smaller --images-per-forward"
            )
        places = np.arange(self.images) * len(records) // self.images
        self._records = [records[place] for place in places]
        augmentations = build_augmentation(cfg, is_train=False)
        self._mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
        self._micro_batch = micro_batch
        held_out = "held out" if key == "TEST" else "DATASETS.TEST is empty, so not held out"
        self.source = f"{self.images} images of {', '.join(cfg.DATASETS[key])} ({held_out})"

    def __call__(self, model: nn.Module) -> float:
        """Returns the mean loss per image; changes neither the model nor any random numbers.

        Args:
            model: as it is called in training.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        # The running statistics of norms, and RetinaNet's normalizer, change in a forward.
        model = copy.deepcopy(bare_model(model)).train()
        state, total = RandomState(), 0.0
        try:
            seed_all_rng(0)
            with torch.no_grad(), EventStorage():  # Detectron2's models write scalars into it
                for batch in self._batches():
                    total += sum(loss.item() for loss in model(batch).values())
        finally:
            state.restore()
        if not math.isfinite(total):
            raise FloatingPointError("the loss on the fixed images is not finite")
        return total * self._micro_batch / self.images

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        # Mapped again each time: the images of a real data set do not all fit into the memory.
        for start in range(0, self.images, self._micro_batch):
            records = self._records[start : start + self._micro_batch]
            yield [self._mapper(record) for record in records]
