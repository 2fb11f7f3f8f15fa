"""Draws images of a data set with their boxes, those with faults first."""

import os
import random
from pathlib import Path
from typing import Any

from detectron2.data.detection_utils import read_image

from megdet_d2.report.plots import draw_box
from megdet_d2.report.style import make_figure, save_figure

from .boxes import is_box
from .findings import Check


def draw_samples(result: Check, image_root: str, path: Path, number: int) -> Path | str:
    """Draws up to ``number`` images with the boxes of the json; returns ``path``.

    Half of them have a fault, if there are so many. The others are drawn by a fixed seed.

    Returns:
        "" if no image can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    coco: dict[str, Any] = result.inspection.coco or {}
    images = [row for row in coco.get("images", []) if isinstance(row.get("file_name"), str)]
    chosen = _choose(result, images, number)
    if not chosen:
        return ""
    names = {str(row.get("id")): str(row.get("name")) for row in coco.get("categories", [])}
    numbers = {category: i for i, category in enumerate(names)}
    boxes: dict[str, list[dict]] = {}
    for annotation in coco.get("annotations", []):
        boxes.setdefault(str(annotation.get("image_id")), []).append(annotation)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = make_figure(3.5 * columns, 3.4 * rows)
    blank = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw=blank).flatten()
    for axes, image in zip(panels, chosen, strict=False):
        axes.set_title(f"{image['file_name']}, id {image.get('id')}", fontsize=9)
        try:
            axes.imshow(read_image(os.path.join(image_root, image["file_name"]), "RGB"))
        except Exception as error:  # PIL raises many types, and the page is to show what can be
            axes.text(0.5, 0.5, f"cannot be read:\n{type(error).__name__}", ha="center")
            continue
        for annotation in boxes.get(str(image.get("id")), []):
            if is_box(annotation.get("bbox")):
                category = str(annotation.get("category_id"))
                label = names.get(category, f"category_id {category}?")
                draw_box(axes, annotation["bbox"], numbers.get(category, 0), label)
    return save_figure(figure, path)


def _choose(result: Check, images: list[dict], number: int) -> list[dict]:
    faulty = {file for finding in result.findings for file in finding.images}
    shuffled = random.Random(0).sample(images, len(images))
    with_fault = [image for image in shuffled if image["file_name"] in faulty]
    others = [image for image in shuffled if image["file_name"] not in faulty]
    first = with_fault[: max(number // 2, number - len(others))]
    return first + others[: number - len(first)]
