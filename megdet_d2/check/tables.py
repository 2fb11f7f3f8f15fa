"""Tabulates a check: findings, classes, schedule."""

from collections import Counter

from megdet_d2.data import Inspection

from .findings import Check


def finding_table(result: Check) -> list[dict[str, str]]:
    """Returns one row per finding, errors first."""
    ordered = sorted(result.findings, key=lambda finding: finding.level != "error")
    return [
        {
            "finding": finding.kind,
            "level": finding.level,
            "rows": f"{finding.count} of {finding.num_rows} {finding.rows}" if finding.rows else "",
            "message": str(finding),
        }
        for finding in ordered
    ]


def class_table(inspection: Inspection) -> list[dict[str, str]]:
    """Returns one row per class, in the order of the ids: its objects, and images with them."""
    coco = inspection.coco or {}
    objects: Counter = Counter()
    images: dict = {}
    for annotation in coco.get("annotations", []):
        category = annotation.get("category_id")
        if not annotation.get("iscrowd") and isinstance(category, (int, str)):
            objects[category] += 1
            images.setdefault(category, set()).add(str(annotation.get("image_id")))
    total = sum(objects.values()) or 1
    rows = [row for row in coco.get("categories", []) if isinstance(row.get("id"), (int, str))]
    return [
        {
            "class": str(row.get("name", "")),
            "id": str(row["id"]),
            "objects": str(objects[row["id"]]),
            "images": str(len(images.get(row["id"], ()))),
            "part": f"{objects[row['id']] / total:.1%}",
        }
        for row in sorted(rows, key=lambda row: (str(type(row["id"])), row["id"]))
    ]


def schedule_table(result: Check) -> list[dict[str, str]]:
    """Returns the schedule as rows of name and value; unknown values are left out."""
    return [
        {"schedule": name, "value": _text(value)}
        for name, value in result.schedule.items()
        if value is not None
    ]


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}"
