"""Evaluates boxes by COCO's AP, from a model or from a json of results, and tabulates it."""

import contextlib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import nn

from megdet_d2.data.coco import read_coco
from megdet_d2.engine import Trainer
from megdet_d2.engine.saved_classes import saved_names
from megdet_d2.engine.weights_only import WeightsOnlyCheckpointer

RESULTS = "coco_instances_results.json"  # Detectron2's file name
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def read_annotations(path: str | Path) -> COCO:
    """Returns the ground truth of an annotation file, checked.

    Raises:
        FileNotFoundError, ValueError: see ``data.coco.read_coco``.
    """
    truth = COCO()
    truth.dataset = read_coco("Ground truth", str(path))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def read_results(path: str | Path, truth: COCO) -> list[dict[str, Any]]:
    """Returns the boxes of a json of COCO results.

    Each is a dict of image_id, category_id, bbox (x, y, width, height in pixels) and score.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no COCO results, or an image or a category that is not in ``truth``.
    """
    rows = _read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of COCO results; give Detectron2's {RESULTS}")
    for number, row in enumerate(rows):
        box, score = row.get("bbox"), row.get("score")
        if not (_are_numbers(box, 4) and min(box[2:]) >= 0 and _are_numbers([score], 1)):
            raise ValueError(
                f"{path}: entry {number} has bbox {box!r} and score {score!r}; a COCO result has "
                "four numbers [x, y, width, height] and one score"
            )
        for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
            # The type comes first: a list cannot be looked up in a dict.
            if not isinstance(row.get(key), (int, float, str)) or row[key] not in known:
                raise ValueError(
                    f"{path}: entry {number} has {key} {row.get(key)!r}, which is not in the data "
                    "set; give results of this data set, or the annotations they belong to"
                )
    keys = ("image_id", "category_id", "bbox", "score")
    return [{key: row[key] for key in keys} for row in rows]


def load_model(cfg: CfgNode) -> nn.Module:
    """Returns the model of a config with its MODEL.WEIGHTS.

    Args:
        cfg: prepared, with one data set in DATASETS.TEST.

    Raises:
        ValueError: the weights were trained on other classes than those of the data set.
    """
    model, weights = Trainer.build_model(cfg), cfg.MODEL.WEIGHTS
    rest = WeightsOnlyCheckpointer(model).load(weights)
    Trainer.check_saved_classes(cfg, saved_names(rest), f"MODEL.WEIGHTS {weights!r}")
    return model


def detect(cfg: CfgNode, model: nn.Module) -> Path:
    """Evaluates a model with ``Trainer.test`` and returns the path of its results.

    With ``TEST.AUG.ENABLED`` it uses test-time augmentation.

    Args:
        cfg: prepared, with one data set in DATASETS.TEST; the results go to its OUTPUT_DIR.
        model: of this config, see ``load_model``.
    """
    test = Trainer.test_with_tta if cfg.TEST.AUG.ENABLED else Trainer.test
    with contextlib.redirect_stdout(io.StringIO()):
        test(cfg, model)
    folder = "inference_TTA" if cfg.TEST.AUG.ENABLED else "inference"
    return Path(cfg.OUTPUT_DIR) / folder / RESULTS


def evaluate(truth: COCO, results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns COCO's box ``METRICS`` in percent, computed by pycocotools.

    A metric is NaN if there is no object of its size. Without any detection the AP is 0.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes changes its input and fails on an empty list.
        found = truth.loadRes([dict(result) for result in results]) if results else COCO()
        coco_eval = COCOeval(truth, found, "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    values = coco_eval.stats[: len(METRICS)]
    return {
        metric: 100 * float(value) if value >= 0 else math.nan
        for metric, value in zip(METRICS, values, strict=True)
    }


def to_table(rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """Returns a Markdown table with a row per model, their mean, and the ensemble.

    Args:
        rows: name, weight and metrics of each model, and last those of the ensemble.
    """
    *models, ensemble = rows
    mean = {m: statistics.fmean(metrics[m] for _, _, metrics in models) for m in METRICS}
    lines = [
        [name, weight, *(_percent(metrics[metric]) for metric in METRICS)]
        for name, weight, metrics in (*models, ("mean", "", mean), ensemble)
    ]
    headers = ["", "weight", *METRICS]
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(lines, headers, "pipe", disable_numparse=True, colalign=align)


def _read_json(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {path}; correct the path")
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error})") from None


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
