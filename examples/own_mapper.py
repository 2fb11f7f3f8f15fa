"""Trains with a mapper of your own, in a subclass of the trainer.

python examples/own_mapper.py --config-file Digits-Detection/megdet_R18_FPN_b32_bn32.yaml

Resuming stays exact: the trainer's loader keeps the place in the stream of images, and gives the
mapper the same random numbers again.
"""

from argparse import Namespace

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.engine import default_argument_parser

import megdet_d2


class Trainer(megdet_d2.Trainer):
    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool) -> DatasetMapper:
        if not is_train:
            return super().build_mapper(cfg, is_train)
        augmentations = [
            T.RandomBrightness(0.8, 1.2),
            T.RandomContrast(0.8, 1.2),
            T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, "choice"),
        ]
        return DatasetMapper(cfg, is_train=True, augmentations=augmentations)


def main(args: Namespace) -> dict | None:
    cfg = megdet_d2.setup(args)
    if args.eval_only:
        return megdet_d2.evaluate(cfg, args.resume, Trainer)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    timeout = megdet_d2.read_config(args).MEGDET.TIMEOUT
    megdet_d2.launch(main, args, timeout)
