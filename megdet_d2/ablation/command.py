"""Runs ``megdet ablate``: reads the rows, trains the jobs that are not finished, tabulates."""

import argparse
from pathlib import Path

import torch

from megdet_d2.report.run import read_config

from .cluster import launch_line, submit
from .job import Job, find_seeds, make_jobs
from .ledger import Ledger
from .local import CONSOLE, train_all
from .reduced import reduce_rows
from .results import FAILURE, Result, collate, read_result
from .rows import Row, differences, read_rows, statistics_images

TRAIN_NET = "train_net.py"
# Config keys in which a finished training may differ from its row: they do not change the result,
# or are different for each job.
MAY_DIFFER = (
    "MEGDET.ABLATION.",
    "MEGDET.ACCUMULATION_STEPS",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SEED",
    "VERSION",
)


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.ablate``.

    Raises:
        FileNotFoundError, ValueError: a wrong argument, row or folder, before anything is trained.
        SystemExit: a training ended by an error that is no result of its row.
    """
    on_cpu = args.reduced or not torch.cuda.is_available()
    _check_flags(args, on_cpu)
    stem = Path(args.source).resolve().stem + ("_reduced" if args.reduced else "")
    output = args.output or Path("output/ablations") / stem
    program = _program(args.script)
    rows = _read(args, args.rows)
    jobs = make_jobs(rows, args.seeds, output)
    # The table keeps the rows that earlier commands have trained into the same folder.
    trained = {path.parent.name for path in output.glob("*/seed*")}
    others = sorted(trained - {row.name for row in rows})
    table = _read(args, ",".join([args.rows, *others])) if others else rows
    names = [row.name for row in table]
    if args.baseline is not None and args.baseline not in names:
        raise ValueError(f"--baseline is {args.baseline}, and the rows are {', '.join(names)}")
    if args.print:
        for job in jobs:
            print(launch_line(job, program, args.gpus_per_machine))
        return
    check_same(table, output)
    ledger = Ledger(args.ledger) if args.ledger else None

    def every_job() -> list[Job]:
        seeds = {*args.seeds, *find_seeds(table, output), *(ledger.seeds(table) if ledger else ())}
        return make_jobs(table, sorted(seeds), output)

    if ledger:
        for job in every_job():  # before a training, not after it
            ledger.find(job)
    if args.submit:
        pending = unfinished(jobs, args.retry, ledger)
        return submit(args.submit, pending, program, args.gpus_per_machine)

    def tabulate() -> str:
        every = every_job()
        results = [_result(job, ledger) for job in every]
        if ledger:
            for job, result in zip(every, results, strict=True):
                ledger.add(job, result)
        title = f"`{args.line}`, {len(table)} rows"
        return collate(table, results, output, title, args.baseline, args.margin)

    if not args.collate:
        if args.script and not Path(args.script).is_file():
            raise FileNotFoundError(f"There is no {args.script}: give --script an existing path")
        if not on_cpu:
            _check_gpus(rows)
        if args.jobs > 1:
            _check_cores(rows, args.jobs, args.cores)
        pending = unfinished(jobs, args.retry, ledger)
        for job in pending:
            (job.folder / FAILURE).unlink(missing_ok=True)
        train_all(pending, program, on_cpu, args.jobs, tabulate)
    print(tabulate())
    print(f"\nTable, numbers and plot: {output}/results.md, .csv, .png, and runs.csv")
    if args.collate:
        return
    ended = [(job, _result(job, ledger)) for job in jobs]
    broken = [(job, result) for job, result in ended if result.status == "error"]
    if broken:
        job, result = broken[0]
        raise SystemExit(
            f"{len(broken)} of {len(jobs)} trainings ended by an error and are not counted, first "
            f"{job.name}: {result.reason}\nIts output is in {job.folder / CONSOLE}. Fix the cause "
            "and run the same command again. It continues these trainings."
        )


def _program(script: str | None) -> list[str]:
    """Returns the words after ``python`` that start a training."""
    if script is None and not Path(TRAIN_NET).is_file():
        return ["-m", "megdet_cli", "train"]
    return [script or TRAIN_NET]


def unfinished(jobs: list[Job], retry: bool, ledger: Ledger | None = None) -> list[Job]:
    """Returns the jobs that are still to be trained, with ``retry`` also those that have failed."""
    statuses = {"unfinished", "error"} | ({"failed"} if retry else set())
    return [job for job in jobs if _result(job, ledger).status in statuses]


def _result(job: Job, ledger: Ledger | None) -> Result:
    """Returns the result in the job's folder, or that in the ledger if the folder has no end."""
    result = read_result(job)
    if ledger is None or result.status == "done":
        return result
    return ledger.find(job) or result


def check_same(rows: list[Row], output: Path) -> None:
    """Checks that the trainings under ``output`` have the configs of the rows.

    Raises:
        ValueError: names the folder, the key and both values.
    """
    for job in make_jobs(rows, find_seeds(rows, output), output):
        try:
            trained = read_config(job.folder)
        except (FileNotFoundError, ValueError):  # not started yet, or cut off by a full disk
            continue
        may_differ: tuple[str, ...] = MAY_DIFFER
        if job.row.cfg.MEGDET.AUTO_SUBLINEAR:  # then the training chooses
            may_differ += ("MODEL.SUBLINEAR.ENABLED",)
        changed = {
            key: values
            for key, values in differences(trained, job.row.cfg).items()
            if not key.startswith(may_differ)
        }
        if not job.row.cfg.MEGDET.AUTO_MICRO_BATCH:
            before = statistics_images(
                trained, trained.MEGDET.ABLATION.GPUS, job.row.gpus_per_machine
            )
            if before != job.row.statistics_images:
                changed["batch statistics over"] = (before, job.row.statistics_images)
        if changed:
            key, (before, now) = next(iter(changed.items()))
            raise ValueError(
                f"{job.folder} is a training with {key} {before}, and row {job.row.name} now "
                f"has {now}: give another --output, or remove that folder"
            )


def _read(args: argparse.Namespace, patterns: str) -> list[Row]:
    overrides = () if args.reduced else args.opts
    rows = read_rows(args.source, overrides, args.gpus_per_machine, patterns)
    if not args.reduced:
        return rows
    return reduce_rows(rows, args.cores // args.jobs, args.opts, args.reduced_base)


def _check_flags(args: argparse.Namespace, on_cpu: bool) -> None:
    if args.gpus_per_machine < 1:
        raise ValueError(f"--gpus-per-machine is {args.gpus_per_machine}; give 1 or more")
    if not 1 <= args.jobs <= (args.cores if on_cpu else 1):
        raise ValueError(
            f"--jobs is {args.jobs}; several trainings at a time are for CPUs, each needs a core, "
            f"and --cores is {args.cores}"
        )
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"--seeds is {args.seeds}; give different ones, from 0")


def _check_cores(rows: list[Row], jobs: int, cores: int) -> None:
    for row in rows:
        if jobs * row.processes > cores:
            raise ValueError(
                f"--jobs is {jobs}, and row {row.name} has {row.processes} processes, which is too "
                f"much for {cores} cores: lower it, or add MEGDET.ABLATION.GPUS {cores // jobs}"
            )


def _check_gpus(rows: list[Row]) -> None:
    gpus = torch.cuda.device_count()
    for row in rows:
        if row.processes > gpus:
            raise ValueError(
                f"row {row.name} is for {row.processes} GPUs, and this machine has {gpus}: choose "
                "others by --rows, submit to a scheduler by --submit, or add "
                f"MEGDET.ABLATION.GPUS {gpus}"
            )
