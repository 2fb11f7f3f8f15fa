"""Runs ``megdet ensemble``: evaluates each source, fuses their boxes, evaluates and tabulates."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from megdet_d2._moved import renamed
from megdet_d2.config import load_config
from megdet_d2.data import register_datasets

from .evaluation import (
    RESULTS,
    detect,
    evaluate,
    load_model,
    read_annotations,
    read_results,
    to_table,
)
from .fusion import IOU_THRESHOLDS, fuse, load_ensemble_boxes
from .source import Source, prepare_models

__getattr__ = renamed(__name__, METRICS="megdet_d2.ensemble.evaluation.METRICS")


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.ensemble``.

    Raises:
        ImportError: ensemble-boxes is not installed.
        FileNotFoundError, ValueError: a source or a flag is wrong. Everything is checked before
            the first model is evaluated.
    """
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
    models = {
        number: load_model(source.cfg)
        for number, source in enumerate(sources)
        if source.cfg is not None
    }

    args.output.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources):
        if source.cfg is not None:
            print(f"Evaluating {source.label}", flush=True)
            results[number] = read_results(detect(source.cfg, models.pop(number)), truth)
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
        (source.label, f"{weight:g}", evaluate(truth, results[number]))
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True))
    ]
    table = to_table([*rows, (how, "", evaluate(truth, fused))])
    text = (
        f"Box AP in percent on {truth_file}, {len(sizes)} images. Boxes with a score of at least "
        f"{args.skip_box_threshold:g} are fused; the best {args.detections_per_image} per image "
        f"are kept.\n\n{table}\n"
    )
    (args.output / "ensemble.md").write_text(text)
    print(f"\n{text}\nTable and detections: {args.output}/ensemble.md, {RESULTS}")


def _prepare(sources: Sequence[Source], args: argparse.Namespace) -> str:
    """Prepares the configs of the models; returns the data set's annotation file."""
    cfgs = [source.cfg for source in sources if source.cfg is not None]
    if args.annotations:
        if cfgs or args.opts:
            raise ValueError(
                "--annotations is for json files as sources, without overrides; for a model, name "
                "the data set by --dataset"
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
        cfg.MODEL.META_ARCHITECTURE = ""  # there is no model whose NUM_CLASSES could be checked
        register_datasets(cfg, ("TEST",))
        dataset = args.dataset
    else:
        raise ValueError(
            "Result files do not name their data set; add --annotations JSON, or --dataset NAME"
        )
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        raise ValueError(f"{dataset!r} is not a COCO data set, which COCO's AP needs")
    if not Path(metadata.json_file).is_file():
        DatasetCatalog.get(dataset)  # makes the embedded data set when it is first loaded
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
