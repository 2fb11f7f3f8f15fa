"""Registers the user's COCO json files of ``DATASETS.COCO``, and checks them before training."""

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from megdet_d2._moved import renamed

from .annotations import (
    as_crowd,
    find_annotation_faults,
    read_json,
    start_of_paths,
    valid_mask,
)
from .classes import class_counts, class_fault, class_keys, classes_of, differing_classes
from .finding import Finding, raise_findings
from .images import find_image_faults
from .mapping import Mapper, reads_8_bits
from .records import as_coco, forget_records, is_foreign, load_records
from .shared_images import find_shared_images, image_paths

logger = logging.getLogger(__name__)

_EXAMPLE = '[["my_train", "train.json", "images/train"], ["my_val", "val.json", "images/val"]]'
# Names this module has registered, with what they stand for.
_registered: dict[str, tuple[str, str]] = {}
# The content of training jsons that were checked, with the file's time and size.
_parsed: dict[str, tuple[Any, dict]] = {}
# Findings about images of a data set that only the mapper decides.
left_to_mapper: dict[str, list[Finding]] = {}


def register_coco(triples: Sequence[Sequence[str]], masks: bool = True) -> None:
    """Registers every [name, annotation json, image root] in Detectron2's catalogs.

    A name that an earlier call registered is replaced.

    Args:
        triples: the value of ``DATASETS.COCO``.
        masks: leaves out objects that have a segmentation without a valid polygon.

    Raises:
        ValueError: ``triples`` is not a list of triples of strings; a name occurs twice, or
            belongs to Detectron2 or another plugin. Nothing is registered then.
    """
    if isinstance(triples, str):
        triples = [triples]
    names = set()
    for triple in triples:
        if (
            not isinstance(triple, (list, tuple))
            or len(triple) != 3
            or not all(isinstance(item, str) for item in triple)
        ):
            raise ValueError(
                f"DATASETS.COCO has the entry {triple!r}; it is a list of [name, annotation json, "
                f"image root] triples, such as {_EXAMPLE}"
            )
        name = triple[0]
        if name in names:
            raise ValueError(f"DATASETS.COCO has {name!r} twice; give each data set its own name")
        if name in DatasetCatalog.list() and name not in _registered:
            raise ValueError(
                f"DATASETS.COCO registers {name!r}, a data set that is registered already; "
                "choose another name"
            )
        names.add(name)
    for name, json_file, image_root in triples:
        left_to_mapper.pop(name, None)
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)
        DatasetCatalog.register(
            name, functools.partial(load_coco, name, json_file, image_root, masks)
        )
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )
        _registered[name] = (json_file, image_root)


def unregister_coco(name: str) -> None:
    """Removes a data set that ``register_coco`` has registered, and what is kept of its file."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    json_file, _ = _registered.pop(name)
    _parsed.pop(json_file, None)


@dataclass(frozen=True)
class Inspection:
    """Inspection of one data set of the config: what is known and what is wrong."""

    name: str
    findings: list[Finding]
    coco: dict | None = None  # the json's content; None where it cannot be read, or is not ours
    classes: list[str] | None = None  # in the order of the ids; None where not known
    objects: int | None = None  # those that training can learn from
    images: int | None = None  # those that have an object, though perhaps not a usable one
    paths: frozenset[str] = frozenset()  # of all its image files, where they are known

    @property
    def by_mapper(self) -> list[Finding]:
        """The findings of which the mapper decides whether they are faults."""
        return [finding for finding in self.findings if finding.by_mapper]


def check_datasets(
    cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST"), images: bool = True
) -> list[Inspection]:
    """Checks every COCO json that the config uses, before training can fail or go wrong.

    Warnings are logged. All errors are raised together.

    Args:
        splits: the keys of ``DATASETS`` to check.
        images: whether to look for the image files and into their headers.

    Returns:
        what is known of each data set.

    Raises:
        FileNotFoundError: a json, an image root or an image does not exist.
        ValueError: a data set is not registered; a json is not COCO; a key is missing, a value has
            another type, an id occurs twice; an image_id or category_id is unknown; a box is
            invalid; the categories of two sets differ; NUM_CLASSES disagrees with them; an image
            cannot be opened, or has another size than the json says; no object is left to train on.
    """
    found = inspect_datasets(cfg, splits, images)
    left_to_mapper.update({item.name: item.by_mapper for item in found if item.by_mapper})
    raise_findings(finding for item in found for finding in item.findings)
    return found


def refuse_unreadable(names: Sequence[str], mapper: Mapper) -> None:
    """Refuses data sets whose images ``check_datasets`` has left to the mapper.

    Args:
        names: data sets.
        mapper: what reads their images; one of the user's may read any.

    Raises:
        ValueError: Detectron2's mapper cannot read them, or only wrongly.
    """
    if reads_8_bits(mapper):
        raise_findings(
            replace(finding, by_mapper=False)
            for name in names
            for finding in left_to_mapper.get(name, [])
        )


def inspect_datasets(
    cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST"), images: bool = True
) -> list[Inspection]:
    """Returns everything that is known of the registered data sets that the config uses.

    Nothing is raised or logged. Findings of the config are in an ``Inspection`` of the name "".

    Args:
        splits: the keys of ``DATASETS`` that are in use.
        images: whether to look for the image files and into their headers.
    """
    uses: dict[str, list[str]] = {}  # the splits of each data set
    for key in splits:
        for name in cfg.DATASETS[key]:
            uses.setdefault(name, []).append(key)
    found = [_inspect(cfg, name, keys, images) for name, keys in uses.items()]
    findings = []
    classes = {item.name: item.classes for item in found if item.classes is not None}
    if classes:
        findings += _find_differences(classes)
        first, expected = next(iter(classes.items()))
        for key in class_keys(cfg, "thing"):
            findings += _find_class_fault(cfg, "thing", key, first, [len(expected)])
    for key in class_keys(cfg, "stuff"):
        for name in uses:
            findings += _find_class_fault(cfg, "stuff", key, name, class_counts(name, "stuff"))
    split = {key: cfg.DATASETS[key] if key in splits else () for key in ("TRAIN", "TEST")}
    paths = {item.name: item.paths for item in found}
    findings += find_shared_images(split["TRAIN"], split["TEST"], paths)
    objects = [item.objects for item in found if "TRAIN" in uses[item.name]]
    broken = any(finding.level == "error" for item in found for finding in item.findings)
    if objects and not broken and not any(objects) and None not in objects:
        findings.append(
            Finding(
                "error",
                "no-objects",
                f"DATASETS.TRAIN has {list(cfg.DATASETS.TRAIN)}",
                "",
                "none of its annotations is an object to train on: with iscrowd 0, an area, and in "
                "its image",
                "add annotations, or correct iscrowd and bbox",
            )
        )
    return [*found, Inspection("", findings)]


def _inspect(cfg: CfgNode, name: str, keys: list[str], images: bool) -> Inspection:
    where = f"DATASETS.{keys[0]} has {name!r}"
    if name not in DatasetCatalog.list():
        where += ", which is not registered"
        problem = f"DATASETS.COCO names {[triple[0] for triple in cfg.DATASETS.COCO]}"
        fix = f"Correct the name, or add a triple: {_EXAMPLE}"
        return Inspection(name, [Finding("error", "unregistered", where, "", problem, fix)])
    if name not in _registered:
        # Before it is loaded, which may tell the classes: a mapper of the user's may merge them.
        classes = MetadataCatalog.get(name).as_dict().get("thing_classes")
        item = Inspection(name, _find_missing_files(where, name), classes=classes and list(classes))
        if item.findings or not images or not is_foreign(name):
            return item
        return _inspect_records(cfg, item, where, keys)
    if cfg.MODEL.KEYPOINT_ON:
        problem = (
            f"MODEL.KEYPOINT_ON is True, and DATASETS.COCO, which has {name!r}, has no place for "
            "the keypoints' names and flips"
        )
        fix = (
            "register the data set by detectron2.data.datasets.register_coco_instances, with "
            "metadata keypoint_names and keypoint_flip_map"
        )
        return Inspection(name, [Finding("error", "keypoints", "DATASETS", "", problem, fix)])
    trained, evaluated = "TRAIN" in keys, name in cfg.DATASETS.TEST
    masks = ""
    if cfg.MODEL.MASK_ON:
        masks = cfg.INPUT.MASK_FORMAT if name in cfg.DATASETS.TRAIN else "bitmask"
    json_file, image_root = _registered[name]
    where = f"DATASETS.COCO {name!r}"
    skip_bad = trained and not evaluated and cfg.MEGDET.SKIP_BAD_IMAGES
    inspection = inspect_coco(
        where,
        json_file,
        image_root if images else None,
        trained=trained,
        evaluated=evaluated,
        masks=masks,
        skip_bad=skip_bad,
    )
    rows = (inspection.coco or {}).get("images", ())
    return replace(inspection, name=name, paths=image_paths(rows, image_root))


def _inspect_records(cfg: CfgNode, item: Inspection, where: str, keys: list[str]) -> Inspection:
    """Returns what is known of a data set that other code has registered."""
    name, trained = item.name, "TRAIN" in keys
    try:
        records = load_records(name, keep=trained)
    except Exception as error:  # of the user's function
        problem = f"it cannot be loaded ({type(error).__name__}: {error})"
        fix = "correct the function or the file that it was registered with"
        return replace(item, findings=[Finding("error", "not-loaded", where, "", problem, fix)])
    coco = records and as_coco(records, MetadataCatalog.get(name).as_dict().get("thing_classes"))
    if not coco:
        return item
    findings, objects, _ = find_annotation_faults(
        where, "", coco, trained=trained, evaluated=False, crowds_read=False
    )
    if all(row["file_name"] for row in coco["images"]):
        skip_bad = trained and name not in cfg.DATASETS.TEST and cfg.MEGDET.SKIP_BAD_IMAGES
        findings += find_image_faults(where, "", coco["images"], skip_bad)
    paths = image_paths(coco["images"])
    return replace(item, findings=findings, objects=objects or None, paths=paths)


def inspect_coco(
    where: str,
    json_file: str,
    image_root: str | None,
    *,
    trained: bool = True,
    evaluated: bool = True,
    masks: str = "",
    skip_bad: bool = False,
) -> Inspection:
    """Returns everything that is wrong with an annotation json and its images.

    Args:
        where: the beginning of messages, such as "DATASETS.COCO 'my_train'".
        json_file: the annotations.
        image_root: the folder of the images; None to leave them unchecked.
        trained: whether a training uses it.
        evaluated: whether to check what pycocotools needs, too.
        masks: the segmentation that every object needs: "polygon", or "bitmask" for polygons and
            RLEs; "" for none.
        skip_bad: training takes other images in place of bad ones.
    """
    coco, findings = read_json(where, json_file, annotated=trained)
    objects = with_objects = 0
    images = []
    if coco:
        if trained:
            _keep(json_file, coco)
        faults, objects, with_objects = find_annotation_faults(
            where, json_file, coco, trained=trained, evaluated=evaluated, masks=masks
        )
        findings += faults
        images = [row for row in coco["images"] if _is_image(row)]
    if image_root is not None:
        findings += find_image_faults(where, image_root, images, skip_bad)
    classes = None
    rows = coco.get("categories", [])
    if rows and not any(f.rows == "categories" and f.level == "error" for f in findings):
        classes = classes_of(rows)
    return Inspection("", findings, coco or None, classes, objects, with_objects)


def read_coco(where: str, json_file: str, evaluated: bool = True, masks: str = "") -> dict:
    """Returns the content of an annotation json after checking it.

    Args:
        where, json_file, evaluated, masks: see ``inspect_coco``. Images are not checked.

    Raises:
        FileNotFoundError, ValueError: see ``check_datasets``.
    """
    inspection = inspect_coco(
        where, json_file, None, trained=False, evaluated=evaluated, masks=masks
    )
    raise_findings(inspection.findings)
    assert inspection.coco is not None
    return inspection.coco


def _is_image(row: dict) -> bool:
    names = isinstance(row.get("file_name"), str)
    return names and all(isinstance(row.get(key), (int, float)) for key in ("width", "height"))


def _find_missing_files(where: str, name: str) -> list[Finding]:
    """Returns the json and the image root that another data set names and that do not exist."""
    metadata = MetadataCatalog.get(name).as_dict()
    looks = {"json_file": PathManager.isfile, "image_root": PathManager.isdir}
    if name.startswith("megdet_digits"):  # made when it is first loaded
        return []
    fix = f"put it there, or set DETECTRON2_DATASETS to where the data sets are; {start_of_paths()}"
    return [
        Finding(
            "error",
            "missing-file",
            where,
            "",
            f"its {key} {metadata[key]!r} is not there",
            fix,
        )
        for key, is_there in looks.items()
        if metadata.get(key) and not is_there(metadata[key])
    ]


def _find_differences(classes: dict[str, list[str]]) -> list[Finding]:
    first, expected = next(iter(classes.items()))
    findings = []
    for name, found in classes.items():
        # Detectron2 numbers the classes in the order of the ids; the ids themselves may differ.
        if found != expected:
            differ = differing_classes(expected, found)
            problem = f"the categories of {first!r} and {name!r} differ in {differ}"
            fix = "a detector needs one list: give both the same names in the order of their ids"
            findings.append(Finding("error", "categories-differ", "DATASETS", "", problem, fix))
    return findings


def _find_class_fault(
    cfg: CfgNode, kind: str, key: str, name: str, counts: Sequence[int]
) -> list[Finding]:
    fault = class_fault(cfg, kind, key, name, counts)
    return [Finding("error", "num-classes", "DATASETS", "", *fault)] if fault else []


# --- loading -------------------------------------------------------------------------------------


def _keep(json_file: str, coco: dict) -> None:
    """Keeps a training json's content from its check to the loader, since parsing takes long."""
    _parsed[json_file] = (_stamp(json_file), coco)


def forget_parsed() -> None:
    """Removes the contents of the training jsons, which only the start needs, from memory."""
    _parsed.clear()
    forget_records()


def _stamp(json_file: str) -> tuple[int, int]:
    status = os.stat(PathManager.get_local_path(json_file))
    return status.st_mtime_ns, status.st_size


def load_coco(name: str, json_file: str, image_root: str, masks: bool = True) -> list[dict]:
    """Returns the entries of a COCO json, as Detectron2's ``load_coco_json``.

    Unlike it, it reads ``iscrowd`` null and "0" as 0; with ``masks`` False, it keeps objects whose
    segmentation is not valid; and it takes a json that was just checked from memory.

    Args:
        name: the data set, whose metadata gets the classes.
        json_file: the annotations.
        image_root: the folder of the images.
        masks: leaves out objects that have a segmentation without a valid polygon.
    """
    stamp, coco = _parsed.get(json_file, (None, {}))
    if stamp != _stamp(json_file):
        coco, findings = read_json(f"DATASETS.COCO {name!r}", json_file, annotated=False)
        raise_findings(findings)
    categories = {row["id"]: row["name"] for row in coco["categories"]}
    to_class = {key: i for i, key in enumerate(sorted(categories))}
    MetadataCatalog.get(name).set(
        thing_classes=[categories[key] for key in to_class],
        thing_dataset_id_to_contiguous_id=to_class,
    )
    objects: dict[Any, list[dict]] = {row["id"]: [] for row in coco["images"]}
    left_out = 0
    for row in coco.get("annotations", []):
        entry = {
            "bbox": row["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": to_class[row["category_id"]],
        }
        if "iscrowd" in row:
            entry["iscrowd"] = as_crowd(row)
        if row.get("segmentation"):
            segmentation = valid_mask(row["segmentation"])
            if segmentation is not None:
                entry["segmentation"] = _compress(segmentation)
            elif masks:
                left_out += 1
                continue
        if "keypoints" in row:
            # COCO's keypoints are indices of pixels, and Detectron2's are their centres.
            entry["keypoints"] = row["keypoints"] and [
                value + 0.5 if i % 3 != 2 else value for i, value in enumerate(row["keypoints"])
            ]
        objects[row["image_id"]].append(entry)
    if left_out:
        logger.warning(
            f"DATASETS.COCO {name!r}: {left_out} objects have no valid polygon and are left out"
        )
    return [
        {
            "file_name": os.path.join(image_root, row["file_name"]),
            "height": row["height"],
            "width": row["width"],
            "image_id": row["id"],
            "annotations": objects[row["id"]],
        }
        for row in sorted(coco["images"], key=lambda row: row["id"])
    ]


def _compress(mask: Any) -> Any:
    if isinstance(mask, dict) and isinstance(mask["counts"], list):
        return mask_util.frPyObjects(mask, *mask["size"])
    return mask


__getattr__ = renamed(__name__, num_classes="megdet_d2.data.classes.num_classes")
