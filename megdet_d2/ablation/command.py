"""``megdet ablate``: trains every row of an ablation over seeds, and tabulates.

A training that is complete is not repeated, one that was stopped goes on, and one that failed is a
result. On a cluster the launch lines are printed, or handed to the scheduler, and the same command
with ``--collate`` makes the table of what has come back.
"""

import argparse
import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from megdet_d2.report.run import read_config

from .cluster import launch_line, submit
from .local import Training
from .reduced import reduce_rows
from .results import FAILURE, Result, collate, read_result
from .rows import Row, differences, read_rows

POLL_SECONDS = 1.0
# Of a training's config, what says nothing of its result, or is not the row's.
MAY_DIFFER = (
    "MEGDET.ABLATION.",
    "MEGDET.ACCUMULATION_STEPS",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SEED",
    "VERSION",
)


def folder_of(output: Path, row: Row, seed: int) -> Path:
    """OUTPUT_DIR of a row's training with this seed."""
    return output / row.name / f"seed{seed}"


def run_all(
    rows: list[Row],
    seeds: list[int],
    output: Path,
    script: str,
    on_cpu: bool,
    retry: bool,
    jobs: int,
    tabulate: Callable[[], str],
) -> None:
    """Trains what is not complete, the first seed of every row first.

    Args:
        jobs: trainings at a time.
        tabulate: is called whenever one has ended.
    """
    pending = []
    for seed, row in itertools.product(seeds, rows):
        folder = folder_of(output, row, seed)
        if retry:
            (folder / FAILURE).unlink(missing_ok=True)
        if _is_open(read_result(row, seed, folder), retry):
            pending.append((row, seed, folder))
    total = sum(row.images for row, _, _ in pending)
    number, running, images = len(pending), [], 0  # images of the trainings that have ended
    with (
        _signals_exit(),
        tqdm(total=total, unit=" images", smoothing=0.05, dynamic_ncols=True) as bar,
    ):
        try:
            while pending or running:
                while pending and len(running) < jobs:
                    row, seed, folder = pending.pop(0)
                    try:
                        running.append(Training(row, seed, folder, script, on_cpu, jobs))
                    except BlockingIOError:
                        bar.write(f"{folder}: another process trains it; left to that", sys.stderr)
                        bar.total -= row.images
                    bar.set_description(_under_way(running, number - len(pending), number))
                time.sleep(POLL_SECONDS)
                for training in [t for t in running if t.poll()]:
                    running.remove(training)
                    row, seed = training.row, training.seed
                    result = read_result(row, seed, training.folder)
                    done = row.images if result.status == "done" else training.images_done()
                    images += done
                    bar.total -= row.images - done  # a failed row is shorter than planned
                    if result.status != "done":
                        bar.write(
                            f"{row.name}, seed {seed}: {result.status}: {result.reason}", sys.stderr
                        )
                    tabulate()
                bar.update(images + sum(t.images_done() for t in running) - bar.n)
        finally:  # we are being stopped: the trainings are not to go on alone
            for training in running:
                training.stop()
            for training in running:
                training.wait()


def _is_open(result: Result, retry: bool) -> bool:
    return result.status == "unfinished" or (retry and result.status == "failed")


def _under_way(running: list[Training], number: int, of: int) -> str:
    return f"{number}/{of} " + ", ".join(f"{t.row.name} seed {t.seed}" for t in running)


@contextlib.contextmanager
def _signals_exit():
    """A scheduler's SIGTERM, or a closed terminal, ends the trainings too, as Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.getsignal(n) for n in numbers}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> None:
    """The command."""
    on_cpu = args.reduced or not torch.cuda.is_available()
    _check_flags(args, on_cpu)
    stem = Path(args.source).resolve().stem + ("_reduced" if args.reduced else "")
    output = args.output or Path("output/ablations") / stem
    rows = _read(args, args.rows)
    # What earlier commands have trained into the same folder stays in the table.
    trained = {path.parent.name for path in output.glob("*/seed*")}
    others = sorted(trained - {row.name for row in rows})
    table = _read(args, ",".join([args.rows, *others])) if others else rows
    names = [row.name for row in table]
    if args.baseline is not None and args.baseline not in names:
        raise ValueError(f"--baseline is {args.baseline}, and the rows are {', '.join(names)}")
    if args.print:
        for seed, row in itertools.product(args.seeds, rows):
            folder = folder_of(output, row, seed)
            print(launch_line(row, seed, folder, args.script, args.gpus_per_machine))
        return
    check_same(table, output)
    if args.submit:
        trainings = [
            (row, seed, folder_of(output, row, seed))
            for seed, row in itertools.product(args.seeds, rows)
        ]
        pending = [t for t in trainings if _is_open(read_result(*t), args.retry)]
        return submit(args.submit, pending, args.script, args.gpus_per_machine)

    def tabulate() -> str:
        seeds = sorted({*args.seeds, *find_seeds(table, output)})
        results = [
            read_result(row, seed, folder_of(output, row, seed))
            for seed, row in itertools.product(seeds, table)
        ]
        title = f"`{args.line}`, {len(table)} rows"
        return collate(table, results, output, title, args.baseline)

    if not args.collate:
        if not Path(args.script).is_file():
            raise FileNotFoundError(
                f"There is no {args.script}: run this in a checkout of megdet_d2, or give --script"
            )
        if not on_cpu:
            _check_gpus(rows)
        if args.jobs > 1:
            _check_cores(rows, args.jobs, args.cores)
        run_all(
            rows, args.seeds, output, args.script, on_cpu, args.retry, args.jobs, tabulate
        )  # fmt: skip
    print(tabulate())
    print(f"\nTable, numbers and plot: {output}/results.md, .csv, .png, and runs.csv")


def _check_flags(args: argparse.Namespace, on_cpu: bool) -> None:
    if args.gpus_per_machine < 1:
        raise ValueError(f"--gpus-per-machine is {args.gpus_per_machine}; give 1 or more")
    if not 1 <= args.jobs <= (args.cores if on_cpu else 1):
        raise ValueError(
            f"--jobs is {args.jobs}; trainings at a time are for CPUs, one a core at the most: "
            f"--cores is {args.cores}"
        )
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"--seeds is {args.seeds}; give different ones, from 0")


def _read(args: argparse.Namespace, patterns: str) -> list[Row]:
    overrides = () if args.reduced else args.opts
    rows = read_rows(args.source, overrides, args.gpus_per_machine, patterns)
    return reduce_rows(rows, args.cores // args.jobs, args.opts) if args.reduced else rows


def find_seeds(rows: list[Row], output: Path) -> set[int]:
    """Of the trainings that ``output`` has of the rows."""
    folders = [path for row in rows for path in (output / row.name).glob("seed*")]
    return {int(path.name[4:]) for path in folders if path.name[4:].isdecimal()}


def check_same(rows: list[Row], output: Path) -> None:
    """Refuses to take trainings of another config for the rows'.

    Raises:
        ValueError: which one, the key and both values.
    """
    for seed, row in itertools.product(find_seeds(rows, output), rows):
        folder = folder_of(output, row, seed)
        try:
            trained = read_config(folder)
        except (FileNotFoundError, ValueError):  # not begun, or cut off by a full disk
            continue
        for key, (before, now) in differences(trained, row.cfg).items():
            if not key.startswith(MAY_DIFFER):
                raise ValueError(
                    f"{folder} is a training with {key} {before}, and row {row.name} now has "
                    f"{now}: give another --output, or remove that folder"
                )


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
