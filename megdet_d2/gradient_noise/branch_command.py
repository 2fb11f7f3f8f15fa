"""Runs ``megdet variance --branch``: measures the critical batch, beside the noise scale."""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tqdm import tqdm

from megdet_d2.config import load_config
from megdet_d2.engine import prepare_config
from megdet_d2.norm.registry import uses_cgbn
from megdet_d2.schedule.scaling import SCALING_RULES

from .branch import Start, train_branch
from .branch_tables import Measured, describe, write_results
from .command import check_flags, load_model, measure, turn_off_switches
from .critical_batch import Branch, compare_branches
from .estimate import WHOLE, fit
from .fixed_loss import FixedLoss

FINISHED = "branch.json"
_SETTING = "setting"


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.variance``.

    Raises:
        FileNotFoundError, ValueError: the config, a checkpoint or a flag is wrong, or the output
            has branches of another setting.
    """
    check_flags(args)
    cfg = load_config(args.config, args.opts)
    paths = args.checkpoints or ([Path(cfg.MODEL.WEIGHTS)] if cfg.MODEL.WEIGHTS else [])
    micro_batch = find_micro_batch(cfg, args.images_per_forward)
    check_branch_flags(args, paths, cfg.SOLVER.IMS_PER_BATCH)
    output = args.output or Path(cfg.OUTPUT_DIR) / "variance"
    starts = [Start(path, cfg.SOLVER.IMS_PER_BATCH) for path in paths]
    make_constant(cfg, micro_batch)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(paths[0]), str(output)
    prepare_config(cfg)
    output.mkdir(parents=True, exist_ok=True)
    runs = 1 + (len(args.factors) - 1) * len(args.rules)
    total = len(starts) * len(args.seeds) * runs * args.images
    with logged_to(output / "log.txt"):
        fixed_loss = FixedLoss(cfg, args.loss_images, micro_batch)
        with tqdm(total=total, unit=" images", dynamic_ncols=True) as bar:
            measured = [
                measure_checkpoint(cfg, args, start, fixed_loss, micro_batch, output, bar)
                for start in starts
            ]
    write_results(measured, args.tolerance, output)
    text = describe(measured, args, fixed_loss.source)
    (output / "branches.md").write_text(text)
    print(text)
    print(f"Table, branches and results: {output}/branches.md, .csv, .json; log: {output}/log.txt")


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Writes what trainings log to a file inside of a ``with``, and only warnings to the terminal.

    A training logs its whole model, and here are many trainings. Detectron2's trainer sets up a
    log on the terminal unless its logger has one.
    """
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "megdet_d2")]
    before = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.INFO)
        log.addHandler(terminal)
        log.addHandler(file)
    try:
        yield
    finally:
        for log, level in zip(loggers, before, strict=True):
            log.setLevel(level)
            log.removeHandler(terminal)
            log.removeHandler(file)
        file.close()


def find_micro_batch(cfg: CfgNode, images_per_forward: int | None) -> int:
    """Returns the images per forward pass, over which the norms of one process normalise.

    That is the BN size of a config with CGBN, or IMS_PER_BATCH / ACCUMULATION_STEPS.

    Raises:
        ValueError: it does not divide the mini-batch, or leaves AGVM no two halves of it.
    """
    bn_size, batch_size = cfg.MODEL.CGBN.BN_SIZE, cfg.SOLVER.IMS_PER_BATCH
    default = batch_size // max(1, cfg.MEGDET.ACCUMULATION_STEPS)
    if uses_cgbn(cfg) and bn_size > 0:
        default = bn_size
    micro_batch = images_per_forward or default
    if batch_size % micro_batch:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which forward passes of {micro_batch} images "
            "cannot make up; give --images-per-forward a divisor of it"
        )
    if cfg.MEGDET.OPTIMIZER == "agvm" and micro_batch == batch_size:
        raise ValueError(
            "MEGDET.OPTIMIZER is 'agvm', which compares two halves of a mini-batch, and a branch "
            f"has its {batch_size} images in one forward pass; give --images-per-forward a smaller "
            "divisor of it"
        )
    return micro_batch


def check_branch_flags(args: argparse.Namespace, paths: Sequence[Path], batch_size: int) -> None:
    """Checks the flags of ``--branch``.

    Args:
        args: of ``megdet_cli.variance``.
        paths: the checkpoints.
        batch_size: B, in images.

    Raises:
        ValueError: one is wrong. The message names the flag, its value and the fix.
    """
    if not paths:
        raise ValueError("--branch takes --checkpoints A.pth,B.pth, or MODEL.WEIGHTS A.pth")
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(
            f"--checkpoints is {','.join(map(str, paths))}: names have to differ, since they name "
            "the folders of the branches; give those of one training"
        )
    for name in ("factors", "seeds", "rules"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} is {values}; give each value once")
    if min(args.factors) < 1 or 1 not in args.factors or len(args.factors) < 2:
        raise ValueError(
            f"--factors is {args.factors}; give 1, which the others are compared with, and larger "
            "whole numbers"
        )
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds is {args.seeds}; give 0 or more")
    if unknown := set(args.rules) - set(SCALING_RULES):
        raise ValueError(
            f"--rules has {', '.join(sorted(unknown))}; use any of {', '.join(SCALING_RULES)}"
        )
    if not args.tolerance >= 0:
        raise ValueError(f"--tolerance is {args.tolerance}; give 0 or more, such as 0.01")
    for name in ("points", "loss_images"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {getattr(args, name)}; give 1 or more")
    # Then every branch has whole updates up to each point, and all have seen the same images.
    unit = 2 * args.points * math.lcm(*args.factors) * batch_size
    if args.images is None or args.images < 1 or args.images % unit:
        near = unit * max(1, round((args.images or 8 * unit) / unit))
        raise ValueError(
            f"--images is {args.images}; give a multiple of {unit} such as {near}, so that every "
            f"branch has whole updates: 2 x --points {args.points} x the factors' least common "
            f"multiple x SOLVER.IMS_PER_BATCH {batch_size}"
        )


def make_constant(cfg: CfgNode, micro_batch: int) -> None:
    """Sets the keys that branches have in common, in place: one process, a constant schedule.

    Args:
        cfg: not resolved.
        micro_batch: images per forward pass.
    """
    solver, keys = cfg.SOLVER, cfg.MEGDET
    turn_off_switches(cfg)
    keys.ACCUMULATION_STEPS = solver.IMS_PER_BATCH // micro_batch
    solver.LR_SCHEDULER_NAME, solver.STEPS, solver.WARMUP_ITERS = "WarmupMultiStepLR", (), 0
    if keys.OPTIMIZER == "agvm":  # others keep their digest, and so branches that have ended
        keys.AGVM.AFTER_WARMUP = 0  # there is no warm-up: the factors come from the checkpoint


def measure_checkpoint(
    cfg: CfgNode,
    args: argparse.Namespace,
    start: Start,
    fixed_loss: FixedLoss,
    micro_batch: int,
    output: Path,
    bar: tqdm,
) -> Measured:
    """Measures noise scale and branches of one checkpoint; those in ``output`` are not repeated.

    Raises:
        ValueError: a folder has results of another setting.
    """
    folder = output / "branches" / start.path.stem
    setting = {
        "config": digest(cfg),
        "checkpoint": start.digest,
        "micro_batch": micro_batch,
        "loss_images": fixed_loss.images,
    }
    noise_setting = setting | {"sizes": args.sizes, "pairs": args.pairs, "seed": cfg.SEED}
    noise = read_finished(folder / "noise", noise_setting)
    if noise is None:
        noise = _measure_noise(cfg, args, start, fixed_loss, micro_batch)
        write_finished(folder / "noise", noise, noise_setting)
    setting |= {"images": args.images, "points": args.points}
    branches = []
    for seed in args.seeds:  # the first seed of all factors first
        for factor in sorted(args.factors):
            for rule in args.rules if factor > 1 else [""]:
                name = "_".join([f"k{factor}", *([rule] if rule else []), f"seed{seed}"])
                bar.set_description(f"{start.path.stem} {name}")
                found = read_finished(folder / name, setting)
                if found is None:
                    shutil.rmtree(folder / name, ignore_errors=True)  # one that was stopped
                    done, images = bar.n, factor * cfg.SOLVER.IMS_PER_BATCH
                    branch = train_branch(
                        cfg, start, factor, rule or "none", seed, args.images, args.points,
                        fixed_loss, folder / name, functools.partial(bar.update, images),
                    )  # fmt: skip
                    write_finished(folder / name, asdict(branch), setting)
                    bar.update(done + args.images - bar.n)  # a diverged one is shorter
                else:
                    branch = Branch(**{**found, "losses": tuple(found["losses"])})
                    bar.update(args.images)
                branches.append(branch)
    return Measured(
        start,
        noise["loss"],
        noise["noise_scale"],
        tuple(noise["noise_interval"]),
        branches,
        {rule: compare_branches(branches, rule) for rule in args.rules},
    )


def _measure_noise(
    cfg: CfgNode, args: argparse.Namespace, start: Start, fixed_loss: FixedLoss, micro_batch: int
) -> dict[str, Any]:
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(start.path)
    model = load_model(cfg)
    loss = fixed_loss(model)
    result = fit(measure(cfg, model, args.sizes, args.pairs, micro_batch)[WHOLE])
    return {
        "loss": loss,
        "noise_scale": result.noise_scale,
        "noise_interval": result.noise_interval,
    }


def digest(cfg: CfgNode) -> str:
    """Returns a digest of the keys that change a branch: all but paths and the loader's workers."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "", ""
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.PREFETCH_FACTOR, cfg.SEED = 0, 2, -1
    return hashlib.sha256(cfg.dump().encode()).hexdigest()[:16]


def read_finished(folder: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the results that ``write_finished`` has written; None if there are none.

    Raises:
        ValueError: they are of another setting.
    """
    path = folder / FINISHED
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    before = found.pop(_SETTING)
    changed = [key for key in setting if before.get(key) != setting[key]]
    if changed:
        listed = ", ".join(f"{key} was {before.get(key)} and is {setting[key]}" for key in changed)
        raise ValueError(f"{path} is of another setting: {listed}; give another --output")
    return found


def write_finished(folder: Path, values: dict[str, Any], setting: dict[str, Any]) -> None:
    """Writes results and their setting, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{FINISHED}.tmp"
    unfinished.write_text(json.dumps({**values, _SETTING: setting}, indent=1) + "\n")
    unfinished.replace(folder / FINISHED)
