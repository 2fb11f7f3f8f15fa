"""Trains with CGBN in a loop of your own, on any number of processes.

python examples/own_loop.py --num-gpus 2 --dist-url auto
"""

import logging
from argparse import Namespace
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import default_argument_parser
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

import megdet_d2

CONFIG = "Digits-Detection/megdet_R18_FPN_b32_bn32.yaml"
logger = logging.getLogger("megdet_d2")


def main(args: Namespace) -> dict:
    args.config_file = args.config_file or CONFIG
    cfg = megdet_d2.setup(args)  # reads and checks the config, resolves the schedule

    model = build_model(cfg)
    # BN size, padding and the other MODEL.CGBN keys. Every process has the same number of images.
    megdet_d2.configure_cgbn(model, cfg, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
    optimizer = build_optimizer(cfg, model)
    scheduler = megdet_d2.build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    trained = (
        DistributedDataParallel(model, broadcast_buffers=False)
        if comm.get_world_size() > 1
        else model
    )

    images = iter(build_detection_train_loader(cfg))
    trained.train()
    with EventStorage() as storage:
        for storage.iter in range(cfg.SOLVER.MAX_ITER):
            losses = trained(next(images))
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            # On GPUs, processes in different layers are noticed here; on CPUs, in the layer.
            megdet_d2.raise_if_out_of_step()
            optimizer.step()
            scheduler.step()
            if comm.is_main_process():
                logger.info(f"update {storage.iter}: loss {loss.item():.3f}")

    # The running statistics of different BN groups differ. Every process has to call this.
    megdet_d2.average_statistics(model)
    if comm.is_main_process():
        checkpointer.save("model_final")
    (test,) = cfg.DATASETS.TEST
    loader = build_detection_test_loader(cfg, test)
    evaluator = COCOEvaluator(test, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")))
    return inference_on_dataset(model, loader, evaluator)


if __name__ == "__main__":
    megdet_d2.launch(main, default_argument_parser().parse_args())
