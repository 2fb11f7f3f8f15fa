"""Runs small trainings on images of two shapes, and returns what they have seen and made."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from tests.helpers.paths import TINY

# Two updates of 4 images, of a detector with 14 convolutions, which is traced in seconds.
SHORT = (
    "MODEL.BACKBONE.NAME", "build_thin_resnet_fpn_backbone", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.OUT_FEATURES", ("res2", "res3"),
    "MODEL.FPN.IN_FEATURES", ("res2", "res3"), "MODEL.RPN.IN_FEATURES", ("p2", "p3"),
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]], "MODEL.ROI_HEADS.IN_FEATURES", ("p2",),
    "MODEL.ROI_BOX_HEAD.NUM_CONV", 0,
    "SOLVER.IMS_PER_BATCH", 4, "MEGDET.EPOCH_IMAGES", 4, "MEGDET.DECAY_EPOCHS", (),
    "MEGDET.DECAY_FACTORS", (), "SOLVER.CHECKPOINT_PERIOD", 100,
)  # fmt: skip


def write_images(folder: Path, images: int = 24, shape=None) -> list[list[str]]:
    """Writes images of noise with two boxes each, wide and tall; returns DATASETS.COCO's value."""
    import cv2

    rng = np.random.default_rng(0)
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for i in range(images):
        size = shape or ((48, 64) if rng.random() < 0.5 else (64, 48))
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        coco["images"].append(
            {"id": i + 1, "file_name": f"{i}.png", "height": size[0], "width": size[1]}
        )
        for j in range(2):
            box = [4 + 20 * j, 6, 20, 24]
            coco["annotations"].append(
                {"id": 2 * i + j + 1, "image_id": i + 1, "category_id": 1, "bbox": box,
                 "area": 480, "iscrowd": 0}
            )  # fmt: skip
    (folder / "images.json").write_text(json.dumps(coco))
    return [["mixed", str(folder / "images.json"), str(folder)]]


def config(output, coco, *overrides):
    """Returns the tiny config on those images, with random scale, crop and flip; not resolved."""
    from detectron2.config import get_cfg

    import megdet_d2

    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(TINY)
    cfg.merge_from_list([
        "DATASETS.COCO", coco, "DATASETS.TRAIN", ("mixed",), "DATASETS.TEST", (),
        "MODEL.ROI_HEADS.NUM_CLASSES", 1, "INPUT.MIN_SIZE_TRAIN", (48, 56, 64),
        "INPUT.CROP.ENABLED", True, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 1,
        "MEGDET.EPOCHS", 2.0, "MEGDET.DECAY_EPOCHS", (1,), "MEGDET.DECAY_FACTORS", (0.1,),
        "OUTPUT_DIR", str(output), *overrides,
    ])  # fmt: skip
    return cfg


def train(rank, output, coco, overrides=(), resume=False, fault=None, kind=None):
    """Trains to the end; returns what this process has seen and made, to compare bit by bit.

    ``fault(trainer)``, if given, breaks something before training starts. ``kind`` is the trainer's
    class, by default ``Trainer``.
    """
    import torch
    from detectron2.utils.env import seed_all_rng

    from megdet_d2.engine import Trainer, prepare_config

    cfg = config(output, coco, *overrides)
    prepare_config(cfg)
    os.makedirs(output, exist_ok=True)
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else None)
    trainer = (kind or Trainer)(cfg)
    trainer.resume_or_load(resume=resume)
    images = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: images.append(_look(inputs[0])))
    if fault:
        fault(trainer)
    trainer.train()
    histories = trainer.storage.histories()
    model = trainer.checkpointer.model
    return {
        "start": trainer.start_iter,
        "images_seen": trainer.images_seen,
        "images": images,
        "loss": dict((i, v) for v, i in histories["total_loss"].values()) if rank == 0 else None,
        "lr": dict((i, v) for v, i in histories["lr"].values()),
        "state": digests(model.state_dict()),
        "ema": digests(trainer.ema.model.state_dict()) if trainer.ema else {},
        "momentum": digests(
            {
                f"{i}.{name}": value
                for i, state in trainer.optimizer.state_dict()["state"].items()
                for name, value in state.items()
                if isinstance(value, torch.Tensor)
            }
        ),
        "groups": [
            {name: str(value) for name, value in group.items()}
            for group in trainer.optimizer.state_dict()["param_groups"]
        ],
        "rows": read_rows(output) if rank == 0 else None,
    }


def settle(model):
    """Fills the running statistics of an untrained detector, whose scores would all be 0 or 1."""
    import torch

    with torch.no_grad():
        for _ in range(30):
            noise = torch.randint(0, 256, (3, 48, 72), dtype=torch.uint8)
            model.backbone(model.preprocess_image([{"image": noise}] * 2).tensor)
            model.roi_heads.box_head(torch.randn(64, 16, 4, 4))
    return model


def read_rows(output):
    """Reads metrics.json, without the values in seconds."""
    lines = Path(output, "metrics.json").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if "time" not in k and k != "eta_seconds"}
        for line in lines
    ]


def read_detections(output, folder="inference"):
    """Reads the detections of an evaluation, sorted."""
    found = json.loads((output / folder / "coco_instances_results.json").read_text())
    return sorted((d["image_id"], round(d["score"], 4), d["category_id"]) for d in found)


def copy_checkpoint(source, output, name):
    """Makes a folder as a kill right after saving ``name`` would leave it."""
    os.makedirs(output)
    shutil.copy(os.path.join(source, name), output)
    Path(output, "last_checkpoint").write_text(name)
    if os.path.exists(os.path.join(source, "metrics.json")):
        shutil.copy(os.path.join(source, "metrics.json"), output)


def _look(batch):
    return [(image["image_id"], _digest(image["image"])) for image in batch]


def _digest(tensor):
    return hashlib.sha1(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


def digests(tensors):
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def differing(a: dict, b: dict) -> list[str]:
    """Returns the names under which two dicts of digests differ."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
