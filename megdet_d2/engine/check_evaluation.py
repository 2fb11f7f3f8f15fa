"""Checks what an evaluation needs before training, since it would fail after it."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.file_io import PathManager

from megdet_d2.data.classes import class_fault, class_keys, classes_of
from megdet_d2.data.finding import Finding
from megdet_d2.data.records import is_foreign

from .ap_limits import find_score_threshold
from .evaluation import NO_PQ, no_evaluator
from .panoptic import pq_library
from .saved_classes import find_other_classes, known_classes

CLASS_FAULTS = ("num-classes", "categories-differ")
"""Kinds of findings that are none where a mapper merges classes."""

_COCO_KEYPOINTS = 17  # pycocotools has their sigmas
_WITH_AP = ("coco", "coco_panoptic_seg", "lvis", "pascal_voc", "cityscapes_instance")
_FREQUENCIES = ("r", "c", "f")


def inspect_evaluation(cfg: CfgNode) -> list[Finding]:
    """Returns what makes an evaluation by ``build_evaluator`` fail, or its numbers wrong.

    Args:
        cfg: its data sets are registered, and their files are there.
    """
    found = [
        finding
        for name in cfg.DATASETS.TEST
        for finding in _INSPECTIONS.get(_type_of(name), _find_no_evaluator)(cfg, name)
    ]
    if any(_type_of(name) in _WITH_AP for name in cfg.DATASETS.TEST):
        found += find_score_threshold(cfg)
    return found


def _type_of(name: str) -> str | None:
    return MetadataCatalog.get(name).get("evaluator_type", None)


def _find_no_evaluator(cfg: CfgNode, name: str) -> Iterator[Finding]:
    where, _, fix = no_evaluator(name).partition("; ")
    yield Finding("warning", "no-evaluator", where, "", "it is not evaluated", fix)


def _find_nothing(cfg: CfgNode, name: str) -> Iterator[Finding]:
    yield from ()


def _inspect_coco(cfg: CfgNode, name: str) -> Iterator[Finding]:
    # The classes of sets of DATASETS.COCO have been checked, and of those that told them at once.
    checked = {triple[0] for triple in cfg.DATASETS.COCO}
    classes = known_classes(name)
    keypoints = cfg.MODEL.KEYPOINT_ON and _is_rcnn(cfg)
    content = _read(name) if keypoints or (not classes and name not in checked) else None
    classes = classes or classes_of((content or {}).get("categories", []))
    if classes and is_foreign(name) and name not in checked:
        yield from _find_class_faults(cfg, name, classes)
    if content and keypoints and content.get("annotations"):
        yield from _find_keypoint_faults(cfg, name, content["annotations"])


# --- classes -------------------------------------------------------------------------------------


def _find_class_faults(cfg: CfgNode, name: str, classes: list[str]) -> Iterator[Finding]:
    """Yields what makes an AP wrong: Detectron2 numbers classes in the order of the ids."""
    where = f"DATASETS.TEST {name!r}"
    for key in class_keys(cfg, "thing"):
        if fault := class_fault(cfg, "thing", key, name, [len(classes)]):
            yield Finding("error", "num-classes", where, "", *fault)
            return
    for train in cfg.DATASETS.TRAIN:
        yield from find_other_classes(where, classes, repr(train), known_classes(train))


# --- keypoints -----------------------------------------------------------------------------------


def _is_rcnn(cfg: CfgNode) -> bool:
    kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(kind, type) and issubclass(kind, GeneralizedRCNN)


def _find_keypoint_faults(cfg: CfgNode, name: str, annotations: list[dict]) -> Iterator[Finding]:
    where, file = f"DATASETS.TEST {name!r}", MetadataCatalog.get(name).json_file
    expected, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    if len(sigmas or [0] * _COCO_KEYPOINTS) != expected:
        yield Finding(
            "error",
            "keypoint-sigmas",
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} values"
            + ("" if sigmas else ", which stands for COCO's 17"),
            "",
            f"{key} is {expected}",
            f"give {expected} sigmas, such as [{', '.join(['0.05'] * min(expected, 4))}"
            f"{', ...' if expected > 4 else ''}], or correct {key}",
        )
    elif any(not sigma > 0 for sigma in sigmas):
        yield Finding(
            "error",
            "keypoint-sigmas",
            f"TEST.KEYPOINT_OKS_SIGMAS is {sigmas}",
            "",
            "a sigma is not above 0",
            "give the standard deviation of each keypoint, relative to the object's scale",
        )
    for wanted in ("keypoints", "num_keypoints"):
        missing = [a for a in annotations if wanted not in a]
        if missing:
            yield _of_rows(
                "keypoints-missing", where, file, "annotations", missing, annotations,
                f"have no {wanted!r}, which pycocotools needs in each",
                "add it, with keypoints of 0, 0, 0 where none is labelled",
            )  # fmt: skip
    numbers = [(a, _number(a["keypoints"])) for a in annotations if "keypoints" in a]
    faulty = [(a, number) for a, number in numbers if number != expected]
    if faulty:
        yield _of_rows(
            "keypoints-number", where, file, "annotations", [a for a, _ in faulty], annotations,
            f"have another number of keypoints than {key}, {expected}",
            f"give x, y and visibility of each, or correct {key}",
            [f"{number:g}" for _, number in faulty],
        )  # fmt: skip


def _number(keypoints: Any) -> float:
    return len(keypoints) / 3 if isinstance(keypoints, list) else 0


# --- LVIS ----------------------------------------------------------------------------------------


def _inspect_lvis(cfg: CfgNode, name: str) -> Iterator[Finding]:
    where = f"DATASETS.TEST {name!r}"
    if not importlib.util.find_spec("lvis"):
        yield Finding(
            "error",
            "missing-library",
            where,
            "",
            "it is evaluated by the package lvis, which is not installed",
            "pip install lvis",
        )
    content = _read(name)
    if not content or not content.get("annotations"):  # a challenge's set: results, and no AP
        return
    file = MetadataCatalog.get(name).json_file
    for rows, key, is_right, kind in (
        ("images", "neg_category_ids", _is_list, "a list of category ids that are not in it"),
        ("images", "not_exhaustive_category_ids", _is_list,
         "a list of category ids of which not all objects are labelled"),
        ("categories", "frequency", _FREQUENCIES.__contains__, "'r', 'c' or 'f'"),
    ):  # fmt: skip
        faulty = [row for row in content[rows] if not is_right(row.get(key))]
        if faulty:
            yield _of_rows(
                f"lvis-{key.replace('_', '-')}", where, file, rows, faulty, content[rows],
                f"have no {key!r} as LVIS's evaluation needs it",
                f"add it, {kind}; or register the set as COCO (evaluator_type 'coco')",
            )  # fmt: skip


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


# --- panoptic ------------------------------------------------------------------------------------


def _inspect_panoptic(cfg: CfgNode, name: str) -> Iterator[Finding]:
    where = f"DATASETS.TEST {name!r}"
    metadata = MetadataCatalog.get(name).as_dict()
    yield from _find_missing(where, metadata, "panoptic_json", "panoptic_root", "sem_seg_root")
    if not pq_library():
        yield Finding("warning", "missing-library", where, "", *NO_PQ)
    if metadata.get("json_file"):
        yield from _inspect_coco(cfg, name)


def _inspect_semantic(cfg: CfgNode, name: str) -> Iterator[Finding]:
    metadata = MetadataCatalog.get(name).as_dict()
    where = f"DATASETS.TEST {name!r}"
    yield from _find_missing(where, metadata, "sem_seg_root")
    missing = [key for key in ("stuff_classes", "ignore_label") if key not in metadata]
    if missing:
        yield Finding(
            "error",
            "missing-metadata",
            where,
            "",
            f"its metadata has no {' and no '.join(missing)}, which mIoU needs",
            f"MetadataCatalog.get({name!r}).set(stuff_classes=[...], ignore_label=255)",
        )


def _find_missing(where: str, metadata: dict, *keys: str) -> Iterator[Finding]:
    for key in keys:
        path = metadata.get(key)
        is_there = PathManager.isfile if key.endswith("_json") else PathManager.isdir
        if path and not is_there(path):
            yield Finding(
                "error",
                "missing-file",
                where,
                str(path),
                f"its {key} is not there",
                "put it there, or correct the path where the data set is registered",
            )


# --- Cityscapes ----------------------------------------------------------------------------------


def _inspect_cityscapes(cfg: CfgNode, name: str) -> Iterator[Finding]:
    if not importlib.util.find_spec("cityscapesscripts"):
        yield Finding(
            "error",
            "missing-library",
            f"DATASETS.TEST {name!r}",
            "",
            "it is evaluated by the package cityscapesscripts, which is not installed",
            "pip install cityscapesscripts",
        )


_INSPECTIONS: dict[str | None, Callable[[CfgNode, str], Iterator[Finding]]] = {
    "coco": _inspect_coco,
    "coco_panoptic_seg": _inspect_panoptic,
    "sem_seg": _inspect_semantic,
    "lvis": _inspect_lvis,
    "pascal_voc": _find_nothing,
    "cityscapes_instance": _inspect_cityscapes,
    "cityscapes_sem_seg": _inspect_cityscapes,
}


def _read(name: str) -> dict | None:
    """Returns the content of a set's json; None if it is not there."""
    path = MetadataCatalog.get(name).get("json_file", None)
    if not path or not PathManager.isfile(path):
        return None
    with PathManager.open(path) as file:
        return json.load(file)


def _of_rows(
    kind: str,
    where: str,
    file: str,
    rows: str,
    faulty: list[dict],
    all_rows: list[dict],
    problem: str,
    fix: str,
    values: list[str] | None = None,
) -> Finding:
    return Finding(
        "error", kind, where, file, problem, fix, rows=rows, num_rows=len(all_rows),
        ids=tuple(row.get("id") for row in faulty), values=tuple(values or ()),
    )  # fmt: skip
