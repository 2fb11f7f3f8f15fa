"""Advice on a schedule that does not fit the training images, or itself."""

import math
from collections.abc import Sequence

from detectron2.config import CfgNode

from megdet_d2.data import Finding, Inspection
from megdet_d2.schedule.build import scheduled_images

from .ema import effective_decay

_FEW = 300  # iterations; a detector learns little in fewer, even from good weights
_MUCH, _LITTLE = 0.02, 0.001  # shares of the first weights in an average of the weights
_WITH_GAMMA = ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR")  # Detectron2's schedulers
_FACTOR = 2  # between the images of an epoch and those that there are

SHORTEST_WARMUP, WARMUP_SHARE = 150, 0.1
"""Iterations, or part of all iterations, that a warm-up to a raised learning rate should take."""


def count_images(cfg: CfgNode, inspections: Sequence[Inspection]) -> int | None:
    """Returns the images of ``DATASETS.TRAIN`` as Detectron2 filters them; None if not known.

    Args:
        cfg: a config.
        inspections: from ``inspect_datasets``.
    """
    known = {item.name: item for item in inspections}
    count = 0
    for name in cfg.DATASETS.TRAIN:
        item = known.get(name)
        if item is None or item.coco is None or item.images is None:
            return None
        filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        count += item.images if filtered else len(item.coco["images"])
    return count


def is_short_warmup(warmup: int, iterations: int) -> bool:
    """Returns True if a warm-up to a raised learning rate takes too few of all iterations."""
    return warmup < min(SHORTEST_WARMUP, WARMUP_SHARE * iterations)


def find_schedule_faults(cfg: CfgNode, num_images: int | None) -> list[Finding]:
    """Returns warnings about a resolved schedule.

    It may be short, or made for another data set. Keys of a ``MEGDET.POLICY`` that contradict one
    another are errors before; those of Detectron2's own schedule are warnings here.

    Args:
        cfg: a config that ``scale_config`` has resolved.
        num_images: images of the training set; None if that is not known.
    """
    findings = []
    keys, batch_size = cfg.MEGDET, cfg.SOLVER.IMS_PER_BATCH
    images = f"DATASETS.TRAIN has {num_images} images"

    def warn(kind: str, where: str, problem: str, fix: str) -> None:
        findings.append(Finding("warning", kind, where, "", problem, fix))

    epoch = keys.EPOCH_IMAGES
    if num_images and epoch and not 1 / _FACTOR <= epoch / num_images <= _FACTOR:
        warn(
            "epoch-images",
            f"MEGDET.EPOCH_IMAGES is {epoch}",
            f"{images} to train on, so each epoch is {epoch / num_images:.3g} times the data",
            "set MEGDET.EPOCH_IMAGES 0 to count them",
        )
    if num_images and batch_size > num_images:
        warn(
            "batch-size",
            f"SOLVER.IMS_PER_BATCH is {batch_size}",
            f"{images} to train on, so a mini-batch has some of them several times",
            f"set SOLVER.IMS_PER_BATCH to {num_images} or less",
        )
    iterations, warmup = cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
    if not keys.POLICY and warmup >= iterations:
        warn(
            "endless-warmup",
            f"SOLVER.WARMUP_ITERS is {warmup}",
            f"training ends after {iterations} iterations, before the learning rate has reached "
            f"SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g}",
            f"set SOLVER.WARMUP_ITERS below {iterations}, such as {iterations // 10}",
        )
    steps = [step for step in cfg.SOLVER.STEPS if step < iterations]
    decays = cfg.SOLVER.LR_SCHEDULER_NAME in _WITH_GAMMA and steps
    if not keys.POLICY and decays and cfg.SOLVER.GAMMA > 1:
        warn(
            "growing-rate",
            f"SOLVER.GAMMA is {cfg.SOLVER.GAMMA:g}",
            f"it multiplies the learning rate at the iterations {steps} of SOLVER.STEPS, and so "
            "raises it",
            f"set SOLVER.GAMMA {1 / cfg.SOLVER.GAMMA:.3g} to divide it",
        )
    raised = keys.POLICY and cfg.SOLVER.BASE_LR > keys.REFERENCE_LR
    if raised and is_short_warmup(warmup, iterations):
        warn(
            "short-warmup",
            f"MEGDET.WARMUP_EPOCHS is {keys.WARMUP_EPOCHS:g}",
            f"a warm-up of {warmup} iterations is short for the learning rate "
            f"{cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.BASE_LR / keys.REFERENCE_LR:.3g} times "
            "REFERENCE_LR: the AP may recover late, although the loss stays finite",
            f"give {SHORTEST_WARMUP} iterations, or {WARMUP_SHARE:.0%} of {iterations}",
        )
    decay = effective_decay(cfg) if keys.EMA_DECAY else 0.0
    if (share := decay ** (iterations - 1)) > _MUCH:
        last = _LITTLE ** (keys.REFERENCE_BATCH_SIZE / batch_size / iterations)
        warn(
            "slow-average",
            f"MEGDET.EMA_DECAY is {keys.EMA_DECAY:g}",
            f"at the end of {iterations} iterations of {batch_size} images {share:.0%} of the "
            "average are the weights after the first iteration, so the AP of the average is low, "
            "or that of MODEL.WEIGHTS",
            f"set MEGDET.EMA_DECAY {math.floor(last * 1e5) / 1e5:g} or less",
        )
    if keys.POLICY and iterations < _FEW:
        epochs = keys.EPOCHS or scheduled_images(cfg) / (epoch or num_images or batch_size)
        warn(
            "few-iterations",
            f"MEGDET.POLICY is {keys.POLICY!r}",
            f"its {epochs:.3g} epochs are {iterations} iterations of {batch_size} images, and a "
            f"detector learns little in fewer than {_FEW}",
            "lower SOLVER.IMS_PER_BATCH, or train longer: MEGDET.POLICY custom with MEGDET.EPOCHS "
            f"{epochs * _FEW / iterations:.3g} or more, and MEGDET.DECAY_EPOCHS and DECAY_FACTORS",
        )
    return findings
