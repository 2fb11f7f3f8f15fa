"""A Detectron2 project that has never heard of megdet_d2: trains a detector on random images.

python plain_project.py CONFIG KEY VALUE ...
"""

import sys

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from detectron2.structures import BoxMode


def images():
    box = {"bbox": [4, 4, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return [
        {"image_id": i, "height": 64, "width": 64, "file_name": f"{i}.jpg", "annotations": [box]}
        for i in range(8)
    ]


class Mapper:
    def __call__(self, record):
        from detectron2.structures import Boxes, Instances

        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 40]]))
        instances.gt_classes = torch.zeros(1, dtype=torch.int64)
        rng = np.random.default_rng(record["image_id"])
        image = torch.as_tensor(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8))
        return {**record, "image": image, "instances": instances}


class Trainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        from detectron2.data import build_detection_train_loader

        return build_detection_train_loader(cfg, mapper=Mapper())


if __name__ == "__main__":
    cfg = get_cfg()
    cfg.merge_from_file(sys.argv[1])
    cfg.merge_from_list(sys.argv[2:])
    DatasetCatalog.register("random_images", images)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    names = [type(m).__name__ for m in trainer.model.modules()]
    print("plugin imported:", "megdet_d2" in sys.modules)
    print("CGBN layers:", names.count("CrossGPUBatchNorm"))
