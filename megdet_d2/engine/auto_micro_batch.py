"""Chooses the largest micro-batch that fits, for ``MEGDET.AUTO_MICRO_BATCH``.

The mini-batch stays ``SOLVER.IMS_PER_BATCH`` and the BN size ``MODEL.CGBN.BN_SIZE``. So the choice
decides ``MEGDET.ACCUMULATION_STEPS`` and the processes of a BN group, and never what is trained.
"""

import gc
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from megdet_d2.norm.configure import group_ranks
from megdet_d2.norm.registry import uses_cgbn

from .builders import Builders
from .overrides import overrides
from .probe import Probe
from .random_state import RandomState
from .worst_case import enlarge, worst_image

logger = logging.getLogger(__name__)

FILE = "micro_batch.json"
_KEY = "MEGDET.AUTO_MICRO_BATCH"


def check_auto_micro_batch(cfg: CfgNode) -> None:
    """Checks the keys. MODEL.DEVICE has to be the one that is used.

    Raises:
        ValueError: a value is not valid. The message names the key and the fix.
    """
    keys = cfg.MEGDET
    limit = keys.MEMORY_LIMIT_MB
    if not limit >= 0:
        raise ValueError(
            f"MEGDET.MEMORY_LIMIT_MB is {limit}; give MiB, or 0 for the device's own memory"
        )
    if not keys.AUTO_MICRO_BATCH:
        for key in ("AUTO_SUBLINEAR", "MEMORY_LIMIT_MB"):
            if keys[key]:
                raise ValueError(
                    f"MEGDET.{key} is {keys[key]}, but only {_KEY} uses it; set that True, or "
                    f"MEGDET.{key} {type(keys[key])()}"
                )
        return
    if cfg.MODEL.DEVICE == "cpu" and not limit:
        raise ValueError(
            f"{_KEY} is True and MODEL.DEVICE is 'cpu', where memory does not end at a known size; "
            f"set MEGDET.MEMORY_LIMIT_MB to the MiB of a step's tensors, or {_KEY} False"
        )
    if cfg.MODEL.DEVICE == "cpu" and cfg.MODEL.COMPILE:
        raise ValueError(
            f"{_KEY} and MODEL.COMPILE are both True, but on a CPU the tensors of compiled parts "
            "cannot be counted; set one of them to False"
        )
    if uses_cgbn(cfg) and cfg.MODEL.CGBN.BN_SIZE == -1:
        raise ValueError(
            f"{_KEY} is True and MODEL.CGBN.BN_SIZE is -1, all images that a machine holds at "
            "once, so the norm would follow from the memory; give a number of images, such as 16"
        )


def possible_micro_batches(cfg: CfgNode) -> list[int]:
    """Returns the images per GPU that fill the mini-batch and hold the BN size, smallest first.

    Raises:
        ValueError: there are none. The message names the keys, and BN sizes that work.
    """
    each = _images_per_process(cfg)
    bn_size, possible = cfg.MODEL.CGBN.BN_SIZE, [n for n in _divisors(each) if _holds(cfg, n)]
    if not possible:
        sizes = _bn_sizes(cfg, _divisors(each))
        raise ValueError(
            f"{_KEY}: MODEL.CGBN.BN_SIZE is {bn_size}, which no micro-batch can hold: each of the "
            f"{comm.get_world_size()} processes has {each} images of SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}. Valid sizes: {', '.join(map(str, sizes))}. "
            "MODEL.CGBN.CROSS_MACHINE allows groups that span machines"
        )
    return possible


def with_micro_batch(cfg: CfgNode, images: int, sublinear: bool = False) -> CfgNode:
    """Returns a copy of ``cfg`` with micro-batches of ``images`` per GPU.

    Args:
        cfg: a config.
        images: one of ``possible_micro_batches``.
        sublinear: turn on ``MODEL.SUBLINEAR``.
    """
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.MEGDET.ACCUMULATION_STEPS = _images_per_process(cfg) // images
    cfg.MODEL.SUBLINEAR.ENABLED = cfg.MODEL.SUBLINEAR.ENABLED or sublinear
    if frozen:
        cfg.freeze()
    return cfg


def choose_micro_batch(cfg: CfgNode, trainer: type[Builders]) -> CfgNode:
    """Returns the config with the largest micro-batch that fits on every process.

    ``MODEL.SUBLINEAR`` is turned on only where ``MEGDET.AUTO_SUBLINEAR`` allows it and no
    micro-batch fits without. OUTPUT_DIR/micro_batch.json keeps the choice, for a later start with
    the same config and machines. Random numbers stay as they were. Every process has to call it.

    Args:
        cfg: a config that ``prepare_config`` has resolved.
        trainer: the class of the trainer.

    Raises:
        ValueError: in every process, none fits. The message names keys and values that may work.
    """
    cfg = trainer.auto_scale_workers(cfg, comm.get_world_size())
    facts = comm.all_gather(_facts(cfg))
    remembered = comm.all_gather(_read(cfg, facts) if comm.is_main_process() else None)[0]
    if remembered:
        logger.info(f"{_KEY}: {_describe(cfg, *remembered)}, as in {FILE}")
        return with_micro_batch(cfg, *remembered)
    began, random = time.perf_counter(), RandomState()
    choice, error = (0, False), None
    try:
        choice = _choose_alone(cfg, trainer)
    except Exception as failed:  # the other processes wait for the answer
        error = failed
    gc.collect()  # modules with checkpointed segments refer to themselves
    if cfg.MODEL.DEVICE != "cpu":
        torch.cuda.empty_cache()
    random.restore()
    everyone = comm.all_gather((choice, None if error is None else f"{error}"))
    for rank, (_, said) in enumerate(everyone):
        if said is not None:
            raise error or ValueError(f"rank {rank}: {said}")
    images = min(choice[0] for choice, _ in everyone)
    sublinear = any(choice[1] for choice, _ in everyone)
    logger.info(
        f"{_KEY}: {_describe(cfg, images, sublinear)}, found in {time.perf_counter() - began:.0f} s"
    )
    remember(cfg, images, sublinear, facts)
    chosen = with_micro_batch(cfg, images, sublinear)
    dumped = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if comm.is_main_process() and PathManager.isfile(dumped):
        with PathManager.open(dumped, "w") as file:
            file.write(chosen.dump())
    return chosen


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Returns the largest of the increasing ``sizes`` that fits; 0 if none does.

    It doubles the place in ``sizes``, and then bisects.
    """
    good, bad = -1, len(sizes)  # places
    step = 1
    while good + step < bad:
        if not fits(sizes[good + step]):
            bad = good + step
            break
        good += step
        step *= 2
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(sizes[middle]):
            good = middle
        else:
            bad = middle
    return sizes[good] if good >= 0 else 0


def smaller_micro_batch(cfg: CfgNode, images: int) -> int:
    """Returns half of ``images``, or the next divisor below that holds the BN size; 0 for none."""
    smaller = [n for n in _divisors(images) if 2 * n <= images and _holds(cfg, n)]
    return max(smaller, default=0)


def remember(
    cfg: CfgNode, images: int, sublinear: bool, facts: Sequence[dict[str, Any]] | None = None
) -> None:
    """Writes a choice to OUTPUT_DIR/micro_batch.json, on rank 0, for the next start.

    Args:
        cfg: a config.
        images: per GPU.
        sublinear: whether the stages were turned on.
        facts: of all processes. None keeps those of the file, and writes on any rank.
    """
    path = os.path.join(cfg.OUTPUT_DIR, FILE)
    if facts is None:
        with PathManager.open(path) as file:
            facts = json.load(file)["facts"]
    elif not comm.is_main_process():
        return
    PathManager.mkdirs(cfg.OUTPUT_DIR)
    with PathManager.open(path, "w") as file:
        json.dump(
            {"images_per_gpu": images, "sublinear": sublinear, "facts": facts}, file, indent=1
        )


def _choose_alone(cfg: CfgNode, trainer: type[Builders]) -> tuple[int, bool]:
    """Returns what fits on this process: images and whether sublinear memory is needed."""
    possible = possible_micro_batches(cfg)
    # Groups that exist for the largest, since build_model makes some.
    probe = Probe(with_micro_batch(cfg, possible[-1]), trainer, _image(cfg, trainer))
    can_save = cfg.MEGDET.AUTO_SUBLINEAR and not cfg.MODEL.SUBLINEAR.ENABLED
    images = largest_that_fits(possible, probe.fits)
    if not images and can_save:
        probe.use_sublinear()
        images = largest_that_fits(possible, probe.fits)
        if images:
            return images, True
    if images:
        return images, False
    reason = probe.reason
    less = [n for n in _divisors(possible[0]) if n < possible[0]]
    fitting = largest_that_fits(less, probe.fits)
    sizes = _bn_sizes(cfg, [n for n in less if n <= fitting])
    advice = ["lower INPUT.MAX_SIZE_TRAIN and MIN_SIZE_TRAIN"]
    if not cfg.MODEL.SUBLINEAR.ENABLED and not cfg.MEGDET.AUTO_SUBLINEAR:
        advice.insert(0, "set MEGDET.AUTO_SUBLINEAR True")
    if not cfg.SOLVER.AMP.ENABLED:
        advice.append("set SOLVER.AMP.ENABLED True")
    if sizes:
        advice.append(f"set MODEL.CGBN.BN_SIZE to {' or '.join(map(str, sizes))}")
    if cfg.MEGDET.MEMORY_LIMIT_MB:
        advice.append("raise MEGDET.MEMORY_LIMIT_MB")
    held = f" that holds MODEL.CGBN.BN_SIZE {cfg.MODEL.CGBN.BN_SIZE}" if uses_cgbn(cfg) else ""
    raise ValueError(
        f"{_KEY}: no micro-batch{held} fits into the memory; the smallest has {possible[0]} images "
        f"per GPU ({reason}). To fit, {'; or '.join(advice)}"
    )


def _image(cfg: CfgNode, trainer: type[Builders]) -> dict[str, Any]:
    if overrides(trainer, Builders, "build_train_loader"):
        batch = next(iter(trainer.build_train_loader(cfg)))
        busiest = max(batch, key=lambda image: len(image.get("instances", ())))
        return enlarge(cfg, busiest, busiest["image"].shape[-2:])
    return worst_image(cfg, trainer.build_mapper(cfg, True))


def _images_per_process(cfg: CfgNode) -> int:
    return cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _holds(cfg: CfgNode, images: int) -> bool:
    if not uses_cgbn(cfg):
        return True
    try:
        group_ranks(cfg.MODEL.CGBN.BN_SIZE, images, cfg.MODEL.CGBN.CROSS_MACHINE)
    except ValueError:
        return False
    return True


def _bn_sizes(cfg: CfgNode, micro_batches: Sequence[int]) -> list[int]:
    """Returns the BN sizes that these micro-batches can hold; none without a layer of CGBN."""
    if not uses_cgbn(cfg):
        return []
    across = cfg.MODEL.CGBN.CROSS_MACHINE or comm.get_world_size() == 1
    processes = comm.get_world_size() if across else comm.get_local_size()
    return sorted({n * k for n in micro_batches for k in _divisors(processes)})


def _facts(cfg: CfgNode) -> dict[str, Any]:
    """Returns what the choice depends on: the keys of the memory, and this process's device."""
    parts = [cfg.MODEL, cfg.INPUT, cfg.SOLVER.AMP, cfg.DATASETS, cfg.MEGDET.EMA_DECAY]
    text = f"{parts} {cfg.SOLVER.IMS_PER_BATCH} {cfg.MEGDET.AUTO_SUBLINEAR}"
    device, memory = "cpu", 0
    if cfg.MODEL.DEVICE != "cpu":
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        device, memory = found.name, found.total_memory
    return {
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "device": device,
        "memory": memory,
        "limit": cfg.MEGDET.MEMORY_LIMIT_MB,
    }


def _read(cfg: CfgNode, facts: Sequence[dict[str, Any]]) -> tuple[int, bool] | None:
    """Returns the choice of an earlier start; None if there is none, or of other machines."""
    path = os.path.join(cfg.OUTPUT_DIR, FILE)
    if not PathManager.isfile(path):
        return None
    with PathManager.open(path) as file:
        kept = json.load(file)
    if kept["facts"] == list(facts):
        return kept["images_per_gpu"], kept["sublinear"]
    logger.warning(
        f"{_KEY}: {path} is of another config or other machines, so the micro-batch is chosen "
        "again. A resume continues at the same image, but is not exact to the bit if it changes"
    )
    return None


def _describe(cfg: CfgNode, images: int, sublinear: bool) -> str:
    steps = _images_per_process(cfg) // images
    norm = f", MODEL.CGBN.BN_SIZE {cfg.MODEL.CGBN.BN_SIZE}" if uses_cgbn(cfg) else ""
    saved = ", with MODEL.SUBLINEAR" if sublinear else ""
    return (
        f"{images} images per GPU, MEGDET.ACCUMULATION_STEPS {steps}, SOLVER.IMS_PER_BATCH "
        f"{cfg.SOLVER.IMS_PER_BATCH}{norm}{saved}"
    )
