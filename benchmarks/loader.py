"""Times the mapper of INPUT.BACKEND "torchvision" beside Detectron2's, and the decoder alone.

    python benchmarks/loader.py             # photographs of scikit-image
    python benchmarks/loader.py --images FOLDER

Each JPEG file is scaled to 640 x 480 once, has as many objects as COCO's images have on average, 7,
and is loaded as Detectron2 trains: shortest edge 640 to 800, flipped at random. The mappers take
turns within one loop, in one thread, so other programs on the machine affect all of them alike.
Times are CPU seconds. It prints images per second and core, best of all rounds, and last the ratio
for boxes. "decoder" reads and decodes the files and does nothing else: the limit.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from norm import write_json
from PIL import Image
from tabulate import tabulate

from megdet_d2.data.backend import TorchvisionMapper, read_image
from megdet_d2.data.stream import seeded

WIDTH, HEIGHT, OBJECTS, POINTS = 640, 480, 7, 24
ROOT = Path(__file__).parents[1]


def photographs(folder: str) -> list[Image.Image]:
    """Returns the photographs of a folder, or those of scikit-image."""
    if folder:
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".png"))
        return [Image.open(path).convert("RGB") for path in paths[:16]]
    from skimage import data

    return [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee")]


def write_images(folder: Path, images: list[Image.Image]) -> list[dict[str, Any]]:
    """Writes the images as JPEG files; returns their entries in Detectron2's format."""
    rng, entries = np.random.default_rng(0), []
    for i, image in enumerate(images):
        path = folder / f"{i}.jpg"
        image.resize((WIDTH, HEIGHT)).save(path, quality=90)
        annotations = []
        for _ in range(OBJECTS):
            corner = rng.uniform(0, (WIDTH - 200, HEIGHT - 200))
            size = rng.uniform(20, 200, 2)
            angles = np.sort(rng.uniform(0, 2 * np.pi, POINTS))
            outline = corner + size / 2 * (1 + np.stack([np.cos(angles), np.sin(angles)], 1))
            annotations.append({
                "bbox": [*corner.tolist(), *size.tolist()], "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0, "iscrowd": 0, "segmentation": [outline.ravel().tolist()],
            })  # fmt: skip
        entries.append({"file_name": str(path), "width": WIDTH, "height": HEIGHT,
                        "annotations": annotations})  # fmt: skip
    return entries


def contenders() -> dict[str, Callable[[dict], Any]]:
    """Returns the functions to time, each of which takes an entry."""
    found: dict[str, Callable[[dict], Any]] = {}
    for masks in (False, True):
        cfg = get_cfg()
        cfg.MODEL.MASK_ON = masks
        stock = DatasetMapper(cfg, is_train=True)
        kind = "masks" if masks else "boxes"
        found[f"Detectron2, {kind}"] = stock
        found[f"torchvision, {kind}"] = TorchvisionMapper(stock)
    found["decoder"] = lambda entry: read_image(entry["file_name"], "BGR")
    return found


def time_all(entries: list[dict], rounds: int) -> dict[str, float]:
    """Returns the CPU seconds per image, the least of all rounds, by contender."""
    functions = contenders()
    best = dict.fromkeys(functions, float("inf"))
    for i in range(rounds):
        for name, function in functions.items():
            with seeded(i):  # the same sizes and flips for all
                began = time.process_time()
                for entry in entries:
                    function(entry)
                taken = time.process_time() - began
            best[name] = min(best[name], taken / len(entries))
    return best


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        entries = write_images(Path(folder), photographs(args.images))
        best = time_all(entries * 4, args.rounds)
    table = [(name, 1e3 * seconds, 1 / seconds) for name, seconds in best.items()]
    print(tabulate(table, ("", "CPU ms an image", "images/s a core"), "pipe", floatfmt=".1f"))
    ratios = {
        kind: best[f"Detectron2, {kind}"] / best[f"torchvision, {kind}"]
        for kind in ("masks", "boxes")
    }
    write_json(args, torch.device("cpu"), {"cpu_seconds_per_image": best, "ratios": ratios})
    print(f"ratio loader masks {ratios['masks']:.1f}")
    print(f"ratio loader {ratios['boxes']:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", default="", metavar="FOLDER", help="photographs to load")
    parser.add_argument("--rounds", type=int, default=20, help="timed repetitions")
    output = ROOT / "docs" / "results" / f"loader_cpu_{date.today()}.json"
    parser.add_argument("--output", default=str(output), metavar="FILE", help="JSON file to write")
    main(parser.parse_args())
