"""Resolves the schedule of a mini-batch as the training does, and the keys that ask for it."""

import functools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from megdet_d2.schedule.build import scale_config
from megdet_d2.schedule.scaling import scale_lr

from .question import Question


@dataclass(frozen=True)
class Resolved:
    """A schedule.

    Attributes:
        batch: B.
        reference: the mini-batch whose AP the schedule was made for.
        lr: base learning rate.
        warmup, iterations: length.
        evaluations: over the whole training, with the one after it.
        evaluation_period: iterations between two; 0 or less for the one after the training alone.
        keys: KEY VALUE ... of the command line that ask for it, beside the config.
    """

    batch: int
    reference: int
    lr: float
    warmup: int
    iterations: int
    evaluations: int
    evaluation_period: int
    keys: tuple[str, ...]


def resolve(question: Question, batch: int) -> Resolved:
    """Returns the schedule of a mini-batch of ``batch`` images.

    With a MEGDET.POLICY it is that of ``scale_config``. Without, the config's own schedule is for
    its own mini-batch; another mini-batch scales learning rate and iterations linearly, and keeps
    the warm-up.

    Raises:
        ValueError: the schedule makes no sense with this mini-batch.
    """
    cfg = DefaultTrainer.auto_scale_workers(question.cfg, question.ranks).clone()
    cfg.defrost()
    own = cfg.SOLVER.IMS_PER_BATCH
    values: dict[str, Any] = {"SOLVER.IMS_PER_BATCH": batch}
    if question.cfg.SOLVER.REFERENCE_WORLD_SIZE:
        values["SOLVER.REFERENCE_WORLD_SIZE"] = 0
    if cfg.MEGDET.POLICY and cfg.MEGDET.EPOCH_IMAGES not in (0, question.images.count):
        values["MEGDET.EPOCH_IMAGES"] = question.images.count
    for key in ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"):
        period = _get(cfg, key)
        if period > 0 and batch != own and key not in question.fixed:
            values[key] = max(1, round(period * own / batch))
    if not cfg.MEGDET.POLICY and (batch != own or question.cfg.SOLVER.REFERENCE_WORLD_SIZE):
        values |= _scaled(cfg, own, batch)
    cfg.MEGDET.ACCUMULATION_STEPS = 1  # they do not change the schedule
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    scale_config(cfg, question.images.count, question.ranks)
    solver, period = cfg.SOLVER, cfg.TEST.EVAL_PERIOD
    last = solver.MAX_ITER - 1
    return Resolved(
        batch,
        cfg.MEGDET.REFERENCE_BATCH_SIZE if cfg.MEGDET.POLICY else own,
        solver.BASE_LR,
        solver.WARMUP_ITERS,
        solver.MAX_ITER,
        (last // period if period > 0 else 0) + 1 if cfg.DATASETS.TEST else 0,
        period,
        to_words(question.cfg, values),
    )


def refuse_batch_warmup(cfg: CfgNode) -> None:
    """Refuses a mini-batch that grows: a plan and a dry run have one.

    Raises:
        ValueError: MEGDET.BATCH_WARMUP is set.
    """
    if cfg.MEGDET.BATCH_WARMUP:
        raise ValueError(
            f"MEGDET.BATCH_WARMUP is {cfg.MEGDET.BATCH_WARMUP}, and megdet plan takes one "
            "mini-batch for the whole training; add MEGDET.BATCH_WARMUP () to plan the last one"
        )


def to_words(cfg: CfgNode, values: dict[str, Any]) -> tuple[str, ...]:
    """Returns KEY VALUE ... of the mini-batch, and of those values that ``cfg`` does not have."""
    return tuple(
        word
        for key, value in values.items()
        if key == "SOLVER.IMS_PER_BATCH" or _get(cfg, key) != value
        for word in (key, _written(value))
    )


def _written(value: Any) -> str:
    """Returns a value as a shell takes it with few quotes."""
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def _get(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)


def _scaled(cfg: CfgNode, own: int, batch: int) -> dict[str, Any]:
    """Returns Detectron2's own schedule for another mini-batch."""
    factor = batch / own
    steps = tuple(round(step / factor) for step in cfg.SOLVER.STEPS)
    return {
        "SOLVER.BASE_LR": scale_lr(cfg.SOLVER.BASE_LR, own, batch),
        "SOLVER.MAX_ITER": max(1, round(cfg.SOLVER.MAX_ITER / factor)),
        "SOLVER.STEPS": steps,
        "SOLVER.WARMUP_ITERS": cfg.SOLVER.WARMUP_ITERS,
    }


def launch_line(resolved: Resolved, config: str, machines: int, gpus: int, opts: list[str]) -> str:
    """Returns the command that starts this training.

    Args:
        resolved: the schedule and its keys.
        config: the config, as it was typed.
        machines, gpus: the cluster. For several machines RANK and HOST0 are set on each.
        opts: the overrides that were typed; where a key is in both, the schedule's counts.
    """
    program = "python train_net.py" if Path("train_net.py").is_file() else "megdet train"
    own = set(resolved.keys[::2])
    kept = [
        word
        for key, value in zip(opts[::2], opts[1::2], strict=True)
        if key not in own
        for word in (key, value)
    ]
    words = ["--config-file", config, "--num-gpus", str(gpus)]
    cluster = ""
    if machines > 1:
        words += ["--num-machines", str(machines)]
        cluster = " --machine-rank $RANK --dist-url tcp://$HOST0:29500"
    return f"{program} {shlex.join(words)}{cluster} {shlex.join([*kept, *resolved.keys])}"
