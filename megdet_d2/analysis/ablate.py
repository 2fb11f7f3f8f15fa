"""``megdet ablate``: trains every row of an ablation over seeds, and tabulates.

A training that is complete is not repeated, one that was stopped goes on, and one that failed is a
result. On a cluster the launch lines are printed, or handed to the scheduler, and the same command
with ``--collate`` makes the table of what has come back.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .collate import FAILURE, Result, collate, read_result
from .rows import GPUS_PER_MACHINE, Row, read_rows
from .training import Training, train_arguments

TAKES_OVERRIDES = True
POLL_SECONDS = 1.0
SETTINGS = "settings.json"


def folder_of(output: Path, row: Row, seed: int) -> Path:
    """OUTPUT_DIR of a row's training with this seed."""
    return output / row.name / f"seed{seed}"


def launch_line(row: Row, seed: int, folder: Path, script: str, gpus_per_machine: int) -> str:
    """One shell line that starts a row on a cluster, on every machine of it.

    ``$HOST0`` is the first machine's name; with one machine there is no need of it.
    """
    machines, per_machine = _machines(row, gpus_per_machine)
    if machines == 1:
        where = "--standalone"
    else:
        where = f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint $HOST0:29500"
        # Two trainings whose first machine is the same one do not meet in one rendezvous.
        where += f" --rdzv-id {shlex.quote(f'{row.name}-seed{seed}')}"
    words = shlex.join([script, *train_arguments(row, seed, folder)])
    return f"torchrun {where} --nproc-per-node {per_machine} {words}"


def _machines(row: Row, gpus_per_machine: int) -> tuple[int, int]:
    per_machine = min(row.processes, gpus_per_machine)
    if row.processes % per_machine:
        raise ValueError(
            f"row {row.name} is of {row.processes} processes (MEGDET.ABLATION.GPUS), no whole "
            f"number of machines of {gpus_per_machine}: change --gpus-per-machine"
        )
    return row.processes // per_machine, per_machine


def run_all(
    rows: list[Row],
    seeds: list[int],
    output: Path,
    script: str,
    on_cpu: bool,
    retry: bool,
    jobs: int = 1,
    baseline: str | None = None,
) -> list[Result]:
    """Trains what is not complete, the first seed of every row first; the table after each.

    Args:
        jobs: trainings at a time.
        baseline: the row that the table compares with.
    """
    pending, results = [], {}
    for seed, row in itertools.product(seeds, rows):
        folder = folder_of(output, row, seed)
        if retry:
            (folder / FAILURE).unlink(missing_ok=True)
        results[row.name, seed] = read_result(row, seed, folder)
        if _is_open(results[row.name, seed], retry):
            pending.append((row, seed, folder))
    total = sum(row.images for row, _, _ in pending)
    number, running, images = len(pending), [], 0  # images of the trainings that have ended
    with (
        _sigterm_exits(),
        tqdm(total=total, unit=" images", smoothing=0.05, dynamic_ncols=True) as bar,
    ):
        try:
            while pending or running:
                while pending and len(running) < jobs:
                    running.append(Training(*pending.pop(0), script, on_cpu, jobs))
                    bar.set_description(_under_way(running, number - len(pending), number))
                time.sleep(POLL_SECONDS)
                for training in [t for t in running if t.ended()]:
                    running.remove(training)
                    row, seed = training.row, training.seed
                    result = read_result(row, seed, training.folder)
                    results[row.name, seed] = result
                    done = row.images if result.status == "done" else training.images_done()
                    images += done
                    bar.total -= row.images - done  # a failed row is shorter than planned
                    if result.status != "done":
                        bar.write(
                            f"{row.name}, seed {seed}: {result.status}: {result.reason}", sys.stderr
                        )
                    collate(rows, list(results.values()), output, _title(rows), baseline)
                bar.update(images + sum(t.images_done() for t in running) - bar.n)
        finally:  # we are being stopped: the trainings are not to go on alone
            for training in running:
                training.stop()
            for training in running:
                training.wait()
    return list(results.values())


def _is_open(result: Result, retry: bool) -> bool:
    return result.status == "unfinished" or (retry and result.status == "failed")


def _under_way(running: list[Training], number: int, of: int) -> str:
    return f"{number}/{of} " + ", ".join(f"{t.row.name} seed {t.seed}" for t in running)


@contextlib.contextmanager
def _sigterm_exits():
    """A scheduler's SIGTERM ends the training under way too, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _title(rows: list[Row]) -> str:
    return f"`{shlex.join(['megdet', *sys.argv[1:]])}`, {len(rows)} rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder of configs, or a YAML list of rows")
    add("--seeds", type=_integers, default=[1], metavar="1,2,3", help="one training a row each")
    add("--output", type=Path, help="default: output/ablations/SOURCE's name")
    add("--reduced", action="store_true", help="the rows' ratios on the demo's model, on CPU")
    cores = os.cpu_count() or 1
    add("--cores", type=int, default=cores, help=f"for --reduced, --jobs (default {cores})")
    add("--jobs", type=int, default=1, help="on CPU: trainings at a time, sharing the cores")
    add("--rows", metavar="PATTERN", default="*", help='only the rows that fit: "0[6-9]*,1*"')
    add("--baseline", metavar="ROW", help="give each row's gain in AP on this one, seed by seed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--print", action="store_true", help="one launch line a training, and no more")
    how.add_argument(
        "--submit",
        metavar="COMMAND",
        help="run this for each training instead, with {line}, {machines}, {gpus} (of a machine) "
        "and {name} filled in: docs/experiments.md has one for SLURM",
    )
    how.add_argument("--collate", action="store_true", help="only make the table again")
    add("--gpus-per-machine", type=int, default=GPUS_PER_MACHINE, help="default 8")
    add("--script", default="train_net.py", help="what to train with (default train_net.py)")
    add("--retry", action="store_true", help="train again what has failed")


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """The command."""
    if args.gpus_per_machine < 1:
        raise ValueError(f"--gpus-per-machine is {args.gpus_per_machine}; give 1 or more")
    on_cpu = args.reduced or not torch.cuda.is_available()
    if not 1 <= args.jobs <= (args.cores if on_cpu else 1):
        raise ValueError(
            f"--jobs is {args.jobs}; trainings at a time are for CPUs, one a core at the most: "
            f"--cores is {args.cores}"
        )
    cores = args.cores // args.jobs if args.reduced else 0
    rows = read_rows(args.source, args.opts, cores, args.gpus_per_machine, args.rows)
    if args.baseline is not None and args.baseline not in [row.name for row in rows]:
        raise ValueError(
            f"--baseline is {args.baseline}, and the rows are {', '.join(r.name for r in rows)}"
        )
    if args.jobs > 1:
        _check_cores(rows, args.jobs, args.cores)
    stem = Path(args.source).resolve().stem + ("_reduced" if args.reduced else "")
    output = args.output or Path("output/ablations") / stem
    if not args.print:
        _check_settings(output, {"reduced": args.reduced, "overrides": args.opts})
    if args.print or args.submit:
        for seed, row in itertools.product(args.seeds, rows):
            folder = folder_of(output, row, seed)
            line = launch_line(row, seed, folder, args.script, args.gpus_per_machine)
            if args.print:
                print(line)
            elif _is_open(read_result(row, seed, folder), args.retry):
                _submit(args.submit, line, row, seed, args.gpus_per_machine)
        return
    if args.collate:
        results = [
            read_result(row, seed, folder_of(output, row, seed))
            for seed, row in itertools.product(args.seeds, rows)
        ]
    elif not Path(args.script).is_file():
        raise FileNotFoundError(
            f"There is no {args.script}: run this in a checkout of megdet_d2, or give --script"
        )
    else:
        if not on_cpu:
            _check_gpus(rows)
        results = run_all(
            rows,
            args.seeds,
            output,
            args.script,
            on_cpu=args.reduced,
            retry=args.retry,
            jobs=args.jobs,
            baseline=args.baseline,
        )
    print(collate(rows, results, output, _title(rows), args.baseline))
    print(f"\nTable, numbers and plot: {output}/results.md, .csv, .png, and runs.csv")


def _check_cores(rows: list[Row], jobs: int, cores: int) -> None:
    for row in rows:
        if jobs * row.processes > cores:
            raise ValueError(
                f"--jobs is {jobs}, and row {row.name} has {row.processes} processes, so that "
                f"{cores} cores are too few: lower it, or add MEGDET.ABLATION.GPUS {cores // jobs}"
            )


def _check_gpus(rows: list[Row]) -> None:
    gpus = torch.cuda.device_count()
    for row in rows:
        if row.processes > gpus:
            raise ValueError(
                f"row {row.name} is for {row.processes} GPUs, and this machine has {gpus}: choose "
                "others by --rows, give them to a scheduler by --submit, or add "
                f"MEGDET.ABLATION.GPUS {gpus}"
            )


def _check_settings(output: Path, settings: dict) -> None:
    """Refuses to take another command's trainings for this one's."""
    path = output / SETTINGS
    if path.is_file() and (before := json.loads(path.read_text())) != settings:
        raise ValueError(
            f"{output} holds trainings of {before}, and these are of {settings}: give another "
            "--output"
        )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n")


def _submit(template: str, line: str, row: Row, seed: int, gpus_per_machine: int) -> None:
    machines, per_machine = _machines(row, gpus_per_machine)
    try:
        command = template.format(
            line=shlex.quote(line),
            machines=machines,
            gpus=per_machine,
            name=shlex.quote(f"{row.name}-seed{seed}"),
        )
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"--submit {template}: {error!r}; it may have {{line}}, {{machines}}, {{gpus}} and "
            "{name}, and doubles every other brace: ${{HOME}}"
        ) from None
    try:
        subprocess.run(command, shell=True, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{command} ended with exit code {error.returncode}") from None
