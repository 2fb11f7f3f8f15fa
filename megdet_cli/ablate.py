"""Trains every row of an ablation over seeds and tabulates the results.

A finished training is not repeated, and a stopped one goes on where it stopped. One that diverged
is a result, "failed"; one that another error ended is trained again. For a cluster, --print and
--submit make one launch line per training; --collate writes the table when they have ended.

  megdet ablate configs/ablations/table3 --reduced
  megdet ablate configs/ablations/table3 --seeds 1,2,3 --print
"""

import argparse
import os
from pathlib import Path

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of configs, or YAML file with a list of rows")
    add(
        "--seeds",
        type=_integers,
        default=[1],
        metavar="1,2,3",
        help="train each row once per seed (default 1)",
    )
    add("--output", type=Path, help="folder for the results (default output/ablations/NAME)")
    add(
        "--reduced",
        action="store_true",
        help="train a small detector on the embedded digits, on CPUs, with the ratios of the rows",
    )
    base = "configs/ablations/Base-study.yaml"
    add(
        "--reduced-base",
        metavar="FILE",
        type=Path,
        default=Path(base),
        help=f"the small detector of --reduced (default {base})",
    )
    cores = os.cpu_count() or 1
    add(
        "--cores",
        metavar="N",
        type=int,
        default=cores,
        help=f"CPU cores that --reduced and --jobs may use (default {cores}, all)",
    )
    add(
        "--jobs",
        metavar="N",
        type=int,
        default=1,
        help="on CPUs, run N trainings at the same time (default 1)",
    )
    add(
        "--rows",
        metavar="PATTERN",
        default="*",
        help='train only the rows whose names match, for example "0[6-9]*,1*"',
    )
    add("--baseline", metavar="ROW", help="add each row's gain in AP over this row, seed by seed")
    add(
        "--margin",
        metavar="AP",
        type=float,
        default=0.5,
        help="with --baseline, test whether a row is equal to it within this AP (default 0.5)",
    )
    add(
        "--ledger",
        metavar="FILE",
        type=Path,
        help="CSV file of finished trainings; those in it are not repeated, new ones are added",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--print", action="store_true", help="print one launch line per training; train nothing"
    )
    how.add_argument(
        "--submit",
        metavar="COMMAND",
        help="run this shell command for each training instead of training here; it may contain "
        "{line}, {machines}, {gpus} (per machine) and {name} (docs/experiments.md has one for "
        "SLURM)",
    )
    how.add_argument("--collate", action="store_true", help="write the table again; train nothing")
    add("--gpus-per-machine", type=int, default=8, help="GPUs of each machine (default 8)")
    add(
        "--script",
        help="training script (default train_net.py of this folder; without one, megdet train)",
    )
    add("--retry", action="store_true", help="also train again what diverged")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from megdet_d2.ablation import command

    command.run(args)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
