#!/usr/bin/env python
"""Trains and evaluates a detector with Detectron2's flags; see README.md.

python train_net.py --config-file configs/COCO-Detection/megdet_R50_FPN_b16_normal.yaml --num-gpus 8
torchrun --nproc-per-node 8 train_net.py --config-file ...

``megdet train`` does the same. For a project with its own Trainer, copy this file.
"""

import argparse
from typing import Any

from detectron2.engine import default_argument_parser

from megdet_d2 import Trainer, evaluate, launch, read_config, setup


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume, Trainer)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args, timeout=read_config(args).MEGDET.TIMEOUT)
