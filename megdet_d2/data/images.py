"""Finds images that Detectron2 cannot read, or reads wrongly, from the headers of their files."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .annotations import start_of_paths
from .finding import Finding

logger = logging.getLogger(__name__)

_ORIENTATION = 274  # EXIF tag
_SWAPS_SIDES = (5, 6, 7, 8)  # values of it
# Modes of PIL with more than 8 bits. Converting them to RGB cuts every value above 255.
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_DEEP_SAMPLE = 8  # images to decode, since these may hold 8-bit values
_THREADS = 16
_MANY = 10_000  # images from which a progress bar is shown


def find_image_faults(
    where: str, image_root: str, images: Sequence[dict], skip_bad: bool = False
) -> list[Finding]:
    """Returns the images that are not there, cannot be opened, or differ from the json.

    Args:
        where: the key and the name of the data set, for the findings.
        image_root: the folder of the images; "" where ``images`` have whole paths.
        images: rows with id, file_name, width and height, which are checked already; an
            infinite width for an image of unknown size.
        skip_bad: training takes other images in their place, so that they are warnings.
    """
    # Only PathManager can read other schemes.
    if "://" in image_root or any("://" in row["file_name"] for row in images):
        return []
    if image_root and not os.path.isdir(image_root):
        return [
            Finding(
                "error",
                "missing-file-root",
                where,
                image_root,
                "there is no such image folder",
                start_of_paths(),
            )
        ]
    hits: dict[str, list[tuple[dict, str]]] = {}
    files = _files(image_root)
    there = []
    for row in images:
        if files(row["file_name"]):
            there.append(row)
        else:
            hits.setdefault("missing-file-image", []).append((row, ""))
    for row, (kind, value) in zip(there, _look_at_all(image_root, there), strict=True):
        if kind:
            hits.setdefault(kind, []).append((row, value))
    deep = hits.pop("image-depth", [])
    if deep and not _saturates(image_root, [row for row, _ in deep]):
        deep = []
    total = len(images)
    unreadable = hits.get("image-unreadable", [])

    def finding(kind: str, problem: str, fix: str, by_mapper: bool = False) -> Iterator[Finding]:
        rows = deep if kind == "image-depth" else hits.get(kind, [])
        if rows:
            skipped = skip_bad and len(rows) < total and kind != "image-depth"
            yield Finding(
                "warning" if skipped else "error",
                kind,
                where,
                image_root,
                problem,
                fix,
                "images",
                tuple(row.get("id") for row, _ in rows),
                tuple(row["file_name"] for row, _ in rows),
                tuple(value for _, value in rows) if rows[0][1] else (),
                total,
                by_mapper,
            )

    return [
        *finding(
            "missing-file-image",
            f"are not in {image_root!r}" if image_root else "are not there",
            "Correct the image root, or the file_name entries",
        ),
        *finding(
            "image-unreadable",
            "cannot be opened",
            "put the right files there, or remove the images from the json",
            # A format that PIL does not know, for all of them, is for a mapper of the user's.
            by_mapper=len(unreadable) == total,
        ),
        *finding(
            "image-size",
            "have another width and height in the json than in the file, as Detectron2 reads it",
            "correct width and height in the json, and the boxes if they are of another size",
        ),
        *finding(
            "image-depth",
            "have more than 8 bits per channel, and Detectron2 reads values above 255 as 255",
            "convert them to 8 bits, or read them by Trainer.build_mapper",
            by_mapper=True,
        ),
    ]


def depth_fault(image: Image.Image) -> str:
    """Returns why Detectron2 reads an image of more than 8 bits wrongly, or ""."""
    if image.mode not in _DEEP:
        return ""
    low, high = (float(value) for value in _range(np.asarray(image)))
    if high > 255 or low < 0 or (image.mode == "F" and 0 < high <= 1):
        return f"mode {image.mode}, values from {low:g} to {high:g}"
    return ""


def _range(pixels: np.ndarray) -> tuple[Any, Any]:
    return (pixels.min(), pixels.max()) if pixels.size else (0, 0)


def _files(root: str) -> Callable[[str], bool]:
    """Returns a test whether a file is there.

    It lists each folder once: asking for each of 118,000 files is slow on a network file system.
    """
    listings: dict[str, set[str]] = {}

    def is_there(name: str) -> bool:
        folder, base = os.path.split(os.path.join(root, name))
        if folder not in listings:
            listings[folder] = (
                set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
            )
        return base in listings[folder]

    return is_there


def _look_at_all(root: str, images: Sequence[dict]) -> Iterable[tuple[str, str]]:
    with ThreadPoolExecutor(_THREADS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, about odd metadata
        looked = pool.map(lambda row: _look(os.path.join(root, row["file_name"]), row), images)
        return list(
            tqdm(
                looked,
                f"Checking the images of {root}",
                len(images),
                disable=len(images) < _MANY,
            )
        )


def _look(path: str, row: dict) -> tuple[str, str]:
    """Returns the kind of an image's fault, "" for none, and the faulty value."""
    try:
        with Image.open(path) as image:
            # That of PNG files would decode each, to look for an orientation after the pixels.
            size = _size(image, Image.Image.getexif)
            expected = size if row["width"] == math.inf else (row["width"], row["height"])
            if image.format == "PNG" and size == expected[::-1] != expected:
                with Image.open(path) as whole:
                    size = _size(whole, type(whole).getexif)
            if size != expected:
                turned = " turned by its EXIF orientation" if size != image.size else ""
                return (
                    "image-size",
                    f"{_text(expected)} in the json, {_text(size)}{turned} in the file",
                )
            return ("image-depth", f"mode {image.mode}") if image.mode in _DEEP else ("", "")
    except MemoryError:
        raise
    except Exception as error:  # PIL alone raises OSError, ValueError, SyntaxError and more
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        reason = "it is empty" if empty else str(error).replace(f" {path!r}", "")
        return "image-unreadable", f"{type(error).__name__}: {reason}"


def _size(image: Image.Image, getexif: Callable) -> tuple[int, int]:
    """Returns width and height after the EXIF orientation, which Detectron2 applies."""
    try:
        exif = getexif(image)
    except Exception:  # of broken EXIF data, which Detectron2 ignores too
        return image.size
    turned = exif.get(_ORIENTATION) in _SWAPS_SIDES
    return image.size[::-1] if turned else image.size


def _text(size: tuple[Any, Any]) -> str:
    return f"{size[0]} x {size[1]}"


def _saturates(root: str, rows: Sequence[dict]) -> bool:
    """Returns True if some of the images have values that 8 bits cannot hold."""
    step = max(1, len(rows) // _DEEP_SAMPLE)
    for row in rows[::step]:
        with Image.open(os.path.join(root, row["file_name"])) as image:
            try:
                if depth_fault(image):
                    return True
            except OSError:  # a cut-off file
                continue
    return False
