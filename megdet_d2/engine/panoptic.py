"""Evaluates panoptic segmentation (PQ) by panopticapi or hotcoco, whichever is installed."""

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image

logger = logging.getLogger(__name__)


def pq_library() -> str | None:
    """Returns the library that computes PQ: "panopticapi", "hotcoco", or None without either.

    panopticapi is the reference, and in no package index. hotcoco returns its numbers.
    """
    found = (name for name in ("panopticapi", "hotcoco") if importlib.util.find_spec(name))
    return next(found, None)


class OutputEvaluator(DatasetEvaluator):
    """An evaluator of the outputs that have one key, for models that may not return it.

    A Mask R-CNN can be evaluated on a panoptic set; Detectron2's evaluators of PQ and mIoU would
    end in a KeyError.

    Args:
        evaluator: gets the outputs with the key, and their inputs.
        key: "sem_seg" or "panoptic_seg".
    """

    def __init__(self, evaluator: DatasetEvaluator, key: str):
        self.evaluator = evaluator
        self.key = key
        self._found = False

    def reset(self) -> None:
        """Starts an evaluation."""
        self._found = False
        self.evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Passes on the pairs whose output has the key."""
        pairs = [
            (given, output)
            for given, output in zip(inputs, outputs, strict=True)
            if self.key in output
        ]
        if pairs:
            self._found = True
            self.evaluator.process(*zip(*pairs, strict=True))

    def evaluate(self) -> dict[str, Any] | None:
        """Returns the results; none, and a warning, if no process has an output with the key."""
        if any(comm.all_gather(self._found)):
            return self.evaluator.evaluate()
        logger.warning(
            f"No output of the model has {self.key!r}: {type(self.evaluator).__name__} is left out"
        )
        return {}


class PanopticEvaluator(COCOPanopticEvaluator):
    """An evaluator of PQ: Detectron2's, which calls panopticapi or in its place hotcoco."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Stores the segments of each image as a PNG file."""
        with _panopticapi():
            super().process(inputs, outputs)

    def evaluate(self) -> dict[str, Any] | None:
        """Returns PQ, SQ and RQ in percent, of all classes, of things and of stuff."""
        with _panopticapi():
            return super().evaluate()


@contextlib.contextmanager
def _panopticapi() -> Iterator[None]:
    """Lets Detectron2 import panopticapi; without it, its two functions are those of hotcoco."""
    if pq_library() == "panopticapi":
        yield
        return
    utils, evaluation = ModuleType("panopticapi.utils"), ModuleType("panopticapi.evaluation")
    vars(utils)["id2rgb"] = id_to_rgb
    vars(evaluation)["pq_compute"] = importlib.import_module("hotcoco.panoptic").pq_compute
    modules = {"panopticapi": ModuleType("panopticapi"), utils.__name__: utils}
    with mock.patch.dict(sys.modules, {**modules, evaluation.__name__: evaluation}):
        yield


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Returns segment ids (h, w) as the pixels of COCO's panoptic PNG files, (h, w, 3), uint8.

    An id is R + 256 G + 256² B.
    """
    digits = np.asarray(ids, dtype=np.uint32)[..., None] >> np.array([0, 8, 16], dtype=np.uint32)
    return (digits & 255).astype(np.uint8)


def load_labels(file_name: str, dtype: Any = None, copy: bool = True) -> np.ndarray:
    """Returns the pixels of a label map, (h, w), as a copy that the evaluator may change.

    Detectron2's function asks NumPy for no copy, which NumPy 2 refuses.
    """
    with PathManager.open(file_name, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)
