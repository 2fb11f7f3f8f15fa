"""Computes the seconds of a training's evaluations: forward of the test images, and the AP."""

from .question import Question
from .resolved import Resolved

FORWARD = 1 / 3
"""The part of a step's arithmetic that is forward."""
SECONDS_OF_AP = {"pycocotools": 41.0 / 5000, "hotcoco": 0.6 / 5000}
"""Of an image with 100 boxes, on one core: docs/results/evaluation_cpu_2026-11-29.json."""


def evaluation_seconds(question: Question, resolved: Resolved, step: float) -> float:
    """Returns the seconds of all evaluations: N (c_F / P + s) each.

    c_F is forward of an image. P ranks share the N images, and rank 0 alone computes the AP, in s
    seconds per image.

    Args:
        question: data and device.
        resolved: number of evaluations.
        step: floating-point operations of an image in training.
    """
    hardware, images = question.hardware, question.images
    forward = FORWARD * step * images.test_megapixels / images.megapixels
    seconds = hardware.seconds_per_image * forward / hardware.flops
    each = seconds * hardware.sharing(question.gpus) / question.ranks
    ap = SECONDS_OF_AP[question.cfg.TEST.COCO_API]
    return resolved.evaluations * images.test * (each + ap)
