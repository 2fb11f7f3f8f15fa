"""Tests the scaling of seconds by arithmetic on Detectron2's model zoo: fits one model of sixteen.

A preset knows the seconds of one model, Mask R-CNN R50-FPN. Another model takes F / F_0 times as
long, with F its arithmetic, see flops.py. The zoo's models were all trained by the same code on the
same 8 V100 with 2 images each. Their seconds per update, from MODEL_ZOO.md, are in the CSV file
beside this module with the counted arithmetic.
"""

import csv
from dataclasses import replace
from pathlib import Path

from .back_test import BackTest, Row
from .hardware import ZOO, ZOO_GPUS, ZOO_IMAGES, presets
from .step_time import Work, step_time
from .topology import Topology

FITTED = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
GIGA = 1e9


def back_test() -> BackTest:
    """Returns seconds of an update of the zoo's models, published and predicted."""
    hardware = presets()[ZOO]
    topology = Topology(1, ZOO_GPUS, hardware.inside)
    rows = []
    with open(Path(__file__).with_name("zoo.csv"), newline="") as file:
        for line in csv.DictReader(file):
            work = Work(
                hardware.seconds_per_image,
                ZOO_IMAGES,
                variation=hardware.variation,
                gradient_bytes=4 * int(line["parameters"]),
            )
            scale = GIGA * float(line["gflop_per_image"]) / hardware.flops
            work = replace(work, seconds_per_image=work.seconds_per_image * scale)
            name = line["config"]
            rows.append(
                Row(
                    name.partition("/")[2],
                    float(line["seconds_per_update"]),
                    step_time(work, topology).total,
                    name == FITTED,
                )
            )
    notes = (
        "Grouped convolutions (X101) and a res5 over regions (C4) take less time than their "
        "arithmetic says.",
        "The 3 persons per image of keypoint models were chosen with their rows in view.",
    )
    c = f"{hardware.seconds_per_image:.4f} s per image of the fitted model"
    return BackTest("Detectron2's model zoo, seconds per update", "s", tuple(rows), {"c": c}, notes)
