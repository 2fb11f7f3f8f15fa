"""Registers the user's COCO json files of ``DATASETS.COCO``, and checks them before training."""

import json
import logging
import math
import os
from collections.abc import Sequence
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from megdet_d2._moved import renamed

from .classes import check_num_classes, class_counts, class_keys

logger = logging.getLogger(__name__)

_EXAMPLE = '[["my_train", "train.json", "images/train"], ["my_val", "val.json", "images/val"]]'
_NUMBER, _STRING, _ID = (int, float), (str,), (int, float, str)
# Names this module has registered, with what they stand for.
_registered: dict[str, tuple[str, str]] = {}


def register_coco(triples: Sequence[Sequence[str]]) -> None:
    """Registers every [name, annotation json, image root] in Detectron2's catalogs.

    A name that an earlier call registered is replaced.

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
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)
        register_coco_instances(name, {}, json_file, image_root)
        _registered[name] = (json_file, image_root)


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Checks every COCO json that the config uses, before training can fail or go wrong.

    Args:
        splits: the keys of ``DATASETS`` to check.

    Raises:
        FileNotFoundError: a json, an image root or an image does not exist.
        ValueError: a data set is not registered; a json is not COCO; a key is missing, a value has
            another type, an id occurs twice; an image_id or category_id is unknown; a box is
            invalid; the categories of two sets differ; NUM_CLASSES disagrees with them.
    """
    known = set(DatasetCatalog.list())
    classes: dict[str, list[str]] = {}  # by data set, in the order of the ids
    for key in splits:
        for name in cfg.DATASETS[key]:
            if name not in known:
                raise ValueError(
                    f"DATASETS.{key} has {name!r}, which is not registered; DATASETS.COCO names "
                    f"{[triple[0] for triple in cfg.DATASETS.COCO]}. Correct the name, or add a "
                    f"triple: {_EXAMPLE}"
                )
            if name in classes:
                continue
            if name in _registered:
                if cfg.MODEL.KEYPOINT_ON:
                    raise ValueError(
                        f"MODEL.KEYPOINT_ON is True, and DATASETS.COCO, which has {name!r}, has no "
                        "place for the keypoints' names and flips; register the data set by "
                        "detectron2.data.datasets.register_coco_instances, with metadata "
                        "keypoint_names and keypoint_flip_map"
                    )
                evaluated = name in cfg.DATASETS.TEST
                masks = cfg.INPUT.MASK_FORMAT if name in cfg.DATASETS.TRAIN else "bitmask"
                if not cfg.MODEL.MASK_ON:
                    masks = ""
                classes[name] = _check_json(name, *_registered[name], evaluated, masks)
                continue
            _check_files(f"DATASETS.{key} has {name!r}", name)
            if "thing_classes" in MetadataCatalog.get(name).as_dict():
                classes[name] = list(MetadataCatalog.get(name).thing_classes)
    _check_stuff(cfg, splits)
    if not classes:
        return

    first, expected = next(iter(classes.items()))
    for name, found in classes.items():
        # Detectron2 numbers the classes in the order of the ids; the ids themselves may differ.
        if found != expected:
            differ = [pair for pair in zip_longest(expected, found) if pair[0] != pair[1]]
            raise ValueError(
                f"DATASETS: the categories of {first!r} and {name!r} differ in {differ[:6]}; a "
                "detector needs one list: give both the same names in the order of their ids"
            )
    for key in class_keys(cfg, "thing"):
        check_num_classes(cfg, "thing", key, first, [len(expected)])


def _check_stuff(cfg: CfgNode, splits: Sequence[str]) -> None:
    for key in class_keys(cfg, "stuff"):
        for name in dict.fromkeys(name for split in splits for name in cfg.DATASETS[split]):
            check_num_classes(cfg, "stuff", key, name, class_counts(name, "stuff"))


def _check_files(where: str, name: str) -> None:
    """Checks that the json and the images of another plugin's or Detectron2's data set exist."""
    metadata = MetadataCatalog.get(name).as_dict()
    looks = {"json_file": PathManager.isfile, "image_root": PathManager.isdir}
    if name.startswith("megdet_digits"):  # made when it is first loaded
        return
    for key, is_there in looks.items():
        path = metadata.get(key)
        if path and not is_there(path):
            raise FileNotFoundError(
                f"{where}, and its {key} {path!r} is not there; put it there, or set "
                f"DETECTRON2_DATASETS to where the data sets are{_start()}"
            )


def _check_json(
    name: str, json_file: str, image_root: str, evaluated: bool, masks: str
) -> list[str]:
    """Returns the categories' names, in the order of their ids."""
    where = f"DATASETS.COCO {name!r}"
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"{where}: there is no image folder {image_root!r}{_start()}")
    coco = read_coco(where, json_file, evaluated, masks)
    _check_images(
        f"{where}, {json_file!r}", image_root, [image["file_name"] for image in coco["images"]]
    )
    return [name for _, name in sorted((c["id"], c["name"]) for c in coco["categories"])]


def _start() -> str:
    return f"; a relative path starts at the working directory, {os.getcwd()!r}"


def read_coco(where: str, json_file: str, evaluated: bool = True, masks: str = "") -> dict:
    """Returns the content of an annotation json after checking it.

    Args:
        where: the beginning of error messages.
        evaluated: whether to check what pycocotools needs, too.
        masks: the segmentation that every object needs: "polygon", or "bitmask" for polygons and
            RLEs; "" for none.

    Raises:
        FileNotFoundError, ValueError: see ``check_datasets``; images are not checked.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{where}: there is no annotation file {json_file!r}{_start()}")
    with open(json_file) as file:
        try:
            coco = json.load(file)
        except ValueError as error:
            raise ValueError(f"{where}: {json_file!r} is not json ({error})") from None
    for key in ("images", "annotations", "categories"):
        rows = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                f"{where}: {json_file!r} is not a COCO detection json: it has no list {key!r} of "
                "objects; export the annotations as COCO instances"
            )
        if not rows and key != "annotations":
            raise ValueError(f"{where}: {json_file!r} has no {key}; it needs one or more")
    where = f"{where}, {json_file!r}"
    _check_keys(where, "categories", coco["categories"], {"id": _NUMBER, "name": _STRING})
    of_image = {"id": _ID, "file_name": _STRING, "height": _NUMBER, "width": _NUMBER}
    _check_keys(where, "images", coco["images"], of_image)
    of_annotation: dict[str, tuple[type, ...]]
    of_annotation = {"id": _ID, "image_id": _ID, "category_id": _NUMBER, "bbox": (list,)}
    if evaluated:  # pycocotools needs them, and ids for an array; Detectron2's training does not
        of_annotation |= {"id": _NUMBER, "area": _NUMBER, "iscrowd": _NUMBER}
    if masks:
        of_annotation |= {"segmentation": (list, dict)}
    _check_keys(where, "annotations", coco["annotations"], of_annotation)

    categories = dict(sorted((c["id"], c["name"]) for c in coco["categories"]))
    images = {image["id"] for image in coco["images"]}
    _check_annotations(where, coco["annotations"], images, categories)
    if masks:
        _check_masks(where, coco["annotations"], evaluated, masks)
    if evaluated and any(annotation["id"] == 0 for annotation in coco["annotations"]):
        logger.warning(
            f"{where}: pycocotools takes the annotation id 0 for no match, and that object for "
            "missed; number annotations from 1 for the exact AP"
        )
    return coco


def _check_keys(where: str, what: str, rows: list[dict], types: dict[str, tuple]) -> None:
    """Checks that every row has these keys, values of these types, and a unique id."""
    seen = set()
    for i, row in enumerate(rows):
        at = f"{where}: {what}[{i}]"
        for key, allowed in types.items():
            if key not in row:
                raise ValueError(f"{at} has no {key!r}; add it")
            if not isinstance(row[key], allowed):
                names = " or ".join(kind.__name__ for kind in allowed)
                raise ValueError(f"{at} has {key} {row[key]!r}; make it {names}")
        if row["id"] in seen:
            raise ValueError(f"{at} has the id {row['id']!r}, as an earlier one; ids stand once")
        seen.add(row["id"])


def _check_annotations(where: str, annotations: list, images: set, categories: dict) -> None:
    for i, annotation in enumerate(annotations):
        at = f"{where}: annotations[{i}]"
        if annotation["image_id"] not in images:
            raise ValueError(
                f"{at} has image_id {annotation['image_id']!r}, which no image has; add the image, "
                "or remove the annotation"
            )
        if annotation["category_id"] not in categories:
            raise ValueError(
                f"{at} has category_id {annotation['category_id']}, which is none of the "
                f"categories' {list(categories)[:20]}; add the category, or correct the annotation"
            )
        box = annotation["bbox"]
        numbers = all(isinstance(side, _NUMBER) and math.isfinite(side) for side in box)
        if len(box) != 4 or not numbers or box[2] < 0 or box[3] < 0:
            raise ValueError(
                f"{at} has bbox {box}; make it COCO's [x, y, width, height] in pixels, width and "
                "height not below 0"
            )
        if annotation.get("ignore"):
            raise ValueError(
                f"{at} has ignore {annotation['ignore']}, which Detectron2 refuses; mark it "
                "iscrowd 1 instead, or remove it"
            )


def _check_masks(where: str, annotations: list, evaluated: bool, masks: str) -> None:
    for i, annotation in enumerate(annotations):
        at = f"{where}: annotations[{i}]"
        mask = annotation["segmentation"]
        if not mask:
            raise ValueError(
                f"{at} has an empty segmentation, and MODEL.MASK_ON is True; add the object's "
                "mask, or set MODEL.MASK_ON False"
            )
        if isinstance(mask, dict):
            if masks == "polygon" and not annotation.get("iscrowd"):
                raise ValueError(
                    f"{at} has an RLE for a segmentation, and INPUT.MASK_FORMAT is 'polygon'; set "
                    "INPUT.MASK_FORMAT bitmask"
                )
            continue
        for part in mask:
            # In training Detectron2 leaves out what has too few points.
            if not isinstance(part, list) or (evaluated and (len(part) < 6 or len(part) % 2)):
                raise ValueError(
                    f"{at} has {part} in its segmentation, which is no polygon; give each three "
                    "points or more, [[x1, y1, x2, y2, x3, y3], ...]"
                )


def _check_images(where: str, root: str, files: list[str]) -> None:
    # One listing per folder: asking for each of 118,000 files is slow on a network file system.
    listings: dict[str, set[str]] = {}
    for name in files:
        folder, base = os.path.split(os.path.join(root, name))
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listings[folder]:
            missing = sum(not os.path.isfile(os.path.join(root, f)) for f in files)
            raise FileNotFoundError(
                f"{where}: {missing} of {len(files)} images are not in {root!r}; the first is "
                f"{name!r}. Correct the image root, or the file_name entries"
            )


__getattr__ = renamed(__name__, num_classes="megdet_d2.data.classes.num_classes")
