"""Resolves ``MEGDET`` keys into ``SOLVER``, and builds the LR scheduler from them."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler
from detectron2.utils import comm
from fvcore.common.param_scheduler import MultiStepParamScheduler, ParamScheduler
from tabulate import tabulate

from megdet_d2.data.records import load_training_records

from .phases import Phases, lr_factor, make_phases, stretch
from .scaling import POLICIES, EpochPolicy, Schedule, make_schedule

# SOLVER keys that a policy decides, and what to set instead.
_RESOLVED = {
    "BASE_LR": "MEGDET.REFERENCE_LR, SCALING_RULE or LR_FACTOR",
    "MAX_ITER": 'MEGDET.EPOCHS, with MEGDET.POLICY "custom"',
    "STEPS": 'MEGDET.DECAY_EPOCHS, with MEGDET.POLICY "custom"',
    "WARMUP_ITERS": "MEGDET.WARMUP_EPOCHS",
    "WARMUP_FACTOR": "MEGDET.WARMUP_START",
}
# SOLVER keys that a policy does not use.
_UNUSED = {
    "GAMMA": 'MEGDET.DECAY_FACTORS, with MEGDET.POLICY "custom"',
    "WARMUP_METHOD": 'nothing: the warm-up is linear (or MEGDET.POLICY "")',
    "LR_SCHEDULER_NAME": 'MEGDET.POLICY "", which leaves the schedule to Detectron2',
    "RESCALE_INTERVAL": 'MEGDET.POLICY "", which leaves the schedule to Detectron2',
    "REFERENCE_WORLD_SIZE": "nothing: a MEGDET.POLICY scales by images, not by workers",
}


def scale_config(cfg: CfgNode, num_images: int | None = None, world_size: int | None = None) -> str:
    """Resolves the ``MEGDET`` keys into ``SOLVER``, in place, before training (§3.2, §4).

    Call it before ``cfg.freeze()`` and ``default_setup``, so that the same values are logged,
    dumped and used. A second call, or one on the dumped config, changes nothing. With
    ``MEGDET.POLICY`` "" it only checks the batch size.

    Args:
        num_images: images of an epoch, if ``MEGDET.EPOCH_IMAGES`` is 0; by default the images of
            ``DATASETS.TRAIN`` after Detectron2's filtering.
        world_size: number of processes that will train; by default those running.

    Returns:
        A table of the resolved keys for the log: key, before, after, why. "" without a policy.

    Raises:
        ValueError: the processes cannot share a mini-batch evenly, the schedule is invalid, or the
            policy would override a ``SOLVER`` key. The message names the key, its value and the
            fix.
    """
    world_size = comm.get_world_size() if world_size is None else world_size
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    policy = policy_from_config(cfg) if cfg.MEGDET.POLICY else None
    _refuse_with_batch_warmup(cfg)
    cfg.MEGDET.RESOLVED.PHASES = ()
    if policy is None and cfg.SOLVER.REFERENCE_WORLD_SIZE:
        return ""  # Detectron2 scales the batch to the workers later
    images_per_gpu = images_per_micro_batch(cfg, world_size)  # also for its errors
    if policy is None:
        return ""
    refuse_solver_overrides(cfg)

    epoch_images = cfg.MEGDET.EPOCH_IMAGES or num_images or len(load_training_records(cfg))
    schedule = make_schedule(
        policy,
        batch_size,
        epoch_images,
        reference_lr=cfg.MEGDET.REFERENCE_LR,
        reference_batch_size=cfg.MEGDET.REFERENCE_BATCH_SIZE,
        rule=cfg.MEGDET.SCALING_RULE,
        lr_factor=cfg.MEGDET.LR_FACTOR,
        warmup_epochs=cfg.MEGDET.WARMUP_EPOCHS,
        warmup_start=cfg.MEGDET.WARMUP_START,
    )
    keys, phases = cfg.MEGDET, Phases((0,), (batch_size,))
    if warmup := cfg.MEGDET.BATCH_WARMUP:
        phases = make_phases(warmup, batch_size, epoch_images, images_per_gpu * world_size)
        schedule = stretch(
            schedule, phases, keys.REFERENCE_LR, keys.SCALING_RULE, keys.WARMUP_START
        )
        cfg.MEGDET.RESOLVED.PHASES = phases.pairs
    why = _reasons(cfg, policy, schedule, epoch_images)
    if warmup:
        for key in ("MAX_ITER", "STEPS", "WARMUP_ITERS"):
            why[key] += ", in iterations of the phases below"
        start_lr = schedule.warmup_factor * lr_factor(phases, 0, keys.SCALING_RULE)
        why["WARMUP_FACTOR"] = f"from LR {start_lr * schedule.base_lr:g} ({keys.WARMUP_START})"
    rows = []
    for key in _RESOLVED:
        before, after = cfg.SOLVER[key], getattr(schedule, key.lower())
        cfg.SOLVER[key] = after
        # A copy: YAML dumps the same object in two places as an alias, and an edit of one there
        # would change both.
        cfg.MEGDET.RESOLVED[key] = tuple(list(after)) if isinstance(after, tuple) else after
        rows.append((f"SOLVER.{key}", before, after, why[key]))
    if warmup:
        why_phases = "MEGDET.BATCH_WARMUP, as (first iteration, mini-batch)"
        rows.append(("MEGDET.RESOLVED.PHASES", (), phases.pairs, why_phases))
    return tabulate(rows, headers=("key", "before", "after", "why"), tablefmt="pipe")


def images_per_epoch(cfg: CfgNode) -> float | None:
    """Returns the images of an epoch of a resolved config; None if it does not count epochs."""
    if cfg.MEGDET.EPOCH_IMAGES:
        return cfg.MEGDET.EPOCH_IMAGES
    if not cfg.MEGDET.POLICY:
        return None
    return scheduled_images(cfg) / policy_from_config(cfg).epochs


def phases_from_config(cfg: CfgNode) -> Phases:
    """Returns the mini-batch of each iteration of a resolved config."""
    if not cfg.MEGDET.RESOLVED.PHASES:
        return Phases((0,), (cfg.SOLVER.IMS_PER_BATCH,))
    starts, batch_sizes = zip(*cfg.MEGDET.RESOLVED.PHASES, strict=True)
    return Phases(starts, batch_sizes)


def scheduled_images(cfg: CfgNode) -> int:
    """Returns the images of a whole training of a resolved config."""
    return phases_from_config(cfg).images(cfg.SOLVER.MAX_ITER)


def _refuse_with_batch_warmup(cfg: CfgNode) -> None:
    """Raises ``ValueError`` for keys that cannot work while the mini-batch grows."""
    keys = cfg.MEGDET
    if not keys.BATCH_WARMUP:
        return
    for key, works, why in (
        ("POLICY", bool(keys.POLICY), 'it counts epochs; use "normal", "long" or "custom"'),
        ("AUTO_MICRO_BATCH", not keys.AUTO_MICRO_BATCH, "use MEGDET.ACCUMULATION_STEPS"),
        ("EMA_DECAY", not keys.EMA_DECAY, "its decay is for one mini-batch; use 0.0"),
        (
            "ON_DIVERGENCE",
            keys.ON_DIVERGENCE == "stop",
            'a roll-back counts iterations; use "stop"',
        ),
    ):
        if not works:
            raise ValueError(
                f"MEGDET.BATCH_WARMUP is {keys.BATCH_WARMUP}, which does not work with "
                f"MEGDET.{key} {keys[key]!r}: {why}, or set MEGDET.BATCH_WARMUP ()"
            )
    if not all(map(_is_phase, keys.BATCH_WARMUP)):
        raise ValueError(
            f"MEGDET.BATCH_WARMUP is {keys.BATCH_WARMUP}; give pairs (epoch, mini-batch), with "
            "whole mini-batches, such as ((0, 64), (1, 128), (2, 256))"
        )


def _is_phase(pair: Any) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    epoch, batch_size = pair
    return type(epoch) in (int, float) and math.isfinite(epoch) and type(batch_size) is int


def images_per_micro_batch(cfg: CfgNode, world_size: int) -> int:
    """Returns the images per process and micro-batch.

    That is IMS_PER_BATCH / (processes x ACCUMULATION_STEPS). ``SOLVER.IMS_PER_BATCH`` is the
    mini-batch of an update, over all processes and micro-batches.

    Raises:
        ValueError: they cannot share it evenly; the message lists the nearest sizes that work.
    """
    batch_size, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.MEGDET.ACCUMULATION_STEPS
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"MEGDET.ACCUMULATION_STEPS is {steps!r}; give a whole number from 1")
    parts = world_size * steps
    if batch_size < 1 or batch_size % parts:
        below = batch_size // parts * parts
        works = [b for b in (below, below + parts) if b > 0]
        each = f" in {steps} micro-batches each (MEGDET.ACCUMULATION_STEPS)" if steps > 1 else ""
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share "
            f"evenly{each}; nearest that work: {' and '.join(map(str, works))}"
        )
    return batch_size // parts


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Builds the scheduler of ``MEGDET.POLICY``; with "" that of Detectron2.

    Raises:
        ValueError: a policy is set, and ``scale_config`` has not resolved it.
    """
    if "MEGDET" not in cfg or not cfg.MEGDET.POLICY:
        return d2_build_lr_scheduler(cfg, optimizer)
    solver = cfg.SOLVER
    if any(_differ(solver[key], cfg.MEGDET.RESOLVED[key]) for key in _RESOLVED):
        raise ValueError(
            f"MEGDET.POLICY is {cfg.MEGDET.POLICY!r} and SOLVER does not match it: call "
            "megdet_d2.scale_config(cfg) after the last change of cfg, before training"
        )
    decay = MultiStepParamScheduler(
        values=policy_from_config(cfg).values,
        milestones=list(solver.STEPS),
        num_updates=solver.MAX_ITER,
    )
    multiplier: ParamScheduler = WarmupParamScheduler(
        decay, solver.WARMUP_FACTOR, solver.WARMUP_ITERS / solver.MAX_ITER, "linear"
    )
    if cfg.MEGDET.RESOLVED.PHASES:
        phases, rule = phases_from_config(cfg), cfg.MEGDET.SCALING_RULE
        multiplier = _BatchWarmup(multiplier, phases, rule, solver.MAX_ITER)
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


class _BatchWarmup(ParamScheduler):
    """The multiples of a scheduler, times that of each phase's mini-batch."""

    def __init__(self, scheduler: ParamScheduler, phases: Phases, rule: str, max_iter: int):
        self._scheduler = scheduler
        self._phases = phases
        self._rule = rule
        self._max_iter = max_iter

    def __call__(self, where: float) -> float:
        iteration = round(where * self._max_iter)  # LRMultiplier divides by it
        return self._scheduler(where) * lr_factor(self._phases, iteration, self._rule)


def policy_from_config(cfg: CfgNode) -> EpochPolicy:
    """Returns the epoch policy that ``MEGDET.POLICY`` names.

    Raises:
        ValueError: the name is unknown, or epochs are set although the policy defines them.
    """
    keys = cfg.MEGDET
    if keys.POLICY == "custom":
        if keys.EPOCHS is None:
            raise ValueError(
                'MEGDET.POLICY is "custom": set MEGDET.EPOCHS, the epochs to train for'
            )
        return EpochPolicy(keys.EPOCHS, tuple(keys.DECAY_EPOCHS), tuple(keys.DECAY_FACTORS))
    if keys.POLICY not in POLICIES:
        raise ValueError(
            f'MEGDET.POLICY is {keys.POLICY!r}; use {", ".join(POLICIES)}, custom, or "" for '
            "Detectron2's own schedule"
        )
    for key in ("EPOCHS", "DECAY_EPOCHS", "DECAY_FACTORS"):
        if keys[key]:
            raise ValueError(
                f"MEGDET.{key} is {keys[key]}, but MEGDET.POLICY {keys.POLICY!r} has its own; set "
                'MEGDET.POLICY "custom"'
            )
    return POLICIES[keys.POLICY]


def refuse_solver_overrides(cfg: CfgNode) -> None:
    """Refuses ``SOLVER`` keys that ``MEGDET.POLICY`` decides or does not use, all at once.

    A value equal to Detectron2's default is accepted, since it undoes that of a config file. In a
    dumped config so are the values that the policy itself has written.

    Args:
        cfg: a config with the overrides of the command line.

    Raises:
        ValueError: names the keys, what to set instead of each, and what to write.
    """
    if not cfg.MEGDET.POLICY:
        return
    defaults = get_cfg().SOLVER
    written = cfg.MEGDET.RESOLVED if cfg.MEGDET.RESOLVED.MAX_ITER else {}
    # In a dumped config a default is an edit, unless the learning rate's is put back too.
    put_back = not _differ(cfg.SOLVER.BASE_LR, defaults.BASE_LR)
    fixes = {**_RESOLVED, **_UNUSED}
    wrong = [
        key
        for key in fixes
        if _differ(cfg.SOLVER[key], written.get(key, defaults[key]))
        and (not put_back or _differ(cfg.SOLVER[key], defaults[key]))
    ]
    if not wrong:
        return
    values = ", ".join(f"SOLVER.{key} is {cfg.SOLVER[key]}" for key in wrong)
    instead = "; ".join(f"in place of {key}, {fixes[key]}" for key in wrong)
    again = " ".join(f'SOLVER.{key} "{defaults[key]}"' for key in wrong)
    raise ValueError(
        f"{values}, but MEGDET.POLICY {cfg.MEGDET.POLICY!r} decides the schedule. Set {instead}. "
        "Where the values come from a config file, put back Detectron2's defaults, in your file or "
        f"on the command line: {again}"
    )


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return list(a) != list(b)
    return a != b


def _reasons(
    cfg: CfgNode, policy: EpochPolicy, schedule: Schedule, epoch_images: int
) -> dict[str, str]:
    keys, batch_size = cfg.MEGDET, cfg.SOLVER.IMS_PER_BATCH
    per_epoch = f"{epoch_images} images / {batch_size}"
    k = batch_size / keys.REFERENCE_BATCH_SIZE
    scale = {"linear": f" x {k:g}", "sqrt": f" x sqrt({k:g})", "none": ""}[keys.SCALING_RULE]
    factor = f" x {keys.LR_FACTOR:g}" if keys.LR_FACTOR != 1 else ""
    decays = ", ".join(
        f"x{f:g} at {e:g}" for e, f in zip(policy.decay_epochs, policy.decay_factors, strict=True)
    )
    start = keys.WARMUP_START
    return {
        "BASE_LR": f"{keys.REFERENCE_LR:g}{scale}{factor} ({keys.SCALING_RULE} scaling)",
        "MAX_ITER": f"{policy.epochs:g} epochs x {per_epoch} ({keys.POLICY})",
        "STEPS": f"epochs: {decays}" if decays else "no decay",
        "WARMUP_ITERS": f"{keys.WARMUP_EPOCHS:g} epochs x {per_epoch}",
        "WARMUP_FACTOR": f"from LR {schedule.warmup_factor * schedule.base_lr:g} ({start})",
    }
