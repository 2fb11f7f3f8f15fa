"""Checks that an update takes the images that the config says.

The learning rate, the epochs, the BN size and the place in the data all follow from the config's
mini-batch. A training loader or a step that someone has overridden may take another one.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from detectron2.engine import SimpleTrainer
from torch import Tensor

if TYPE_CHECKING:
    from .progress import Layout

logger = logging.getLogger(__name__)

_LOADER_FIX = (
    "A loader yields the images of one micro-batch in one process. Override "
    "build_mapper(cls, cfg, is_train) in place of build_train_loader, or let it return "
    "super().build_train_loader(cfg, mapper=...), or give your loader total_batch_size={total}"
)


def count_images(batch: Any) -> int | None:
    """Returns the number of images in a batch; None where its type does not tell.

    Detectron2's batches are lists of dicts. A tuple may be several batches, or images and labels.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, list) and all(isinstance(image, (dict, Tensor)) for image in batch):
        return len(batch)
    return None


class MiniBatchCheck:
    """Counts the batches and images that each update takes from the trainer's loader.

    In the first update of a run another number than the layout's is an error, before the model
    sees the images. Later it is a warning, once, since a loader may end with a smaller batch.

    Args:
        layout: processes, micro-batches and images that make up a mini-batch.
        owner: the name of the trainer's class, for messages.
    """

    def __init__(self, layout: "Layout", owner: str):
        self._layout = layout
        self._owner = owner
        self._taken = 0  # batches in this update
        self._is_first = True
        self._warned = False

    def expect(self, layout: "Layout") -> None:
        """Sets the layout of the updates from now on."""
        self._layout = layout

    def begin(self, trainer: SimpleTrainer) -> None:
        """Starts an update; from now on all batches of the trainer's loader are counted."""
        self._taken = 0
        # The iterator is a property in new versions and is stored under another name.
        batches = getattr(trainer, "_data_loader_iter", None)
        if batches is not None and not isinstance(batches, _Counted):
            trainer._data_loader_iter_obj = _Counted(batches, self)

    def take(self, batch: Any) -> None:
        """Counts a batch.

        Raises:
            ValueError: in the first update, if it has another number of images than the layout.
        """
        self._taken += 1
        layout, images = self._layout, count_images(batch)
        if images == layout.images_per_gpu:
            return
        if images is None:
            self._warn(
                f"{self._owner}: the training loader yields {_describe(batch)}, whose images "
                f"cannot be counted. images_seen, epochs and the BN size take it for "
                f"{layout.images_per_gpu} images"
            )
            return
        said = (
            f"{self._owner}: the training loader has yielded {images} images where the config says "
            f"{layout.images_per_gpu}: SOLVER.IMS_PER_BATCH {layout.batch_size} / "
            f"({layout.processes} processes x MEGDET.ACCUMULATION_STEPS "
            f"{layout.accumulation_steps})"
        )
        if self._is_first:
            total = layout.images_per_gpu * layout.processes
            raise ValueError(
                f"{said}. The learning rate, epochs, BN size and images_seen would all be wrong. "
                + _LOADER_FIX.format(total=total)
            )
        self._warn(f"{said}. images_seen counts {layout.images_per_gpu}, here and later")

    def end(self) -> None:
        """Ends an update.

        Raises:
            ValueError: in the first update, if ``MEGDET.ACCUMULATION_STEPS`` had no effect.
        """
        first, self._is_first = self._is_first, False
        steps, taken = self._layout.accumulation_steps, self._taken
        if taken in (0, steps):  # 0: the step does not read the trainer's loader
            if not taken and first:
                self._warn(
                    f"{self._owner}.run_step does not read the trainer's loader by "
                    f"self._trainer._data_loader_iter, so its images cannot be counted. "
                    f"images_seen, epochs and the learning rate take an update for "
                    f"{self._layout.batch_size} images (SOLVER.IMS_PER_BATCH)"
                )
            return
        said = (
            f"{self._owner}: an update has taken {taken} batches of the training loader where "
            f"MEGDET.ACCUMULATION_STEPS is {steps}. The learning rate, epochs and images_seen "
            f"follow from {self._layout.batch_size} images an update (SOLVER.IMS_PER_BATCH)"
        )
        if first and steps > 1:
            raise ValueError(
                f"{said}. Call super().run_step() in run_step, and keep the trainer's inner "
                "trainer, self._trainer; or set MEGDET.ACCUMULATION_STEPS 1"
            )
        self._warn(said)

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(message)


class _Counted:
    """An iterator that shows each batch to a ``MiniBatchCheck``."""

    def __init__(self, batches: Iterator[Any], check: MiniBatchCheck):
        self._batches = batches
        self._check = check

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._check.take(batch)
        return batch


def _describe(batch: Any) -> str:
    if isinstance(batch, (list, tuple)) and batch:
        return f"a {type(batch).__name__} of {type(batch[0]).__name__}"
    return f"a {type(batch).__name__}"
