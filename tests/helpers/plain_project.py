"""A Detectron2 project without a line about megdet_d2: trains a detector on random images.

python plain_project.py --config-file CONFIG [Detectron2's flags] [KEY VALUE ...]
"""

import sys

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.structures import Boxes, BoxMode, Instances


def records():
    box = {"bbox": [4, 4, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return [
        {"image_id": i, "height": 64, "width": 64, "file_name": f"{i}.jpg", "annotations": [box]}
        for i in range(8)
    ]


def read(record):
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 40]]))
    instances.gt_classes = torch.zeros(1, dtype=torch.int64)
    rng = np.random.default_rng(record["image_id"])
    image = torch.as_tensor(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8))
    return {**record, "image": image, "instances": instances}


class Trainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=read)


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    DatasetCatalog.register("random_images", records)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    print("plugin imported:", "megdet_d2" in sys.modules)
    print("CGBN layers:", [type(m).__name__ for m in trainer.model.modules()].count("CGBN"))


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
