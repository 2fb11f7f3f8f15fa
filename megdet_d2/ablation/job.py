"""Defines a job, one training of an ablation: a row, a seed, and the folder of the results."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import Row


@dataclass(frozen=True)
class Job:
    """A training of a row with one seed.

    Attributes:
        row: the config, its schedule resolved.
        seed: SEED of the training.
        folder: OUTPUT_DIR of the training.
    """

    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Returns the row and the seed, as in "06_b16_bn16-seed1"."""
        return f"{self.row.name}-seed{self.seed}"

    def train_arguments(self) -> list[str]:
        """Returns arguments for train_net.py, without --num-gpus, which the launcher adds."""
        return [
            "--config-file", str(self.row.config_file), "--resume", *self.row.opts,
            "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder),
        ]  # fmt: skip


def make_jobs(rows: Sequence[Row], seeds: Iterable[int], output: Path) -> list[Job]:
    """Returns one job per row and seed, the first seed of every row first.

    In this order a table with every row is there as early as possible.
    """
    return [
        Job(row, seed, output / row.name / f"seed{seed}")
        for seed, row in itertools.product(seeds, rows)
    ]


def find_seeds(rows: Sequence[Row], output: Path) -> list[int]:
    """Returns the seeds found under ``output`` for these rows, in order."""
    folders = [path for row in rows for path in (output / row.name).glob("seed*")]
    return sorted({int(path.name[4:]) for path in folders if path.name[4:].isdecimal()})
