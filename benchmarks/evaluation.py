"""Times COCO's AP by TEST.COCO_API "hotcoco" beside pycocotools, and compares their numbers.

    python benchmarks/evaluation.py             # 5,000 images with 100 boxes each, some minutes

It makes a set like COCO's val2017: 80 classes, 7 objects per image. Both libraries run through
Detectron2's evaluator, from the detections in memory to the table of AP per class, in one thread.
Times are CPU seconds. It prints both, and last their ratio.
"""

import os

os.environ["RAYON_NUM_THREADS"] = "1"  # hotcoco's threads, before it starts them

import argparse
import contextlib
import copy
import io
import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from norm import write_json
from tabulate import tabulate

from megdet_d2.engine.coco_api import HotcocoEvaluator

CLASSES, OBJECTS, WIDTH, HEIGHT = 80, 7, 640, 480
ROOT = Path(__file__).parents[1]


def make_set(images: int, boxes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a COCO json, and the detections of each image."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    predictions = []
    for image in range(1, images + 1):
        size = rng.uniform(10, 200, (OBJECTS, 2))
        corner = rng.uniform(0, 1, (OBJECTS, 2)) * (np.array([WIDTH, HEIGHT]) - size)
        true, labels = np.concatenate([corner, size], 1), rng.integers(0, CLASSES, OBJECTS)
        for box, label in zip(true.tolist(), labels.tolist(), strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label + 1,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
        near = rng.integers(0, OBJECTS, boxes)
        found = np.maximum(true[near] + rng.normal(0, 10, (boxes, 4)), 2)
        right = rng.random(boxes) < 0.5
        classes = np.where(right, labels[near], rng.integers(0, CLASSES, boxes))
        rows = zip(classes.tolist(), found.tolist(), rng.random(boxes).tolist(), strict=True)
        instances = [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for label, box, score in rows
        ]
        predictions.append({"image_id": image, "instances": instances})
    content = {
        "info": {},
        "images": [{"id": i + 1, "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)],
    }
    return content, predictions


def evaluate(kind: type[COCOEvaluator], predictions: list[dict]) -> tuple[dict, float]:
    """Returns the results, and the CPU seconds from the detections to the table."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = kind("made", tasks=("bbox",), distributed=False)
        evaluator.reset()
        evaluator._predictions = copy.deepcopy(predictions)
        began = time.process_time()
        results = evaluator.evaluate()
        return results, time.process_time() - began


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    content, predictions = make_set(args.images, args.boxes)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        MetadataCatalog.get("made").set(
            json_file=file.name,
            thing_classes=[category["name"] for category in content["categories"]],
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(CLASSES)},
        )
        runs = {"hotcoco": [evaluate(HotcocoEvaluator, predictions) for _ in range(3)]}
        runs["pycocotools"] = [evaluate(COCOEvaluator, predictions)]
    (ours, _), (stock, _) = runs["hotcoco"][0], runs["pycocotools"][0]
    largest = max(abs(stock["bbox"][name] - ours["bbox"][name]) for name in stock["bbox"])
    seconds = {name: min(taken for _, taken in found) for name, found in runs.items()}
    print(tabulate(seconds.items(), ("", "CPU seconds"), "pipe", floatfmt=".1f"))
    print(f"\n{len(stock['bbox'])} numbers; the largest difference is {largest:.1e} points")
    ratio = seconds["pycocotools"] / seconds["hotcoco"]
    result = {
        "images": args.images, "boxes": args.boxes, "cpu_seconds": seconds, "ratio": ratio,
        "largest_difference": largest,
    }  # fmt: skip
    write_json(args, torch.device("cpu"), result)
    print(f"ratio evaluation {ratio:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000, help="images")
    parser.add_argument("--boxes", type=int, default=100, help="detections per image")
    output = ROOT / "docs" / "results" / f"evaluation_cpu_{date.today()}.json"
    parser.add_argument("--output", default=str(output), metavar="FILE", help="JSON file to write")
    main(parser.parse_args())
