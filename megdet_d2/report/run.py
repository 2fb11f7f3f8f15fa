"""Reads what a training has left in its OUTPUT_DIR: config, metrics, epochs, hours."""

import functools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode

from megdet_d2.config import load_config
from megdet_d2.schedule.build import images_per_epoch, scheduled_images

logger = logging.getLogger(__name__)

TRAIN = "train first: megdet train --config-file ... OUTPUT_DIR {run}"
# Metrics that count batches and images which a training has skipped, if it wrote them.
SKIP_COUNTERS = ("cgbn_skipped_batches", "skipped_images")


def existing(run: str | Path, name: str, advice: str) -> Path:
    """Returns the path of a file in a run's folder.

    Args:
        advice: the end of the error message, with {run} for the folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(run) / name
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; {advice.format(run=run)}")
    return path


def read_config(run: str | Path) -> CfgNode:
    """Returns the config that a run has written, its schedule resolved.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, for example because a full disk has cut it off.
    """
    path = existing(run, "config.yaml", TRAIN)
    cfg = load_config()
    cfg.set_new_allowed(True)  # so that keys of other plugins can be read
    try:
        # A run writes plain values. Detectron2's default would run code of a stranger's folder.
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except (AssertionError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no config ({error}); {TRAIN.format(run=run)}") from None
    return cfg


def read_metrics(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the training rows and the evaluation rows of a run's metrics.json, both in order.

    A resumed or repeated training appends to the file. Its rows replace earlier ones from where it
    starts. A second training in the same folder replaces all. If rows have images_seen, as
    ``Trainer`` writes it, they are ordered by it, because iterations count differently after a
    change of the mini-batch. Evaluations then get images_seen here.

    Raises:
        FileNotFoundError: there is no metrics.json.
        ValueError: it has neither losses nor AP.
    """
    path = existing(run, "metrics.json", TRAIN)
    parsed = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            parsed.append(json.loads(line))  # Python writes and reads NaN, which is no valid json
        except ValueError:  # the training was killed while it wrote the line
            logger.warning(f"{path}: line {number} is not json and is left out")
    _count_images(parsed)
    train_rows: list[dict[str, Any]] = []
    eval_rows: list[dict[str, Any]] = []
    for row in parsed:
        # A row is both if an evaluation coincides with a logged iteration.
        is_eval = any(key.endswith("bbox/AP") for key in row)
        is_train = "total_loss" in row
        if is_train and train_rows and not _comes_before(train_rows[0], row):
            eval_rows.clear()  # a training from the start, perhaps evaluated at other iterations
        for rows, belongs in ((train_rows, is_train), (eval_rows, is_eval)):
            while belongs and rows and not _comes_before(rows[-1], row):
                rows.pop()
            rows += [row] * belongs
    if not train_rows and not eval_rows:
        raise ValueError(f"{path} has neither losses nor AP; {TRAIN.format(run=run)}")
    return train_rows, eval_rows


def _count_images(rows: list[dict[str, Any]]) -> None:
    """Adds images_seen to rows without it, computed from the nearest training row."""
    known = [i for i, row in enumerate(rows) if "effective_batch_size" in row]
    missing = [i for i, row in enumerate(rows) if "images_seen" not in row]
    for i in missing if known else ():
        row, before = rows[i], [k for k in known if k < i]
        after = [k for k in known if k > i and rows[k]["iteration"] >= row["iteration"]]
        # An evaluation is written before the training row with the same mini-batch.
        near = rows[(after[:1] or before[-1:] or known)[0]]
        ahead = row["iteration"] - near["iteration"]
        row["images_seen"] = near["images_seen"] + ahead * near["effective_batch_size"]


def _comes_before(row: dict[str, Any], other: dict[str, Any]) -> bool:
    key = "images_seen" if "images_seen" in row and "images_seen" in other else "iteration"
    return row[key] < other[key]


@dataclass(frozen=True)
class Run:
    """The config and the metrics of one training.

    Iterations are the number of iterations done, from 1. If the training was resumed with another
    mini-batch, or has a batch warm-up, they are iterations of the last mini-batch.

    Attributes:
        path: OUTPUT_DIR.
        cfg: the config, its schedule resolved.
        train_rows, eval_rows: see ``read_metrics``.
    """

    path: Path
    cfg: CfgNode
    train_rows: list[dict[str, Any]]
    eval_rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> "Run":
        """Reads a run from its folder.

        Raises:
            FileNotFoundError, ValueError: see ``read_config`` and ``read_metrics``.
        """
        return cls(Path(path), read_config(path), *read_metrics(path))

    @property
    def name(self) -> str:
        """Returns the name of the folder."""
        return self.path.name

    @property
    def averages_weights(self) -> bool:
        """Returns True if the training keeps an average of the weights."""
        return bool(self.cfg.MEGDET.EMA_DECAY > 0)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n,) iterations and (n,) values of a training metric, where it was written."""
        rows = [row for row in self.train_rows if key in row]
        return np.array([self._done(row) for row in rows]), np.array([r[key] for r in rows])

    def _done(self, row: dict[str, Any]) -> int:
        if "images_seen" in row:
            # Rounded up: an iteration that has begun counts.
            return int(-(-row["images_seen"] // self.cfg.SOLVER.IMS_PER_BATCH))
        return row["iteration"] + 1

    @property
    def _length(self) -> int:
        # A batch warm-up has more iterations. They count as those of the last mini-batch.
        return scheduled_images(self.cfg) // self.cfg.SOLVER.IMS_PER_BATCH

    def evaluations(
        self, metric: str = "AP", averaged: bool = False, augmented: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n,) iterations and (n,) values of a COCO box metric on the first test set.

        Args:
            metric: for example "AP", in percent.
            averaged: take the evaluations of the averaged weights, ``MEGDET.EMA_DECAY``.
            augmented: take the evaluations with test-time augmentation.
        """
        model = "_EMA" * averaged + "_TTA" * augmented
        # With several test sets a metric's key begins with the set's name.
        names = (f"bbox{model}", *(f"{name}{model}/bbox" for name in self.cfg.DATASETS.TEST[:1]))
        pairs = [
            # The last evaluation is written one iteration after the last training iteration.
            (min(self._done(row), self._length), row[f"{name}/{metric}"])
            for row in self.eval_rows
            for name in names
            if f"{name}/{metric}" in row
        ]
        iterations, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(iterations), np.array(values)

    def final(self, metric: str = "AP") -> float | None:
        """Returns the value of the last evaluation, or None if the training is not finished.

        It is that of the averaged weights if the config has ``MEGDET.EMA_DECAY``, with test-time
        augmentation if it has ``TEST.AUG.ENABLED``.
        """
        augmented = self.cfg.TEST.AUG.ENABLED
        iterations, values = self.evaluations(metric, self.averages_weights, augmented)
        done = len(iterations) and iterations[-1] >= self._length
        return float(values[-1]) if done else None

    def epochs(self, iterations: np.ndarray) -> np.ndarray:
        """Returns (n,) epochs after (n,) iterations; NaN if the config does not define epochs."""
        return iterations * self.cfg.SOLVER.IMS_PER_BATCH / (images_per_epoch(self.cfg) or math.nan)

    def throughput(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n,) iterations and (n,) images per second of all processes together."""
        done, seconds = self.series("time")
        default = self.cfg.SOLVER.IMS_PER_BATCH
        images = [r.get("effective_batch_size", default) for r in self.train_rows if "time" in r]
        return done, np.array(images) / seconds

    @functools.cached_property
    def _clock(self) -> tuple[np.ndarray, np.ndarray]:
        # Iterations, and the seconds of training until then. Evaluations, checkpoints and the time
        # between a stop and a resume are not part of them.
        done, seconds = self.series("training_time")
        if not len(done):  # from another trainer: medians, which leave slow iterations out
            done, rate = self.throughput()
            seconds = np.cumsum(np.diff(done, prepend=0) * self.cfg.SOLVER.IMS_PER_BATCH / rate)
        return np.append(0, done), np.append(0, seconds)

    def hours(self) -> float:
        """Returns the hours of training, without evaluations."""
        return float(self._clock[1][-1]) / 3600

    def hours_at(self, iterations: np.ndarray) -> np.ndarray:
        """Returns (n,) hours of training until each of (n,) ``iterations``."""
        return np.interp(iterations, *self._clock) / 3600

    def images_per_second(self) -> float | None:
        """Returns the mean throughput of all processes together, or None if it is unknown."""
        done, seconds = self._clock
        if not seconds[-1] > 0:
            return None
        return float(done[-1] * self.cfg.SOLVER.IMS_PER_BATCH / seconds[-1])


def labels(runs: Sequence[Run]) -> list[str]:
    """Returns a different name for each run: its path below the folder common to all."""
    if len(runs) == 1:
        return [runs[0].name]
    paths = [os.path.abspath(run.path) for run in runs]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]
