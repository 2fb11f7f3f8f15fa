"""A CSV file of finished trainings, by which a study goes on where their folders are not.

A study of many hours outlives the machine that began it. Each training that ends becomes a line;
trainings that have a line are not repeated, and enter the table from there.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megdet_d2.config import load_config
from megdet_d2.report.run import Run

from .job import Job
from .results import Result
from .rows import Row, differences

# Keys that do not change the result, or that every job has of its own.
LEFT_OUT = (
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
_RESULT = [field.name for field in fields(Result) if field.name not in ("row", "seed")]
COLUMNS = (
    "row", "seed", "norm", "batch", "bn_size", "policy", "images", "iterations", "lr", "failed",
    *_RESULT, "ap_by_epoch", "config",
)  # fmt: skip


def config_digest(row: Row) -> str:
    """Returns 12 hexadecimal digits of all keys in which a row differs from the defaults.

    A key that a later version adds does not change it.
    """
    keys = differences(load_config(), row.cfg)
    told = {key: value for key, (_, value) in keys.items() if not key.startswith(LEFT_OUT)}
    text = repr([(key, _plain(value)) for key, value in sorted(told.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


class Ledger:
    """The lines of a file, one per training that is done or has failed.

    Args:
        path: the CSV file; it need not exist.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path):
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
        """Returns the result of a job that has a line; None otherwise.

        Raises:
            ValueError: the line is of another config than the row now has.
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
        if result.status in ("unfinished", self._lines.get(key, {}).get("status")):
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
        unfinished.replace(self.path)  # a stop in between leaves the earlier lines


def _curve(folder: Path) -> str:
    """Returns "epoch:AP epoch:AP ..." of all evaluations; iterations where no epoch is known."""
    try:
        run = Run.read(folder)
    except (FileNotFoundError, ValueError):
        return ""
    iterations, values = run.evaluations()
    epochs = run.epochs(iterations)
    at = iterations if epochs is None else epochs
    return " ".join(f"{x:.4g}:{ap:.2f}" for x, ap in zip(at, values, strict=True))
