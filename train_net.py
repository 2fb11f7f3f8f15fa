#!/usr/bin/env python
"""Trains and evaluates a detector with Detectron2's flags; see README.md.

python train_net.py --config-file configs/COCO-Detection/megdet_R50_FPN_b16_normal.yaml --num-gpus 8
torchrun --nproc-per-node 8 train_net.py --config-file ...
"""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from megdet_d2.config import load_config
from megdet_d2.engine import Trainer, launch, prepare_config
from megdet_d2.engine.weights_only import WeightsOnlyCheckpointer


def read_config(args) -> CfgNode:
    """The config of the command line, as it stands."""
    return load_config(args.config_file or None, args.opts)


def setup(args) -> CfgNode:
    """The config of the command line, resolved, checked, logged and written to OUTPUT_DIR."""
    cfg = read_config(args)
    schedule = prepare_config(cfg, args.eval_only, args.opts)
    cfg.freeze()
    dumped = Path(cfg.OUTPUT_DIR, "config.yaml")
    trained = dumped.read_bytes() if args.eval_only and dumped.is_file() else None
    default_setup(cfg, args)
    if trained is not None and comm.is_main_process():
        dumped.write_bytes(trained)  # what an evaluation does not resolve, a training has
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="megdet_d2")
    if schedule:
        logger.info("The schedule that MEGDET.POLICY comes to:\n%s", schedule)
    return cfg


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        WeightsOnlyCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args, timeout=read_config(args).MEGDET.TIMEOUT)
