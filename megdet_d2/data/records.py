"""Records of data sets that other code registers, loaded once and read as the rows of a COCO json.

So the checks of ``DATASETS.COCO`` hold for them too.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode

# Detectron2's data sets are known to be right, and large.
_BUILTIN = frozenset(DatasetCatalog.list())
# Training sets between their check and the loader.
_loaded: dict[str, list[dict]] = {}


def is_foreign(name: str) -> bool:
    """Returns True for a data set that neither Detectron2 nor this package has made."""
    return name not in _BUILTIN and not name.startswith("megdet_digits")


def load_records(name: str, keep: bool) -> list[dict] | None:
    """Loads a registered data set; None if it is not a list of Detectron2's records.

    Args:
        name: the data set.
        keep: keeps the records for Detectron2's next calls, until ``forget_records``.
    """
    records = DatasetCatalog.get(name)
    if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
        return None
    if keep:
        _loaded[name] = records
        load = DatasetCatalog.pop(name)
        if getattr(load, "func", None) is not _from_memory:
            load = functools.partial(_from_memory, name, load)
        DatasetCatalog.register(name, load)
    return records


def load_training_records(cfg: CfgNode, proposal_files: Sequence[str] | None = None) -> list[dict]:
    """Returns the records of DATASETS.TRAIN, with the filters of Detectron2's training loader.

    Args:
        cfg: a config whose data sets are registered.
        proposal_files: as in ``get_detection_dataset_dicts``.
    """
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=least if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=proposal_files,
        check_consistency=False,  # logs the class table, which the training loader does
    )


def forget_records() -> None:
    """Removes all records from memory."""
    _loaded.clear()


def _from_memory(name: str, load: Callable[[], list[dict]]) -> list[dict]:
    return _loaded[name] if name in _loaded else load()


def as_coco(records: Sequence[dict], classes: Sequence[str] | None) -> dict[str, Any] | None:
    """Returns records as the content of a COCO json; None if they have no boxes.

    Rotated boxes are left out. Images have the ids of their records where those are unique, and
    infinite sides where their size is not known.

    Args:
        records: in Detectron2's standard format.
        classes: the names of the classes; None if they are not known.
    """
    names = [record.get("image_id") for record in records]
    unique = len(set(map(repr, names))) == len(names) and None not in names
    images, annotations = [], []
    for i, record in enumerate(records):
        key = f"{names[i]}" if unique else f"[{i}]"
        images.append(
            {
                "id": key,
                "file_name": os.fspath(record.get("file_name", "")),
                "width": _plain(record.get("width", math.inf)),
                "height": _plain(record.get("height", math.inf)),
            }
        )
        for k, annotation in enumerate(record.get("annotations", ())):
            box = _as_xywh(annotation)
            if box is not None:
                annotations.append(
                    {
                        "id": f"{key}[{k}]",
                        "image_id": key,
                        "category_id": _plain(annotation.get("category_id", 0)),
                        "bbox": box,
                        "iscrowd": _plain(annotation.get("iscrowd", 0)),
                    }
                )
    if not annotations and not any("annotations" in record for record in records):
        return None
    ids = range(len(classes)) if classes else {row["category_id"] for row in annotations}
    categories = [{"id": i, "name": classes[i] if classes else str(i)} for i in ids]
    return {"images": images, "annotations": annotations, "categories": categories}


def _plain(value: Any) -> Any:
    """Returns a NumPy number or a tensor as a number of Python."""
    return value.item() if hasattr(value, "item") else value


def _as_xywh(annotation: dict) -> list[Any] | None:
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if box is None or mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
        return None
    try:
        numbers = [float(value) for value in box]
    except (TypeError, ValueError, OverflowError):
        return list(box) if hasattr(box, "__iter__") else [box]
    if mode == BoxMode.XYXY_ABS and len(numbers) == 4:
        x, y, right, bottom = numbers
        return [x, y, right - x, bottom - y]
    return numbers
