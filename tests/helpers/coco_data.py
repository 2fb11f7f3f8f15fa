"""Makes a small COCO data set that a test can spoil, and its config."""

import json
import logging

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import Image

from megdet_d2 import add_megdet_config
from megdet_d2.data import check_datasets, register_coco

WIDTH, HEIGHT = 64, 48
# Out of order and with gaps, as in COCO itself.
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "owl"}]


class Data:
    """Writes a COCO data set of two images and three objects; a test changes ``json`` first."""

    def __init__(self, folder, name="my_train"):
        self.name, self.path, self.root = name, folder / f"{name}.json", folder / f"{name}_images"
        self.root.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        images = [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (5, 9)
        ]
        for image in images:
            Image.fromarray(pixels).save(self.root / image["file_name"])
        boxes = [(5, 3, [4, 6, 20, 10]), (5, 90, [30.5, 2, 16, 40]), (9, 7, [0, 0, 64, 48])]
        annotations = [
            {
                "id": i + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (image, category, box) in enumerate(boxes)
        ]
        self.json = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        self.json = json.loads(json.dumps(self.json))

    @property
    def triple(self):
        return [self.name, str(self.path), str(self.root)]

    def write(self):
        self.path.write_text(json.dumps(self.json))
        return self


def coco_config(train=(), test=(), architecture="GeneralizedRCNN", num_classes=3):
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.DATASETS.COCO = [data.triple for data in (*train, *test)]
    cfg.DATASETS.TRAIN = tuple(data.name for data in train)
    cfg.DATASETS.TEST = tuple(data.name for data in test)
    return cfg


def check(cfg):
    register_coco(cfg.DATASETS.COCO, cfg.MODEL.MASK_ON)
    check_datasets(cfg)


def refusal(cfg, error=ValueError):
    """Returns the message of the error that refuses the config."""
    with pytest.raises(error) as caught:
        check(cfg)
    return str(caught.value)


def assert_says(message, *parts):
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def warnings_in(caplog):
    """Returns the messages from WARNING on; an earlier test may have let others through."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
