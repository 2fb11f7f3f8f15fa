"""Makes a small panoptic data set, and predictions on it whose PQ and mIoU are known."""

import json

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.structures import Boxes, Instances

HEIGHT, WIDTH = 32, 48
BOXES = ((4, 4, 16, 20), (28, 6, 12, 16))  # x, y, width, height of category 1 and of category 2
ROAD = 100  # the category of everything else


def write_panoptic(folder, images=4):
    """Writes images of two things on a stuff class; returns Detectron2's arguments for it."""
    for name in ("images", "segments", "labels"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = [
        {"id": i + 1, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH}
        for i in range(images)
    ]
    things = [{"id": 1, "name": "car"}, {"id": 2, "name": "cow"}]
    boxes, panoptic = [], []
    for row in rows:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / row["file_name"]), pixels)
        ids, _ = truth()
        png = row["file_name"].replace(".jpg", ".png")
        # OpenCV writes BGR, and an id is R + 256 G + 256² B.
        cv2.imwrite(str(folder / "segments" / png), np.stack([0 * ids, 0 * ids, ids], axis=-1))
        cv2.imwrite(str(folder / "labels" / png), (ids == ROAD).astype(np.uint8))
        segments = []
        for label in (1, 2, ROAD):
            area = int((ids == label).sum())
            segments.append({"id": label, "category_id": label, "area": area, "iscrowd": 0})
        panoptic.append({"image_id": row["id"], "file_name": png, "segments_info": segments})
        for category, (x, y, w, h) in enumerate(BOXES, start=1):
            boxes.append({
                "id": len(boxes) + 1, "image_id": row["id"], "category_id": category,
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            })  # fmt: skip
    (folder / "boxes.json").write_text(
        json.dumps({"images": rows, "annotations": boxes, "categories": things})
    )
    categories = [
        *(row | {"isthing": 1} for row in things), {"id": ROAD, "name": "road", "isthing": 0}
    ]  # fmt: skip
    (folder / "panoptic.json").write_text(
        json.dumps({"images": rows, "annotations": panoptic, "categories": categories})
    )
    metadata = {
        "thing_classes": ["car", "cow"],
        "stuff_classes": ["things", "road"],
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
        "stuff_dataset_id_to_contiguous_id": {0: 0, ROAD: 1},
    }
    files = ("images", "segments", "panoptic.json", "labels", "boxes.json")
    return metadata, *(str(folder / name) for name in files)


def register_panoptic(name, arguments):
    """Registers it under the name that Detectron2 makes of ``name``; returns that."""
    unregister_panoptic(name)
    register_coco_panoptic_separated(name, *arguments)
    return f"{name}_separated"


def unregister_panoptic(name):
    for each in (f"{name}_separated", f"{name}_stuffonly"):
        if each in DatasetCatalog.list():
            DatasetCatalog.pop(each)
        MetadataCatalog.pop(each, None)


def truth(width_of_car=16):
    """Returns segment ids (h, w), and Detectron2's segments_info for them."""
    ids = np.full((HEIGHT, WIDTH), ROAD)
    for label, (x, y, w, h) in enumerate(BOXES, start=1):
        ids[y : y + h, x : x + (width_of_car if label == 1 else w)] = label
    segments = [
        {"id": 1, "category_id": 0, "isthing": True},
        {"id": 2, "category_id": 1, "isthing": True},
        {"id": ROAD, "category_id": 1, "isthing": False},
    ]
    return ids, segments


def predict(width_of_car=16):
    """Returns an output of PanopticFPN that cuts the car to this width, and keeps the rest."""
    ids, segments = truth(width_of_car)
    road = torch.as_tensor(ids == ROAD)
    instances = Instances((HEIGHT, WIDTH))
    corners = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
    instances.scores = torch.ones(2)
    instances.pred_classes = torch.tensor([0, 1])
    return {
        "panoptic_seg": (torch.as_tensor(ids), segments),
        "sem_seg": torch.stack([~road, road]).float(),
        "instances": instances,
    }
