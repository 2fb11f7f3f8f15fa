"""``megdet ensemble``: several detectors' boxes fused into one, and what each and all reach.

megdet ensemble output/a output/b configs/c.yaml:c.pth --output output/ensemble
megdet ensemble a.json b.json --annotations val.json --fusion soft-nms --output output/ensemble
"""

import argparse
import contextlib
import io
import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from megdet_d2.config import load_config, merge_overrides
from megdet_d2.data import register_datasets
from megdet_d2.data.coco import read_coco
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.weights_only import WeightsOnlyCheckpointer
from megdet_d2.report.run import existing, read_config

from .fusion import IOU_THRESHOLDS, fuse, load_ensemble_boxes

logger = logging.getLogger(__name__)

RESULTS = "coco_instances_results.json"  # Detectron2's name for them
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_SOURCE = "a run's folder, CONFIG.yaml:WEIGHTS, or a json of COCO results"


@dataclass(frozen=True)
class Source:
    """What the user named: a model to be evaluated, or a file of its results.

    Attributes:
        name: as the user wrote it.
        cfg: of the model, its MODEL.WEIGHTS set; None for a file.
    """

    name: str
    cfg: CfgNode | None

    @classmethod
    def read(cls, text: str, opts: Sequence[str] = ()) -> "Source":
        """Reads a source's config, if it is a model.

        Args:
            opts: overrides of the config, KEY VALUE ....

        Raises:
            FileNotFoundError: no such file, or a run without config or weights.
            ValueError: something else; a key that no config has.
        """
        model = re.fullmatch(r"(.+?\.ya?ml):(.+)", text)
        if model:
            cfg = load_config(existing("", model[1], f"give {_SOURCE}"))
            cfg.MODEL.WEIGHTS = model[2]
        elif Path(text).is_dir():
            cfg = read_config(text)
            advice = "train to the end, or give {run}/config.yaml:CHECKPOINT"
            cfg.MODEL.WEIGHTS = str(existing(text, "model_final.pth", advice))
        elif text.endswith(".json"):
            existing("", text, f"give {_SOURCE}")
            return cls(text, None)
        else:
            raise ValueError(f"{text!r} is none of: {_SOURCE}. Overrides go behind the flags")
        merge_overrides(cfg, opts)
        return cls(text, cfg)


def read_annotations(path: str | Path) -> COCO:
    """The ground truth, checked; without pycocotools' prints.

    Raises:
        FileNotFoundError, ValueError: see ``data.coco.read_coco``.
    """
    truth = COCO()
    truth.dataset = read_coco("Ground truth", str(path))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def read_results(path: str | Path, truth: COCO) -> list[dict]:
    """Boxes of a COCO results json: image_id, category_id, bbox (XYWH in pixels) and score.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no results; an image or a category that ``truth`` has not.
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
            # A list is no key of a dict.
            if not isinstance(row.get(key), (int, float, str)) or row[key] not in known:
                raise ValueError(
                    f"{path}: entry {number} has {key} {row.get(key)!r}, which the data set has "
                    "not; give results of this data set, or the annotations they belong to"
                )
    keys = ("image_id", "category_id", "bbox", "score")
    return [{key: row[key] for key in keys} for row in rows]


def evaluate(truth: COCO, results: Sequence[Mapping]) -> dict[str, float]:
    """COCO's box AP, AP50, AP75, APs, APm and APl in percent, by pycocotools.

    NaN where there is no object of that size. No detections have AP 0.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes writes into what it gets, and stumbles over an empty list.
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


def detect(cfg: CfgNode) -> Path:
    """Evaluates a model by ``Trainer.test``, with ``TEST.AUG`` if enabled; its results' file.

    Args:
        cfg: prepared, with one data set in DATASETS.TEST; writes to its OUTPUT_DIR.
    """
    model = Trainer.build_model(cfg)
    WeightsOnlyCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    test = Trainer.test_with_tta if cfg.TEST.AUG.ENABLED else Trainer.test
    with contextlib.redirect_stdout(io.StringIO()):
        test(cfg, model)
    folder = "inference_TTA" if cfg.TEST.AUG.ENABLED else "inference"
    return Path(cfg.OUTPUT_DIR) / folder / RESULTS


def prepare_models(cfgs: Sequence[CfgNode], dataset: str | None = None) -> str:
    """Prepares all configs, in place, for one data set, which is registered; returns its name.

    Args:
        dataset: a name that the first config knows; None is its DATASETS.TEST.

    Raises:
        ValueError: several test sets and none chosen; class lists that differ; what
            ``prepare_config`` refuses.
    """
    first = cfgs[0]
    if dataset is None:
        if len(first.DATASETS.TEST) != 1:
            raise ValueError(
                f"DATASETS.TEST of the first config is {tuple(first.DATASETS.TEST)}; choose one "
                "data set by --dataset NAME"
            )
        dataset = first.DATASETS.TEST[0]
    first.DATASETS.TEST = (dataset,)
    # The class lists first, each by its config's own data sets; the first's last, so that its data
    # sets are those that stay registered.
    classes = [_class_names(cfg) for cfg in reversed(cfgs)][::-1]
    for number, names in enumerate(classes[1:], start=2):
        if names != classes[0]:
            raise ValueError(
                f"The classes of model {number} are {names[:8]}, of the first {classes[0][:8]}; an "
                "ensemble needs models of the same classes in the same order"
            )
    for cfg in cfgs:
        cfg.DATASETS = first.DATASETS.clone()
        prepare_config(cfg, eval_only=True)
    return dataset


def to_table(rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """Markdown: a row a model, their mean, and, last in ``rows``, the ensemble.

    Args:
        rows: name, weight and metrics of each.
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


def run(args: argparse.Namespace) -> None:
    """The command. Everything is read and checked before the first model is evaluated."""
    load_ensemble_boxes()
    weights = args.weights or [1.0] * len(args.sources)
    _check_flags(args, weights)
    sources = [Source.read(text, args.opts) for text in args.sources]
    truth_file = _prepare(sources, args)
    truth = read_annotations(truth_file)
    results = {
        number: read_results(source.name, truth)
        for number, source in enumerate(sources)
        if source.cfg is None
    }

    args.output.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources):
        if source.cfg is not None:
            print(f"Evaluating {source.name}", flush=True)
            results[number] = read_results(detect(source.cfg), truth)
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth.imgs.values()}
    threshold = args.iou_threshold or IOU_THRESHOLDS[args.fusion]
    fused = fuse(
        [results[number] for number in range(len(sources))],
        sizes,
        method=args.fusion,
        iou_threshold=threshold,
        weights=weights,
        skip_box_threshold=args.skip_box_threshold,
        detections_per_image=args.detections_per_image,
    )
    (args.output / RESULTS).write_text(json.dumps(fused))

    how = f"ensemble: {args.fusion}, IoU {threshold:g}"
    rows = [
        (source.name, f"{weight:g}", evaluate(truth, results[number]))
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True))
    ]
    table = to_table([*rows, (how, "", evaluate(truth, fused))])
    text = (
        f"Box AP in percent on {truth_file}, {len(sizes)} images. Fused from scores of "
        f"{args.skip_box_threshold:g} on, {args.detections_per_image} detections an image kept."
        f"\n\n{table}\n"
    )
    (args.output / "ensemble.md").write_text(text)
    print(f"\n{text}\nTable and detections: {args.output}/ensemble.md, {RESULTS}")


def _prepare(sources: Sequence[Source], args: argparse.Namespace) -> str:
    """Prepares the models' configs; the data set's annotation file."""
    cfgs = [source.cfg for source in sources if source.cfg is not None]
    if args.annotations:
        if cfgs or args.opts:
            raise ValueError(
                "--annotations goes with result files alone, without overrides; a model is "
                "evaluated on a data set: name it by --dataset"
            )
        return str(args.annotations)
    for number, source in enumerate(sources):
        if source.cfg is not None:
            name = Path(source.name.partition(":")[0]).stem
            source.cfg.OUTPUT_DIR = str(args.output / f"{number + 1}_{name}")
    if cfgs:
        dataset = prepare_models(cfgs, args.dataset)
    elif args.dataset:
        cfg = load_config(opts=args.opts)
        cfg.DATASETS.TEST = (args.dataset,)
        cfg.MODEL.META_ARCHITECTURE = ""  # no model: no NUM_CLASSES to compare with
        register_datasets(cfg, ("TEST",))
        dataset = args.dataset
    else:
        raise ValueError(
            "Result files do not say what they are of; add --annotations JSON, or --dataset NAME"
        )
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        raise ValueError(f"{dataset!r} is not a COCO data set, which COCO's AP needs")
    if not Path(metadata.json_file).is_file():
        DatasetCatalog.get(dataset)  # the embedded data set is made when it is first loaded
    return metadata.json_file


def _check_flags(args: argparse.Namespace, weights: Sequence[float]) -> None:
    if len(weights) != len(args.sources) or not all(0 < w < math.inf for w in weights):
        raise ValueError(
            f"--weights is {weights} for {len(args.sources)} sources; give each a number above 0"
        )
    if args.iou_threshold is not None and not 0 < args.iou_threshold < 1:
        raise ValueError(f"--iou-threshold is {args.iou_threshold}; give one between 0 and 1")
    if not 0 <= args.skip_box_threshold < 1:
        raise ValueError(f"--skip-box-threshold is {args.skip_box_threshold}; give one from 0 to 1")
    if args.detections_per_image < 1:
        raise ValueError(f"--detections-per-image is {args.detections_per_image}; give 1 or more")
    fused = (args.output / RESULTS).resolve()
    if any(Path(text).resolve() == fused for text in args.sources):
        raise ValueError(f"--output {args.output} would overwrite the source {fused}; give another")


def _class_names(cfg: CfgNode) -> list[str]:
    """What the config's first test set, or training set, calls its classes; checks the data set."""
    split = "TEST" if cfg.DATASETS.TEST else "TRAIN"
    if not cfg.DATASETS[split]:
        raise ValueError("A config has no DATASETS.TEST, which says what its classes are; add it")
    register_datasets(cfg, (split,))
    name = cfg.DATASETS[split][0]
    if "thing_classes" not in MetadataCatalog.get(name).as_dict():
        DatasetCatalog.get(name)  # which sets them
    return list(MetadataCatalog.get(name).thing_classes)


def _read_json(path: str | Path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {path}; correct the path")
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error})") from None


def _are_numbers(values, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
