"""Draws curves, tables and detections of one or more runs, as PNG files and one HTML page.

megdet report output/demo
megdet report output/table3/06_b16_bn16 output/table3/14_b256_bn16
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="OUTPUT_DIR of a training")
    add("--images", type=int, default=8, help="test images to draw per run (default 8)")
    add("--output", type=Path, help="folder (default RUN; with several runs, output/report)")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from megdet_d2.report import command

    command.run(args)
