"""The checkpoint of the best evaluation so far, also over resumes."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .checkpoint import Checkpointer, WholeFiles
from .ema import SUFFIX, WeightAverage, write_average

logger = logging.getLogger(__name__)

NAME = "model_best"
MODES = ("max", "min")


class BestCheckpointer(hooks.BestCheckpointer):
    """A ``BestCheckpointer`` of Detectron2 that a resumed run continues.

    ``model_best.pth`` is a checkpoint like the others, and also says which metric it is best in. A
    resumed run reads that from the file. So a later, worse model does not replace it.

    Register it in every process, after the hooks that evaluate.

    Args:
        eval_period: iterations between two evaluations.
        checkpointer: the trainer's.
        metric: its name, such as "bbox/AP".
        mode: "max" or "min".
        saved: called after each save in rank 0.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        metric: str,
        mode: str,
        saved: Callable[[], None],
    ):
        super().__init__(eval_period, checkpointer, metric, mode, NAME)
        self._metric = metric
        self._saver = checkpointer
        self._path = os.path.join(checkpointer.save_dir, f"{NAME}.pth")
        self._saved = saved
        self._checkpointer = self  # Detectron2's hook saves by ``save``, which adds the metric

    def before_train(self) -> None:
        """Reads the best value of a run that is resumed or rolled back."""
        resumed = self.trainer.progress.loaded_iteration is not None
        if resumed and comm.is_main_process() and PathManager.isfile(self._path):
            with PathManager.open(self._path, "rb") as file:
                best = torch.load(file, map_location="cpu", weights_only=True).get("best", {})
            if best.get("metric") == self._metric:
                self._update_best(best["value"], best["iteration"])

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves the checkpoint with the metric, its value and its iteration."""
        value, iteration = self.trainer.storage.latest()[self._metric]
        best = {"metric": self._metric, "value": float(value), "iteration": int(iteration)}
        # The results of the last evaluation have an iteration that was not trained.
        kwargs["iteration"] = self.trainer.last_iteration
        self._saver.save(name, best=best, **kwargs)
        self._saved()

    def check(self, results: Mapping[str, float], iteration: int, path: str) -> None:
        """Compares results that are later than their iteration. Only rank 0 calls it.

        Args:
            results: of the evaluation, by their names.
            iteration: that of the results.
            path: its checkpoint, which becomes the best if its result is.
        """
        if not self._has_metric(results):
            return
        value, best = results[self._metric], self.best_metric
        if best is not None and not self._compare(value, best):
            return
        if not self._update_best(value, iteration):
            return
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        about = {"metric": self._metric, "value": value, "iteration": iteration}
        with WholeFiles(PathManager).open(self._path, "wb") as whole:
            torch.save(file | {"best": about}, whole)
        if "ema" in file:
            write_average(self._saver.save_dir, NAME, file["ema"])
        logger.info(f"{NAME}.pth is iteration {iteration}: {self._metric} {value:0.5f}")

    def _best_checking(self) -> None:
        # The other processes have no results.
        if comm.is_main_process() and self._has_metric(self.trainer.storage.latest()):
            super()._best_checking()

    def _has_metric(self, results: Mapping[str, Any]) -> bool:
        if self._metric in results:
            return True
        metrics = ", ".join(sorted(name for name in results if "/" in name))
        logger.warning(
            f"MEGDET.BEST_METRIC {self._metric!r} is not among the results of the evaluation, "
            f"so {NAME}.pth is not written; the results are: {metrics or 'none'}"
        )
        return False


def build_best_checkpointer(
    cfg: CfgNode, checkpointer: Checkpointer, average: WeightAverage | None
) -> BestCheckpointer:
    """Builds the hook of ``MEGDET.BEST_METRIC``. With an average it is saved too.

    Args:
        cfg: a config.
        checkpointer: the trainer's.
        average: the trainer's ``ema``; its file is ema/model_best.pth.
    """

    def save_average() -> None:
        if average is not None:
            average.save(checkpointer.save_dir, NAME)

    keys = cfg.MEGDET
    # Results from the background come by ``check``, but for the last.
    period = 0 if cfg.TEST.BACKGROUND else cfg.TEST.EVAL_PERIOD
    return BestCheckpointer(period, checkpointer, keys.BEST_METRIC, keys.BEST_MODE, save_average)


def check_best(cfg: CfgNode) -> None:
    """Checks ``MEGDET.BEST_METRIC`` and ``BEST_MODE``, as far as possible before an evaluation.

    The names of single classes, such as "bbox/AP-person", and of evaluators of other projects are
    not known. A name of those is accepted.

    Raises:
        ValueError: no evaluation will give the metric.
    """
    keys = cfg.MEGDET
    if not keys.BEST_METRIC:
        return
    said = f"MEGDET.BEST_METRIC is {keys.BEST_METRIC!r}"
    if keys.BEST_MODE not in MODES:
        raise ValueError(f"MEGDET.BEST_MODE is {keys.BEST_MODE!r}; use one of {', '.join(MODES)}")
    if not cfg.DATASETS.TEST:
        raise ValueError(f"{said}, but DATASETS.TEST is empty; name a data set there")
    if cfg.TEST.EVAL_PERIOD <= 0:
        raise ValueError(
            f"{said}, but TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so there is one evaluation, "
            'at the end; set TEST.EVAL_PERIOD, or MEGDET.BEST_METRIC ""'
        )
    names = _metric_names(cfg)
    if names and keys.BEST_METRIC not in names and "AP-" not in keys.BEST_METRIC:
        raise ValueError(f"{said}; the evaluations give {', '.join(sorted(names))}")


def _metric_names(cfg: CfgNode) -> set[str]:
    """Returns all metrics of COCO's, LVIS's and Pascal VOC's sets; none if a set is another."""
    tasks = ["bbox"]
    tasks += ["segm"] * cfg.MODEL.MASK_ON + ["keypoints"] * cfg.MODEL.KEYPOINT_ON
    found = set()
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type", None)
        if kind == "pascal_voc":
            metrics = {("bbox", metric) for metric in ("AP", "AP50", "AP75")}
        elif kind == "coco" or kind == "lvis":
            sizes = ("AP", "APs", "APm", "APl")
            more = ("APr", "APc", "APf") if kind == "lvis" else ("AP50", "AP75")
            metrics = {(task, metric) for task in tasks for metric in (*sizes, *more)}
            metrics -= {("keypoints", "APs")}
        else:
            return set()
        for end in ("", SUFFIX) if cfg.MEGDET.EMA_DECAY else ("",):
            several = len(cfg.DATASETS.TEST) > 1  # then a result's name begins with the set's
            found |= {
                f"{name}{end}/{task}/{metric}" if several else f"{task}{end}/{metric}"
                for task, metric in metrics
            }
    return found
