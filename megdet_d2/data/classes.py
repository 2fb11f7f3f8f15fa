"""The number of classes that a data set has, and that a config gives to its model."""

from collections.abc import Collection, Sequence
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

# Detectron2's architectures: their keys below MODEL, and whose classes each key counts.
_KEYS = {
    "GeneralizedRCNN": {"ROI_HEADS": "thing"},
    "PanopticFPN": {"ROI_HEADS": "thing", "SEM_SEG_HEAD": "stuff"},
    "SemanticSegmentor": {"SEM_SEG_HEAD": "stuff"},
    "RetinaNet": {"RETINANET": "thing"},
    "FCOS": {"FCOS": "thing"},
}


def class_keys(cfg: CfgNode, kind: str) -> list[str]:
    """Returns the NUM_CLASSES keys that one of Detectron2's architectures reads.

    Args:
        kind: "thing" or "stuff".

    Returns:
        none for architectures of other projects, and for models without classes of this kind.
    """
    keys = _KEYS.get(cfg.MODEL.META_ARCHITECTURE, {})
    return [
        f"MODEL.{key}.NUM_CLASSES" for key, of in keys.items() if of == kind and key in cfg.MODEL
    ]


def value_of(cfg: CfgNode, key: str) -> int:
    """Returns the value of a full key, such as MODEL.ROI_HEADS.NUM_CLASSES."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def num_classes(cfg: CfgNode) -> int | None:
    """Returns the object classes of the model that ``cfg`` builds; None if that is unknown."""
    return next((value_of(cfg, key) for key in class_keys(cfg, "thing")), None)


def classes_of(categories: Sequence[dict]) -> list[str] | None:
    """Returns the names of a json's categories in the order of their ids, as Detectron2 does.

    Returns:
        None if there are none, or a key is missing, which Detectron2 will name.
    """
    if not categories or not all("id" in row and "name" in row for row in categories):
        return None
    return [row["name"] for row in sorted(categories, key=lambda row: row["id"])]


def differing_classes(expected: Sequence[str], found: Sequence[str]) -> list[tuple]:
    """Returns the first places in which two lists of classes differ, with None past an end."""
    return [pair for pair in zip_longest(expected, found) if pair[0] != pair[1]][:6]


def class_counts(name: str, kind: str) -> list[int]:
    """Returns the numbers of "thing" or "stuff" classes that a data set's metadata allows.

    The first is the usual one. Panoptic data sets may list all names as things, and map the ids of
    some of them.

    Returns:
        none if Detectron2 does not know the classes, or not before it has loaded the data set.
    """
    metadata = MetadataCatalog.get(name).as_dict()
    lists = [metadata.get(f"{kind}_classes")]
    if kind == "thing":
        lists.append(metadata.get("thing_dataset_id_to_contiguous_id"))
    return list(dict.fromkeys(len(each) for each in lists if each))


def check_num_classes(
    cfg: CfgNode, kind: str, key: str, name: str, counts: Collection[int]
) -> None:
    """Checks that a key has one of the counts of a data set.

    Args:
        kind, key, name: "thing" or "stuff", a full NUM_CLASSES key, a data set.
        counts: see ``class_counts``; an empty one allows every value.

    Raises:
        ValueError: it has another value. The last classes would train as background, or be unused.
    """
    fault = class_fault(cfg, kind, key, name, counts)
    if fault:
        raise ValueError("; ".join(fault))


def class_fault(
    cfg: CfgNode, kind: str, key: str, name: str, counts: Collection[int]
) -> tuple[str, str] | None:
    """Returns what ``check_num_classes`` raises as problem and fix; None if all is well."""
    value = value_of(cfg, key)
    if not counts or value in counts:
        return None
    expected, what = next(iter(counts)), "categories" if kind == "thing" else "stuff classes"
    return f"{key} is {value}, but {name!r} has {expected} {what}", f"set {key} {expected}"
