"""Keeps a CSV file of finished trainings, so that a study can go on without their folders.

A study of many hours may move to another machine. Each training that ends adds a line. A training
with a line is not repeated; the table takes its result from the line.
"""

import csv
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megdet_d2.config import load_config
from megdet_d2.report.run import Run
from megdet_d2.schedule.build import images_per_epoch

from .job import Job
from .results import Result
from .rows import Row, differences, plain

# Keys that do not change the result, or are different for each job.
LEFT_OUT = (
    "DATALOADER.CACHE_MB",
    "DATALOADER.NUM_WORKERS",
    "MEGDET.ABLATION.",
    "MEGDET.ACCUMULATION_STEPS",
    "MEGDET.RESOLVED.",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SEED",
    "SOLVER.CHECKPOINT_PERIOD",
    "VERSION",
)
_FOLDERS = re.compile(r"(?<![\w.~])/(?:[^\s/,;:'\"]+/)+")
_RESULT = [field.name for field in fields(Result) if field.name not in ("row", "seed")]
COLUMNS = (
    "row", "seed", "norm", "batch", "bn_size", "policy", "images", "iterations", "lr", "failed",
    *_RESULT, "ap_by_epoch", "config",
)  # fmt: skip


def without_folders(text: str) -> str:
    """Returns a text whose absolute paths are names of files, for CSV files that are shared."""
    return _FOLDERS.sub("", text)


def config_digest(row: Row) -> str:
    """Returns 12 hexadecimal digits that identify the values in which a row differs from defaults.

    A new key in a later version does not change them.
    """
    keys = differences(load_config(), row.cfg)
    kept = {key: value for key, (_, value) in keys.items() if not key.startswith(LEFT_OUT)}
    pairs = [(key, plain(value)) for key, value in sorted(kept.items())]
    if row.statistics_images:
        pairs.append(("batch statistics over", list(row.statistics_images)))
    text = repr(pairs)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Ledger:
    """A CSV file with one line per training that is done or has failed.

    Args:
        path: the file; it may not exist yet.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[tuple[str, int], dict[str, str]] = {}
        if not path.is_file():
            return
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(
                    f"--ledger {path} has the columns {reader.fieldnames}; give a file with "
                    f"{', '.join(COLUMNS)}, or a new one"
                )
            for line in reader:
                self._lines[line["row"], int(line["seed"])] = line

    def find(self, job: Job) -> Result | None:
        """Returns the result in the line of a job, or None without a line.

        Raises:
            ValueError: the job was trained with another config than the row now has.
        """
        line = self._lines.get((job.row.name, job.seed))
        if line is None:
            return None
        digest = config_digest(job.row)
        if line["config"] != digest:
            raise ValueError(
                f"{self.path}: {job.row.name}, seed {job.seed}, was trained with the config "
                f"{line['config']}, and the row now has {digest}: give another --ledger, or remove "
                "that line"
            )
        numbers = {
            name: float(line[name]) if line[name] else None
            for name in _RESULT
            if name not in ("status", "reason")
        }
        return Result(job.row.name, job.seed, line["status"], line["reason"], **numbers)

    def seeds(self, rows: Sequence[Row]) -> set[int]:
        """Returns the seeds that have a line for any of the rows."""
        names = {row.name for row in rows}
        return {seed for name, seed in self._lines if name in names}

    def add(self, job: Job, result: Result) -> None:
        """Adds a training that is done or has failed, and writes the file; ignores others."""
        key = job.row.name, job.seed
        known = self._lines.get(key, {}).get("status")
        if result.status not in ("done", "failed") or result.status == known:
            return
        row = job.row
        line = asdict(result) | {
            "norm": row.cfg.MODEL.RESNETS.NORM,
            "batch": row.batch_size,
            "bn_size": row.bn_size,
            "policy": row.cfg.MEGDET.POLICY,
            "images": row.images,
            "iterations": row.cfg.SOLVER.MAX_ITER,
            "lr": row.cfg.SOLVER.BASE_LR,
            "failed": int(result.status == "failed"),
            "ap_by_epoch": _curve(job.folder),
            "config": config_digest(row),
            "reason": without_folders(result.reason),
        }
        self._lines[key] = {name: "" if line[name] is None else str(line[name]) for name in COLUMNS}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.tmp")
        with open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(line for _, line in sorted(self._lines.items()))
        unfinished.replace(self.path)  # if the process is killed before, the old file is there


def _curve(folder: Path) -> str:
    """Returns the evaluations as "epoch:AP epoch:AP ...", or with iterations instead of epochs.

    These are for a config that does not define epochs.
    """
    try:
        run = Run.read(folder)
    except (FileNotFoundError, ValueError):
        return ""
    iterations, values = run.evaluations(averaged=run.averages_weights)
    in_epochs = images_per_epoch(run.cfg) is not None
    at = run.epochs(iterations) if in_epochs else iterations
    return " ".join(f"{x:.4g}:{ap:.2f}" for x, ap in zip(at, values, strict=True))
