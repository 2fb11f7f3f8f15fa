"""Measures here what a preset assumes: a config's own steps, its loader, and collectives."""

import itertools
import logging
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from megdet_d2.engine.precision import build_inner_trainer
from megdet_d2.engine.trainer import Trainer

from .collectives import measure_link
from .flops import OBJECTS, count, image_size
from .hardware import Hardware
from .memory_step import make_batch
from .topology import PCIE
from .training_images import TrainingImages

logger = logging.getLogger(__name__)

FEWEST = 3
"""Pairs of steps, however long they take."""
SEVERAL, QUICK = 4, 1.0
"""Images of the larger step. Where a step of one takes more than so many seconds, it has two."""
LEAST = 0.05
"""The least part of a step of one image that depends on the image."""
OF_STEPS, OF_LOADER = 0.7, 0.15
"""Parts of the time. The collectives take some seconds more."""


def measure(
    cfg: CfgNode, images: TrainingImages, seconds: float, variation: float, config: str
) -> Hardware:
    """Returns this machine's device as a training of ``cfg`` finds it.

    Steps of one and of several images, with the optimizer, give the seconds per image and per
    update; those of one image also give the variation.

    Args:
        cfg: a config whose data sets are registered where they are here.
        images: of the training set.
        seconds: to measure for. A step that takes long is measured three times anyway.
        variation: v to assume where the data is not here.
        config: name of the config, for the file.
    """
    cuda = torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu"
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cuda" if cuda else "cpu"
    cfg.MODEL.CGBN.BN_SIZE, cfg.MODEL.CGBN.CROSS_MACHINE = -1, False
    cfg.MODEL.SUBLINEAR.ENABLED, cfg.MODEL.COMPILE = False, False
    cfg.MODEL.WEIGHTS = ""
    cfg.SOLVER.IMS_PER_BATCH, cfg.MEGDET.ACCUMULATION_STEPS = SEVERAL, 1
    batches: Iterable[list[dict[str, Any]]]
    if images.are_here:
        batches = Trainer.build_train_loader(cfg)
    else:
        noise = make_batch(cfg, SEVERAL, image_size(images.megapixels), OBJECTS)
        batches = itertools.repeat(noise)
    stream = iter(batches)
    rate = _images_per_second(stream, OF_LOADER * seconds) if images.are_here else None
    several, ones, others, megapixels = _time_steps(cfg, stream, OF_STEPS * seconds)
    one = statistics.mean(ones)
    c = (statistics.mean(others) - one) / (several - 1)
    c = min(max(c, LEAST * one), one)  # the rest is the host's; noise may make it negative
    if images.are_here and len(ones) > FEWEST:
        variation = min(1.0, statistics.stdev(ones) / c)
    device = "cuda" if cuda else "cpu"
    processes = torch.cuda.device_count() if cuda else 2
    cores = len(os.sched_getaffinity(0)) / torch.get_num_threads()
    return Hardware(
        torch.cuda.get_device_name() if cuda else f"CPU with {os.cpu_count()} cores",
        f"{2 * len(ones)} steps of {config} on this machine, with "
        f"{'its images' if images.are_here else 'noise'}",
        c,
        count(cfg, megapixels).step,
        variation,
        _memory(cuda),
        measure_link(processes, device) if processes > 1 else PCIE,
        host=one - c,
        loader=rate,
        slots=None if cuda else max(1.0, cores),
        config=config,
    )


def _time_steps(
    cfg: CfgNode, stream: Iterator[list[dict[str, Any]]], seconds: float
) -> tuple[int, list[float], list[float], float]:
    """Returns the images of the larger steps; seconds of small and of larger ones; megapixels."""
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    in_series = cfg.DATALOADER.NUM_WORKERS == 0

    def measure_pair(several: int) -> tuple[float, float, float]:
        began = time.perf_counter()
        batch = next(stream)
        loading = (time.perf_counter() - began) / len(batch) if in_series else 0.0
        one = loading + _step(cfg, model, optimizer, batch[:1])
        other = several * loading + _step(cfg, model, optimizer, batch[:several])
        return one, other, batch[0]["image"][0].numel() / 1e6

    measure_pair(2)  # the first step is slower
    several = SEVERAL if measure_pair(2)[0] < QUICK else 2
    pairs: list[tuple[float, float, float]] = []
    began = time.perf_counter()
    while len(pairs) < FEWEST or time.perf_counter() - began < seconds:
        pairs.append(measure_pair(several))
    ones, others, megapixels = (list(values) for values in zip(*pairs, strict=True))
    return several, ones, others, statistics.mean(megapixels)


def _step(
    cfg: CfgNode, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list
) -> float:
    """Runs one training step and returns its seconds."""
    inner = build_inner_trainer(SimpleTrainer(model, [batch], optimizer), cfg)
    inner.iter = 0
    began = time.perf_counter()
    with EventStorage(0) as inner.storage:
        inner.run_step()
    if cfg.MODEL.DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _images_per_second(stream: Iterator[list[dict[str, Any]]], seconds: float) -> float:
    next(stream)  # starts the workers
    loaded, began = 0, time.perf_counter()
    while loaded < 8 or time.perf_counter() - began < seconds:
        loaded += len(next(stream))
    return loaded / (time.perf_counter() - began)


def _memory(cuda: bool) -> float:
    if cuda:
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
