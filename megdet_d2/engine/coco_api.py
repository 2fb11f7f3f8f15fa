"""Computes COCO's AP by hotcoco: pycocotools' numbers in a fraction of its time."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

from detectron2.evaluation import COCOEvaluator, coco_evaluation

logger = logging.getLogger(__name__)

COCO_APIS = ("pycocotools", "hotcoco")
"""The values of ``TEST.COCO_API``."""


def find_coco_api_fault(api: str) -> str:
    """Returns the fault of a ``TEST.COCO_API`` with its fix; "" if it can be used here."""
    if api not in COCO_APIS:
        return f"TEST.COCO_API is {api!r}; use one of {', '.join(COCO_APIS)}"
    if importlib.util.find_spec(api) is None:
        return (
            f"TEST.COCO_API is {api!r}, which is not installed; run  pip install {api},  or set "
            "TEST.COCO_API 'pycocotools'"
        )
    return ""


class HotcocoEvaluator(COCOEvaluator):
    """A ``COCOEvaluator`` that computes AP by hotcoco.

    pycocotools takes an object with the annotation id 0 for one that is never found, and hotcoco
    does not. A set with this id is evaluated by pycocotools, with a warning.

    Args:
        dataset_name: a registered data set.
        kwargs: other arguments of ``COCOEvaluator``.
    """

    _coco_api: Any

    def __init__(self, dataset_name: str, **kwargs: Any):
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        self._fault = _find_unsupported(self._coco_api.dataset)
        if self._fault:
            logger.warning(
                f"TEST.COCO_API 'hotcoco': DATASETS.TEST {dataset_name!r} {self._fault}, so it is "
                "evaluated by pycocotools"
            )

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        with contextlib.nullcontext() if self._fault else self._hotcoco():
            super()._eval_predictions(predictions, img_ids)

    @contextlib.contextmanager
    def _hotcoco(self) -> Iterator[None]:
        """Lets Detectron2 use hotcoco's two classes, which have the methods of pycocotools'."""
        import hotcoco

        stock = self._coco_api
        self._coco_api = hotcoco.COCO(stock.dataset)
        try:
            with mock.patch.object(coco_evaluation, "COCOeval", hotcoco.COCOeval):
                yield
        finally:
            self._coco_api = stock


def _find_unsupported(dataset: dict) -> str:
    """Returns the reason, as the end of a sentence, why only pycocotools gives its own numbers."""
    annotations = dataset.get("annotations", [])
    if any(annotation.get("id") == 0 for annotation in annotations):
        return "has the annotation id 0, which pycocotools takes for no match"
    ids = [row.get("id") for row in (*dataset.get("images", ()), *annotations)]
    if any(type(number) is not int for number in ids):
        return "has ids that are not whole numbers"
    return ""
