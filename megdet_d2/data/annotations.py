"""Finds what is wrong in a COCO json: all of it at once, as ``Finding``s."""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager

from .finding import Finding, Level

_NUMBER, _STRING, _ID = (int, float), (str,), (int, float, str)
_LISTS = ("images", "annotations", "categories")
# Beyond it a coordinate is no pixel, and not every part of Detectron2 can represent it.
_MOST_PIXELS = 2.0**31
# Overhang that rounding explains.
_TOLERANCE = 2  # px
# Boxes, and share of the image by which they leave it on average, that tell x1, y1, x2, y2.
_FEW, _FAR = 3, 0.1
# Share of the objects from which a fault that training would drop is an error, not a warning.
_MOST = 0.5
# Values of iscrowd that other tools write.
_AS_CROWD: dict[Any, int] = {None: 0, "": 0, "0": 0, "1": 1}


def start_of_paths() -> str:
    """Returns a hint for errors about a path that is not there."""
    return f"a relative path starts at the working directory, {os.getcwd()!r}"


def read_json(where: str, json_file: str, annotated: bool = True) -> tuple[dict, list[Finding]]:
    """Returns the content of an annotation json, and what makes it no COCO json.

    Args:
        where: the key and the name of the data set, for the findings.
        json_file: a path that Detectron2's ``PathManager`` knows.
        annotated: the file must have annotations.

    Returns:
        the content, {} where there is a finding.
    """

    def refused(kind: str, problem: str, fix: str) -> tuple[dict, list[Finding]]:
        return {}, [Finding("error", kind, where, json_file, problem, fix)]

    if not PathManager.isfile(json_file):
        return refused("missing-file", "there is no annotation file", start_of_paths())
    with open(PathManager.get_local_path(json_file), encoding="utf-8") as file:
        try:
            coco = json.load(file)
        except ValueError as error:
            return refused("not-json", f"it is not json ({error})", "export the annotations again")
    for key in _LISTS:
        if key == "annotations" and not annotated and isinstance(coco, dict) and key not in coco:
            continue
        rows = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return refused(
                "not-coco",
                f"it is not a COCO detection json: it has no list {key!r} of objects",
                "export the annotations as COCO instances",
            )
        if not rows and key != "annotations":
            return refused("empty", f"it has no {key}", "it needs one or more")
    return coco, []


def find_annotation_faults(
    where: str,
    json_file: str,
    coco: dict,
    *,
    trained: bool,
    evaluated: bool,
    masks: str = "",
    crowds_read: bool = True,
) -> tuple[list[Finding], int, int]:
    """Returns what is wrong in the content of a COCO json, and what training takes from it.

    That is the number of usable objects, and of images that have an object. An object is no crowd;
    it is usable if it has an area and is inside its image.

    Args:
        where: the key and the name of the data set, for the findings.
        json_file: the file's path, for the findings.
        coco: its content, from ``read_json``.
        trained: whether a training uses it.
        evaluated: whether pycocotools will read it.
        masks: the segmentation that every object needs: "polygon", or "bitmask" for polygons and
            RLEs; "" for none.
        crowds_read: whether ``load_coco`` loads it, which reads ``iscrowd`` null as 0. Detectron2
            leaves such objects out.
    """
    check = _Check(where, json_file, coco, trained, evaluated, masks, crowds_read)
    return check.findings, check.objects, check.images


def as_crowd(annotation: dict) -> Any:
    """Returns ``iscrowd`` as Detectron2 expects it; other tools write null or "0"."""
    value = annotation.get("iscrowd", 0)
    return _AS_CROWD.get(value, value) if isinstance(value, (str, type(None))) else value


def valid_mask(mask: Any) -> Any:
    """Returns a segmentation with its valid polygons, or None if there is none.

    An RLE is returned as it is.
    """
    if isinstance(mask, dict):
        return mask if {"size", "counts"} <= mask.keys() else None
    if not isinstance(mask, list):
        return None
    return [part for part in mask if _is_polygon(part)] or None


def _repeated(rows: list[dict], key: Callable[[dict], Any]) -> list[tuple[dict, dict]]:
    """Returns each row whose key an earlier one has, with the first of these."""
    hashes = np.fromiter((hash(key(row)) for row in rows), np.int64, len(rows))
    values, counts = np.unique(hashes, return_counts=True)
    candidates = itertools.compress(rows, np.isin(hashes, values[counts > 1]))  # mostly none
    first: dict[Any, dict] = {}
    pairs = [(row, first.setdefault(key(row), row)) for row in candidates]
    return [(row, earlier) for row, earlier in pairs if row is not earlier]


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    return all(type(value) in _NUMBER and abs(value) < _MOST_PIXELS for value in part)


def _is_box(box: Any) -> bool:
    """Returns True for [x, y, width, height]; the comparison is False for NaN."""
    return (
        len(box) == 4
        and all(type(v) in _NUMBER and abs(v) < _MOST_PIXELS for v in box)
        and box[2] >= 0
        and box[3] >= 0
    )


class _Check:
    """Checks the three lists of a COCO json; each check leaves out what an earlier one refused."""

    def __init__(
        self,
        where: str,
        json_file: str,
        coco: dict,
        trained: bool,
        evaluated: bool,
        masks: str,
        crowds_read: bool,
    ):
        self._where, self._file, self._coco = where, json_file, coco
        self.findings: list[Finding] = []
        self.objects = 0  # those that training can learn from
        self._image_names: dict[Any, str] = {}
        categories = self._check_rows("categories", {"id": _NUMBER, "name": _STRING})
        of_image: dict[str, tuple[type, ...]]
        of_image = {"id": _ID, "file_name": _STRING, "height": _NUMBER, "width": _NUMBER}
        images = self._check_rows("images", of_image)
        self._check_id_types("images", images)
        of_annotation: dict[str, tuple[type, ...]]
        of_annotation = {"id": _ID, "image_id": _ID, "category_id": _NUMBER, "bbox": (list,)}
        if evaluated:  # pycocotools needs them, and ids for an array; training does not
            of_annotation |= {"id": _NUMBER, "area": _NUMBER, "iscrowd": _NUMBER}
        self._image_names = {row["id"]: row["file_name"] for row in images}
        rows = self._check_rows("annotations", of_annotation)
        self._sizes = {row["id"]: (row["width"], row["height"]) for row in images}
        rows = self._check_references(rows)
        if trained and not evaluated:
            rows = self._check_crowds(rows, crowds_read)
        if masks:
            rows = self._check_masks(rows, trained, evaluated, masks)
        objects = [row for row in rows if not row.get("iscrowd")]
        self.images = len({row["image_id"] for row in objects})
        self._check_repeats(categories, images, objects)
        self._check_boxes(objects)
        if trained and not any(finding.level == "error" for finding in self.findings):
            self._check_unused(categories, objects)
        if evaluated:
            self._report(
                "warning",
                "id-0",
                "annotations",
                [(row, "") for row in rows if row["id"] == 0],
                "have the annotation id 0, which pycocotools takes for no match, and that object "
                "for missed",
                "number annotations from 1 for the exact AP",
            )

    def _rows(self, name: str) -> list[dict]:
        return self._coco.get(name, [])

    def _report(
        self,
        level: Level,
        kind: str,
        rows: str,
        hits: list[tuple[dict, str]],
        problem: str,
        fix: str,
    ) -> list[dict]:
        """Adds a finding of rows with the text of their faults, if any; returns the rows."""
        if not hits:
            return []
        places = {}  # of rows without an id
        if any("id" not in row for row, _ in hits):
            places = {id(row): i for i, row in enumerate(self._rows(rows))}
        ids = [row.get("id", f"{rows}[{places.get(id(row))}]") for row, _ in hits]
        names = [row.get("file_name", "") for row, _ in hits]
        if rows == "annotations":
            names = [self._image_name(row) for row, _ in hits]
        values = tuple(_shorten(value) for _, value in hits)
        self.findings.append(
            Finding(
                level,
                kind,
                self._where,
                self._file,
                problem,
                fix,
                rows,
                tuple(ids),
                tuple(name if isinstance(name, str) else "" for name in names),
                values if any(values) else (),
                len(self._rows(rows)),
            )
        )
        return [row for row, _ in hits]

    def _image_name(self, annotation: dict) -> str:
        key = annotation.get("image_id")
        return self._image_names.get(key, "") if isinstance(key, _ID) else ""

    def _check_rows(self, name: str, types: dict[str, tuple[type, ...]]) -> list[dict]:
        """Checks keys, types and unique ids; returns the rows without such a fault."""
        bad: set[int] = set()
        rows = self._rows(name)
        for key, allowed in types.items():
            missing = [(row, "") for row in rows if key not in row]
            wrong = [
                (row, repr(row[key]))
                for row in rows
                if key in row and not isinstance(row[key], allowed)
            ]
            if missing:
                self._report(
                    "error", "missing-key", name, missing, f"have no {key!r}", f"add {key!r}"
                )
            if wrong:
                names = " or ".join(kind.__name__ for kind in allowed)
                self._report(
                    "error",
                    "wrong-type",
                    name,
                    wrong,
                    f"have a {key!r} that is not {names}",
                    f"make it {names}",
                )
            bad |= {id(row) for row, _ in missing + wrong}
        good = [row for row in rows if id(row) not in bad]
        again = [(row, "") for row, _ in _repeated(good, lambda row: row["id"])]
        self._report(
            "error",
            "same-id",
            name,
            again,
            "have the id of an earlier one",
            "give each its own id",
        )
        return _without(good, [row for row, _ in again])

    def _check_id_types(self, name: str, rows: list[dict]) -> None:
        texts = [(row, "") for row in rows if isinstance(row["id"], str)]
        if 0 < len(texts) < len(rows):  # they cannot be sorted
            self._report(
                "error",
                "mixed-ids",
                name,
                texts,
                "have a text for an id, and the others a number",
                "give all ids one type",
            )

    def _known(self, name: str, types: tuple[type, ...]) -> set[Any]:
        """Returns all ids, also of rows with another fault, so that one fault is found once."""
        return {row["id"] for row in self._rows(name) if isinstance(row.get("id"), types)}

    def _check_references(self, rows: list[dict]) -> list[dict]:
        images, categories = self._known("images", _ID), self._known("categories", _NUMBER)

        def report(kind: str, test: Callable, key: str, problem: str, fix: str) -> list[dict]:
            hits = [(row, repr(row.get(key))) for row in rows if test(row)]
            return self._report("error", kind, "annotations", hits, problem, fix)

        bad = report(
            "unknown-image",
            lambda row: row["image_id"] not in images,
            "image_id",
            "have an image_id that no image has",
            "add the image, or remove the annotation"
            + self._type_hint((row["image_id"] for row in rows), images),
        )
        bad += report(
            "unknown-category",
            lambda row: row["category_id"] not in categories,
            "category_id",
            f"have a category_id that is none of the categories' {list(sorted(categories))[:20]}",
            "add the category, or correct the annotation",
        )
        bad += report(
            "bad-box",
            lambda row: not _is_box(row["bbox"]),
            "bbox",
            "have a bbox that is no box",
            "make it COCO's [x, y, width, height] in pixels, width and height not below 0",
        )
        bad += report(
            "ignore",
            lambda row: row.get("ignore"),
            "ignore",
            "have 'ignore', which Detectron2 refuses",
            "mark it iscrowd 1 instead, or remove the key",
        )
        bad += [row for row in rows if row["image_id"] not in self._sizes]
        return _without(rows, bad)

    @staticmethod
    def _type_hint(used: Iterable, known: Iterable) -> str:
        unknown = {str(key) for key in used} & {str(key) for key in known}
        types = {type(key).__name__ for key in known}
        return f". The ids of the images are {' and '.join(sorted(types))}" if unknown else ""

    def _check_crowds(self, rows: list[dict], read: bool) -> list[dict]:
        """Returns the rows with ``iscrowd`` as a number, as training will read them."""
        other = [
            (row, repr(row["iscrowd"]))
            for row in rows
            if not isinstance(row.get("iscrowd", 0), _NUMBER)
        ]
        known: list[tuple[dict, str]] = []
        unknown: list[tuple[dict, str]] = []
        for hit in other:
            (known if read and isinstance(as_crowd(hit[0]), _NUMBER) else unknown).append(hit)
        self._report(
            "warning",
            "crowd-as-text",
            "annotations",
            known,
            "have an iscrowd that is no number; training takes null and '0' as 0, '1' as 1",
            "write 0 or 1",
        )
        self._report(
            "error",
            "crowd-unknown",
            "annotations",
            unknown,
            "have an iscrowd that is no number, and training leaves them out",
            "make it 0 or 1",
        )
        changed = {id(row): row | {"iscrowd": as_crowd(row)} for row, _ in known}
        rows = [changed.get(id(row), row) for row in rows]
        return _without(rows, [row for row, _ in unknown])

    def _check_masks(
        self, rows: list[dict], trained: bool, evaluated: bool, masks: str
    ) -> list[dict]:
        """Checks the segmentations; returns the rows that training will not leave out."""
        empty, rle, bad_rle, bad = [], [], [], []
        for row in rows:
            mask = row.get("segmentation")
            if not mask:
                empty.append((row, repr(mask)))
            elif isinstance(mask, dict):
                fault = self._rle_fault(row)
                if fault:
                    bad_rle.append((row, fault))
                elif masks == "polygon" and not row.get("iscrowd"):
                    rle.append((row, ""))
            elif not isinstance(mask, list):
                bad.append((row, repr(mask)))
            elif not all(map(_is_polygon, mask)):
                bad.append((row, repr(next(part for part in mask if not _is_polygon(part)))))
        refused = self._report(
            "error",
            "mask-empty",
            "annotations",
            empty,
            "have no 'segmentation', or an empty one, and MODEL.MASK_ON is True",
            "add the object's mask, or set MODEL.MASK_ON False",
        )
        refused += self._report(
            "error",
            "mask-rle",
            "annotations",
            rle,
            "have an RLE for a segmentation, and INPUT.MASK_FORMAT is 'polygon'",
            "set INPUT.MASK_FORMAT bitmask",
        )
        refused += self._report(
            "error",
            "mask-bad-rle",
            "annotations",
            bad_rle,
            "have an RLE that is not COCO's {'size': [height, width], 'counts': ...}",
            "export the masks again, or set MODEL.MASK_ON False",
        )
        # In training Detectron2 leaves out polygons of less than three points; other forms end it.
        fatal = [hit for hit in bad if evaluated or not _drops(hit[0]["segmentation"])]
        refused += self._report(
            "error",
            "mask-bad-polygon",
            "annotations",
            fatal,
            "have a segmentation with a part that is no polygon",
            "give each part three points or more, [[x1, y1, x2, y2, x3, y3], ...], or set "
            "MODEL.MASK_ON False",
        )
        stay = _without([row for row, _ in bad], refused)
        gone = [
            (row, repr(row["segmentation"])) for row in stay if not valid_mask(row["segmentation"])
        ]
        self._report(
            "error" if len(gone) > _MOST * len(rows) else "warning",
            "mask-left-out",
            "annotations",
            gone,
            "have no polygon of three points or more, and training with MODEL.MASK_ON leaves them "
            "out",
            "give each part three points or more, [[x1, y1, x2, y2, x3, y3], ...], or set "
            "MODEL.MASK_ON False",
        )
        return _without(rows, refused + [row for row, _ in gone])

    def _rle_fault(self, row: dict) -> str:
        mask, (width, height) = row["segmentation"], self._sizes[row["image_id"]]
        size, counts = mask.get("size"), mask.get("counts")
        if not isinstance(size, list) or not isinstance(counts, (list, str)):
            return f"size {size}, counts {_shorten(repr(counts))}"
        if size != [height, width]:
            return f"size {size} in an image of [{height}, {width}]"
        if isinstance(counts, list) and (
            not all(type(count) is int and count >= 0 for count in counts)
            or sum(counts) != height * width
        ):
            return f"counts {_shorten(repr(counts))} do not sum to {height} x {width}"
        return ""

    def _check_repeats(
        self, categories: list[dict], images: list[dict], objects: list[dict]
    ) -> None:
        """Checks what stands twice, as after data sets were merged."""
        self._report(
            "warning",
            "same-name",
            "categories",
            [(row, repr(row["name"])) for row, _ in _repeated(categories, lambda row: row["name"])],
            "have the name of an earlier one, and are trained as another class",
            "merge them, or give each its own name",
        )
        files = [
            (row, first)
            for row, first in _repeated(images, lambda row: row["file_name"])
            if row["file_name"]
        ]
        of_image: dict[Any, set] = {row["id"]: set() for pair in files for row in pair}
        for row in objects if files else ():
            if row["image_id"] in of_image:
                of_image[row["image_id"]].add((row["category_id"], *row["bbox"]))
        self._report(
            "warning",
            "same-file",
            "images",
            [(row, "") for row, first in files if of_image[row["id"]] != of_image[first["id"]]],
            "have the file_name of an earlier one and other objects, so each of the two trains and "
            "counts the other's objects as background",
            "put all objects of a file under one image id",
        )
        pairs = _repeated(objects, lambda row: (row["image_id"], row["category_id"], *row["bbox"]))
        self._report(
            "warning",
            "same-object",
            "annotations",
            [
                (row, self._box_text(row))
                for row, first in pairs
                if row.get("segmentation") == first.get("segmentation")
            ],
            "repeat an earlier object of their image, which no detector can find twice",
            "remove them",
        )

    def _check_boxes(self, rows: list[dict]) -> None:
        """Checks boxes that training would drop, or that another convention has made."""
        if not rows:
            return
        box = np.array([row["bbox"] for row in rows], dtype=float)
        size = np.array([self._sizes[row["image_id"]] for row in rows], dtype=float)
        low, side = box[:, :2], box[:, 2:]
        high = low + side
        no_area = (side == 0).any(axis=1)
        outside = ((low >= size) | (high <= 0)).any(axis=1) & ~no_area
        beyond = np.maximum(-low, high - size)
        over = (beyond.max(axis=1) > _TOLERANCE) & ~no_area
        # As two corners, x2 > x1, y2 > y1, and the second corner is in the image.
        corners = ((side > low) & (side <= size + _TOLERANCE)).all(axis=1)
        fractions = (box.max(axis=1) <= 1) & ~no_area & (size > _TOLERANCE).all(axis=1)
        most = _MOST * len(rows)
        self.objects = int((~no_area & ~outside).sum())

        def report(kind: str, mask: np.ndarray, error: bool, problem: str, fix: str) -> None:
            hits = [(rows[i], self._box_text(rows[i])) for i in np.flatnonzero(mask)]
            level: Level = "error" if error else "warning"
            self._report(level, kind, "annotations", hits, problem, fix)

        report(
            "box-no-area",
            no_area,
            no_area.sum() > most,
            "have a bbox without area, which training leaves out",
            "give each its width and height, or remove it",
        )
        report(
            "box-fraction",
            fractions,
            fractions.sum() > most,
            "have a bbox of less than a pixel, as normalised boxes have",
            "multiply normalised boxes by width and height of the image",
        )
        # A loose box of an object as large as its image leaves it by a few percent.
        far = (beyond / np.maximum(size, 1)).max(axis=1)[over]
        if len(far) >= _FEW and corners.all() and far.mean() > _FAR:
            report(
                "box-corners",
                over,
                True,
                "have a bbox that leaves its image, and all boxes fit as x1, y1, x2, y2",
                "make them COCO's [x, y, width, height]",
            )
            return
        report(
            "box-outside",
            outside,
            outside.sum() > most,
            "have a bbox outside their image, which training leaves out",
            "give boxes as [x, y, width, height] in pixels of the image file",
        )
        over &= ~outside
        report(
            "box-overhang",
            over,
            False,  # boxes of the hidden parts of objects, which some sets have
            f"have a bbox that leaves their image by more than {_TOLERANCE} pixels, where training "
            "cuts them",
            "give boxes as [x, y, width, height] in pixels of the image file, if it is not meant",
        )

    def _box_text(self, row: dict) -> str:
        width, height = self._sizes[row["image_id"]]
        return f"{row['bbox']} in {width} x {height}"

    def _check_unused(self, categories: list[dict], objects: list[dict]) -> None:
        used = {row["category_id"] for row in objects}
        self._report(
            "warning",
            "category-unused",
            "categories",
            [(row, row["name"]) for row in categories if row["id"] not in used] if used else [],
            "have no object in the training set, and count as classes of the model",
            "remove them, and lower NUM_CLASSES, if they are no classes (a supercategory, say)",
        )


def _drops(mask: Any) -> bool:
    """Returns True if Detectron2 leaves out the invalid parts of a segmentation."""
    if not isinstance(mask, list):
        return False
    return all(isinstance(p, list) and (_is_polygon(p) or len(p) < 6 or len(p) % 2) for p in mask)


def _without(rows: list[dict], refused: list[dict]) -> list[dict]:
    gone = {id(row) for row in refused}
    return [row for row in rows if id(row) not in gone] if gone else rows


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
