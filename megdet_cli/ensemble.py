"""Fuses the boxes of several detectors into one set and tabulates the AP of each and of all.

megdet ensemble output/a output/b configs/c.yaml:c.pth --output output/ensemble
megdet ensemble a.json b.json --annotations val.json --fusion soft-nms --output output/ensemble
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True
# The methods of megdet_d2.ensemble.fusion, each with the IoU threshold it has by default.
IOU_THRESHOLDS = {"wbf": 0.55, "soft-nms": 0.5, "nms": 0.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    # By default argparse puts flags first. Overrides after the sources would count as sources.
    parser.usage = "%(prog)s SOURCE [SOURCE ...] --output OUTPUT [FLAG ...]"
    add = parser.add_argument
    add(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="folder of a run (with MEGDET.EMA_DECAY its average), CONFIG.yaml:WEIGHTS, or json "
        "of COCO results",
    )
    add("--output", type=Path, required=True, help="folder for table, boxes and evaluations")
    add(
        "--fusion",
        choices=IOU_THRESHOLDS,
        default="wbf",
        help="method (default wbf, weighted boxes fusion)",
    )
    defaults = ", ".join(f"{value} for {method}" for method, value in IOU_THRESHOLDS.items())
    add(
        "--iou-threshold",
        type=float,
        help=f"boxes that overlap more are one object (default {defaults})",
    )
    add("--weights", type=_numbers, metavar="1,1,2", help="one weight per source (default all 1)")
    add(
        "--skip-box-threshold",
        type=float,
        default=0.0,
        help="leave out boxes with a lower score (default 0)",
    )
    add(
        "--detections-per-image",
        type=int,
        metavar="N",
        default=100,
        help="keep at most N boxes per image (default 100)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--dataset", metavar="NAME", help="data set (default the test set of the first config)"
    )
    where.add_argument(
        "--annotations",
        type=Path,
        metavar="JSON",
        help="ground truth, where all sources are json files",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from megdet_d2.ensemble import command

    command.run(args)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
