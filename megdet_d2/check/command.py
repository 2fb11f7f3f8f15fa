"""Runs ``megdet check``: prints all findings, writes the page, ends with the status."""

import argparse
import json
import sys
from pathlib import Path

from megdet_d2.config import load_config
from megdet_d2.engine.command import find_config
from megdet_d2.report.page import Content, write_page

from .findings import Check, check
from .samples import draw_samples
from .tables import class_table, finding_table, schedule_table


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.check``.

    Raises:
        SystemExit: the status is 1, since a training would be refused.
        FileNotFoundError, ValueError: there is no such config, or an override is not valid.
    """
    if args.images < 1:
        raise ValueError(f"--images is {args.images}; draw 1 or more")
    cfg = load_config(find_config(args.config or ""))
    has_config = bool(args.config or args.opts)
    result = check(args.json_file, args.image_root, cfg, args.opts, has_config)
    if args.json:
        print(json.dumps(as_dict(result), indent=1, default=str))
    else:
        _print(result)
        output = args.output or Path("output/check") / Path(args.json_file).stem
        print(f"Page: {_write_page(result, args, output)}")
    if result.refused:
        sys.exit(1)


def as_dict(result: Check) -> dict:
    """Returns a check as plain data for machines."""
    inspection = result.inspection
    coco = inspection.coco or {}
    return {
        "refused": result.refused,
        "findings": [finding.as_dict() for finding in result.findings],
        "images": len(coco.get("images", [])),
        "annotations": len(coco.get("annotations", [])),
        "objects": inspection.objects,
        "classes": class_table(inspection),
        "box_sizes": result.boxes.quantiles() if result.boxes else [],
        "schedule": result.schedule,
    }


def _print(result: Check) -> None:
    for level in ("error", "warning"):
        for finding in result.findings:
            if finding.level == level:
                print(f"{level}: {finding}")
    errors = sum(finding.level == "error" for finding in result.findings)
    warnings = len(result.findings) - errors
    verdict = "A training would be refused" if errors else "A training would start"
    print(f"{verdict}. Kinds of errors: {errors}, of warnings: {warnings}.")
    if result.schedule:
        print(", ".join(f"{row['schedule']}: {row['value']}" for row in schedule_table(result)))


def _write_page(result: Check, args: argparse.Namespace, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    sections: list[tuple[str, Content]] = [
        ("Findings", finding_table(result) or "Nothing is wrong."),
    ]
    if result.inspection.coco:
        try:
            picture: Content = draw_samples(
                result, args.image_root, output / "samples.png", args.images
            )
        except ImportError as error:
            picture = str(error)
        sections += [
            ("Samples", picture or "No image can be drawn."),
            ("Classes", class_table(result.inspection)),
        ]
    if result.boxes:
        sections.append(("Sizes of the boxes, in pixels", result.boxes.quantiles()))
    if result.schedule:
        sections.append(("Schedule", schedule_table(result)))
    return write_page(output / "check.html", f"megdet check {args.json_file}", sections)
