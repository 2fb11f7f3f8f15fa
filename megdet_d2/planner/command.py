"""Runs ``megdet plan``: prints back-tests, or a simulated training on growing clusters."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from . import epochs, gloo, mlperf, simulation_back_test, table3, zoo
from .back_test import BackTest, to_text
from .epochs import PRESETS, EpochModel
from .failures import Failures
from .plots import plot
from .scaling import Point, Setup, norm_against_compute, sweep
from .step_time import Work
from .tables import to_norm_table, to_points_table, to_shares_table
from .topology import NVLINK, PCIE, Topology, network

SMALLEST_BN_SIZE = 16
"""The paper's AP falls below it."""
LARGE_SHARE = 0.1
"""Of the time, from which checkpoints are worth a warning."""


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.plan``.

    Raises:
        ValueError: a number makes no sense, or no number of machines works.
    """
    if args.back_test:
        tests = back_tests()
        print(
            json.dumps([to_json(test) for test in tests], indent=1)
            if args.json
            else "\n\n".join(map(to_text, tests))
        )
        return
    setup = to_setup(args)
    points, refused = sweep(setup, args.machines)
    if not points:
        raise ValueError("no number of machines works:\n" + "\n".join(refused))
    most = max(point.gpus for point in points) // args.gpus
    norm = norm_against_compute(setup, most) if setup.work.layers else []
    if args.json:
        rows = [asdict(p) | {"hours": p.hours, "shares": p.shares} for p in points]
        print(json.dumps({"points": rows, "norm": norm, "refused": refused}, indent=1))
    else:
        print(introduction(args, setup))
        print("\n" + to_points_table(points))
        print("\nShares of the simulated time:\n\n" + to_shares_table(points))
        if norm:
            print("\nCGBN's all-reduces in one micro-batch, by size of a BN group:\n")
            print(to_norm_table(norm, args.gpus))
        print("\n".join(["", *refused, *warnings(args, setup, points)]).rstrip())
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = plot(points, norm, args.output / "simulation.png")
        if not args.json:
            print(f"Plot: {path}")


def back_tests() -> list[BackTest]:
    """Returns all back-tests, of time and of epochs."""
    time = [table3.back_test(), mlperf.back_test(), simulation_back_test.back_test()]
    own = [gloo.back_test()] if gloo.measured() else []
    return [*time, zoo.back_test(), *own, *epochs.back_tests()]


def to_json(test: BackTest) -> dict[str, Any]:
    """Returns a back-test as lists and numbers, with the error of each row."""
    rows = [asdict(row) | {"error": row.error} for row in test.rows]
    return asdict(test) | {"rows": rows, "summary": test.summary(), "meets_goal": test.meets_goal}


def to_setup(args: argparse.Namespace) -> Setup:
    """Returns the training that the flags describe.

    Raises:
        ValueError: names the flag, its value and the fix.
    """
    for flag in ("images_per_gpu", "steps", "layers", "parameters", "gradient_bytes"):
        if getattr(args, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is {getattr(args, flag):g}; give 1 or more")
    group, rest = divmod(args.bn_size, args.images_per_gpu)
    if args.bn_size < 0 or rest:
        raise ValueError(
            f"--bn-size {args.bn_size} is no multiple of --images-per-gpu {args.images_per_gpu}; "
            "give a multiple, or 0 for frozen norms"
        )
    if not args.network_gbit > 0:
        raise ValueError(f"--network-gbit is {args.network_gbit:g}; give a number above 0")
    variation = mlperf.variation()[0] if args.variation is None else args.variation
    work = Work(
        _seconds(args)[0],
        args.images_per_gpu,
        variation=variation,
        gradient_bytes=args.parameters * args.gradient_bytes,
        layers=args.layers if group else 0,
        group=max(1, group),
        loader=args.loader,
    )
    inside = NVLINK if "SXM" in args.hardware else PCIE
    preset = PRESETS[args.epochs_like]
    least = preset.least if args.least_epochs is None else args.least_epochs
    critical = preset.critical if args.critical_batch is None else args.critical_batch
    return Setup(
        work,
        Topology(1, args.gpus, inside, network(args.network_gbit)),
        EpochModel(least, critical, preset.source),
        replace(
            Failures(args.mtbf_hours, args.restart_seconds, save=args.save_seconds),
            checkpoint_period=args.checkpoint_period or 1,
        ),
        checkpoint_period=args.checkpoint_period,
        target_batch=args.target_batch,
        steps=args.steps,
        seed=args.seed,
    )


def introduction(args: argparse.Namespace, setup: Setup) -> str:
    """Returns what the numbers assume, and where seconds per image are from."""
    return (
        f"{args.gpus} GPUs per machine, {args.images_per_gpu} images per GPU, "
        f"{1e3 * setup.work.seconds_per_image:.2f} ms per image ({_seconds(args)[1]}), variation "
        f"{setup.work.variation:.2f}; E(B) = {setup.epochs.least:g} (1 + B / "
        f"{setup.epochs.critical:g}) epochs."
    )


def warnings(args: argparse.Namespace, setup: Setup, points: Sequence[Point]) -> list[str]:
    """Returns sentences about settings that train worse or waste time."""
    found = [
        f"However large the batch, the target takes at least "
        f"{setup.epochs.least_iterations(setup.images):,.0f} iterations."
    ]
    if 0 < args.bn_size < SMALLEST_BN_SIZE:
        found.append(f"BN size {args.bn_size} is under {SMALLEST_BN_SIZE}: the AP falls (Table 3).")
    if points[-1].shares["saving"] > LARGE_SHARE:
        found.append(
            f"Checkpoints take {points[-1].shares['saving']:.0%} of the time on "
            f"{points[-1].gpus:,} GPUs: save less often, by --checkpoint-period."
        )
    return found


def _seconds(args: argparse.Namespace) -> tuple[float, str]:
    if args.seconds_per_image is not None:
        return args.seconds_per_image, "--seconds-per-image"
    known = mlperf.hardware_seconds()
    if args.hardware not in known:
        raise ValueError(
            f"--hardware {args.hardware} is not in MLPerf's table; use one of {', '.join(known)}, "
            "or give --seconds-per-image"
        )
    seconds, newest = known[args.hardware]
    return seconds, f"NVIDIA's Mask R-CNN on {args.hardware} in MLPerf {newest}; others are slower"
