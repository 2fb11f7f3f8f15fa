"""What a training has left in its OUTPUT_DIR, as numbers: config, metrics, epochs, hours."""

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from detectron2.config import CfgNode

from megdet_d2.config import load_config
from megdet_d2.schedule.build import images_per_epoch

logger = logging.getLogger(__name__)

TRAIN = "train first: train_net.py --config-file ... OUTPUT_DIR {run}"


def existing(run: str | Path, name: str, advice: str) -> Path:
    """RUN/name; a ``FileNotFoundError`` with the ``advice`` where there is none."""
    path = Path(run) / name
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; {advice.format(run=run)}")
    return path


def read_config(run: str | Path) -> CfgNode:
    """The config that the run dumped, resolved.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, as where a full disk has cut it off.
    """
    path = existing(run, "config.yaml", TRAIN)
    cfg = load_config()
    cfg.set_new_allowed(True)  # another plugin's keys are no obstacle to looking
    try:
        cfg.merge_from_file(str(path))
    except (AssertionError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no config ({error}); {TRAIN.format(run=run)}") from None
    return cfg


def read_metrics(run: str | Path) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation rows of a run's metrics.json, each in the order of training.

    A resumed or repeated training appends to the file: its rows replace earlier ones from where it
    starts. With another mini-batch its iterations count otherwise; so where rows have images_seen,
    as ``Trainer`` writes them, that is what they are ordered by, and evaluations get theirs here.

    Raises:
        FileNotFoundError: no metrics.json. ValueError: neither losses nor AP in it.
    """
    path = existing(run, "metrics.json", TRAIN)
    parsed = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            parsed.append(json.loads(line))  # NaN is no JSON; Python reads what Python wrote
        except ValueError:  # a training was killed as it wrote
            logger.warning(f"{path}: line {number} is not json and is left out")
    _count_images(parsed)
    train_rows: list[dict] = []
    eval_rows: list[dict] = []
    for row in parsed:
        # One row is both where an evaluation falls on an iteration that is logged.
        is_eval = any(key.endswith("bbox/AP") for key in row)
        for rows, belongs in ((train_rows, "total_loss" in row), (eval_rows, is_eval)):
            while belongs and rows and not _comes_before(rows[-1], row):
                rows.pop()
            rows += [row] * belongs
    if not train_rows and not eval_rows:
        raise ValueError(f"{path} has neither losses nor AP; {TRAIN.format(run=run)}")
    return train_rows, eval_rows


def _count_images(rows: list[dict]) -> None:
    """Gives rows without images_seen the count that the training row next to them implies."""
    known = [i for i, row in enumerate(rows) if "effective_batch_size" in row]
    missing = [i for i, row in enumerate(rows) if "images_seen" not in row]
    for i in missing if known else ():
        row, before = rows[i], [k for k in known if k < i]
        behind = [k for k in known if k > i and rows[k]["iteration"] >= row["iteration"]]
        # What was written together is of one mini-batch, an evaluation first.
        near = rows[(behind[:1] or before[-1:] or known)[0]]
        ahead = row["iteration"] - near["iteration"]
        row["images_seen"] = near["images_seen"] + ahead * near["effective_batch_size"]


def _comes_before(row: dict, other: dict) -> bool:
    key = "images_seen" if "images_seen" in row and "images_seen" in other else "iteration"
    return row[key] < other[key]


@dataclass(frozen=True)
class Run:
    """A training's config and metrics; iterations count those that are done, from 1.

    Of a training that was resumed with another mini-batch they are iterations of the last one.
    """

    path: Path
    cfg: CfgNode
    train_rows: list[dict]
    eval_rows: list[dict]

    @classmethod
    def read(cls, path: str | Path) -> "Run":
        """Raises what ``read_config`` and ``read_metrics`` do."""
        return cls(Path(path), read_config(path), *read_metrics(path))

    @property
    def name(self) -> str:
        return self.path.name

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(n,) iterations and (n,) values of a training metric, where it was written."""
        rows = [row for row in self.train_rows if key in row]
        return np.array([self._done(row) for row in rows]), np.array([r[key] for r in rows])

    def _done(self, row: dict) -> int:
        if "images_seen" in row:
            # Rounded up: an iteration that was begun counts.
            return int(-(-row["images_seen"] // self.cfg.SOLVER.IMS_PER_BATCH))
        return row["iteration"] + 1

    def evaluations(
        self, metric: str = "AP", augmented: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n,) iterations and (n,) box AP, or another of COCO's, in percent, of the first test set.

        With several test sets a metric's key begins with the set's name. ``augmented`` are those
        with test-time augmentation.
        """
        tta = "_TTA" * augmented
        names = (f"bbox{tta}", *(f"{name}{tta}/bbox" for name in self.cfg.DATASETS.TEST[:1]))
        pairs = [
            # The last evaluation is written after the last iteration, under the number behind it.
            (min(self._done(row), self.cfg.SOLVER.MAX_ITER), row[f"{name}/{metric}"])
            for row in self.eval_rows
            for name in names
            if f"{name}/{metric}" in row
        ]
        iterations, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(iterations), np.array(values)

    def final(self, metric: str = "AP") -> float | None:
        """The last evaluation's; None where training has not come to its end.

        With test-time augmentation where the config has ``TEST.AUG.ENABLED``.
        """
        iterations, values = self.evaluations(metric, self.cfg.TEST.AUG.ENABLED)
        done = len(iterations) and iterations[-1] >= self.cfg.SOLVER.MAX_ITER
        return float(values[-1]) if done else None

    def epochs(self, iterations: np.ndarray) -> np.ndarray | None:
        """Epochs that so many iterations are; None where the config knows none."""
        images = images_per_epoch(self.cfg)
        return iterations * self.cfg.SOLVER.IMS_PER_BATCH / images if images else None

    def throughput(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) iterations and (n,) images a second."""
        done, seconds = self.series("time")
        default = self.cfg.SOLVER.IMS_PER_BATCH
        images = [r.get("effective_batch_size", default) for r in self.train_rows if "time" in r]
        return done, np.array(images) / seconds

    @functools.cached_property
    def _clock(self) -> tuple[np.ndarray, np.ndarray]:
        # Iterations and the seconds until then: without evaluations and checkpoints, and without
        # what passed between a stop and a resume.
        done, seconds = self.series("training_time")
        if not len(done):  # another trainer's: from medians, which leave out what was slow
            done, rate = self.throughput()
            seconds = np.cumsum(np.diff(done, prepend=0) * self.cfg.SOLVER.IMS_PER_BATCH / rate)
        return np.append(0, done), np.append(0, seconds)

    def hours(self) -> float:
        """Hours of training, without evaluations."""
        return float(self._clock[1][-1]) / 3600

    def hours_at(self, iterations: np.ndarray) -> np.ndarray:
        """(n,) hours of training until each of (n,) ``iterations``."""
        return np.interp(iterations, *self._clock) / 3600

    def images_per_second(self) -> float | None:
        """Mean throughput of all processes together; None before it was measured."""
        done, seconds = self._clock
        if not seconds[-1] > 0:
            return None
        return float(done[-1] * self.cfg.SOLVER.IMS_PER_BATCH / seconds[-1])
