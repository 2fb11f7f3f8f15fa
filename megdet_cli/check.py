"""Checks an annotation file, its images and a config before training, and draws some images.

It lists everything that is wrong at once, with ids and counts. The page has sample images with
boxes, the classes, the sizes of the boxes against the anchors, and the schedule. The exit status is
1 if a training would be refused.

  megdet check train.json images/train
  megdet check train.json images/train --config my.yaml SOLVER.IMS_PER_BATCH 32
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    # By default argparse puts flags first. Overrides after the folder would count as arguments.
    parser.usage = "%(prog)s JSON IMAGES [FLAG ...]"
    add = parser.add_argument
    add("json_file", metavar="JSON", help="annotations in COCO's format")
    add("image_root", metavar="IMAGES", help="folder of the images")
    add("--config", metavar="FILE", help="path of a config, or name of one of ours")
    add("--json", action="store_true", help="print everything as json, and write no page")
    add("--images", type=int, default=8, help="sample images to draw (default 8)")
    add("--output", type=Path, help="folder of the page (default output/check/NAME)")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from megdet_d2.check import command

    command.run(args)
