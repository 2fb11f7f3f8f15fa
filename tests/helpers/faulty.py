"""Runs a training that fails: python -m tests.helpers.faulty FAULT OUTPUT COCO TIMEOUT.

FAULT is the name of a function of this module that takes the trainer. The launcher, the trainer and
the fault are real: signals, exceptions, stopped processes.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from megdet_d2.engine import launch
from tests.helpers.training import train

AT = 3  # the iteration of the fault
OVERRIDES = ("SOLVER.CHECKPOINT_PERIOD", 2)
EVALUATED = (*OVERRIDES, "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 2)


def strike(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(1000)


def is_due(trainer, rank=1):
    return comm.get_rank() == rank and trainer.iter == AT


def in_forward(trainer, act=strike):
    def hook(module, inputs):
        if is_due(trainer):
            act()

    trainer.checkpointer.model.roi_heads.register_forward_pre_hook(hook)


def in_backward(trainer):
    def hook(gradient):
        if is_due(trainer):
            strike()

    trainer.checkpointer.model.backbone.bottom_up.stem.conv1.weight.register_hook(hook)


def in_evaluation(trainer, act=strike):
    images = []

    def hook(module, inputs):
        if not module.training and comm.get_rank() == 1:
            images.append(1)
            if len(images) == 16:  # 12 per evaluation: in the second one, after iteration AT
                act()

    trainer.checkpointer.model.register_forward_pre_hook(hook)


def while_saving(trainer):
    """Kills rank 0 when a part of the checkpoint is written."""

    def watch():
        while not any(Path(trainer.cfg.OUTPUT_DIR).glob("*0000003.pth*")):
            time.sleep(0.001)
        strike()

    if comm.is_main_process():
        threading.Thread(target=watch, daemon=True).start()


def hung(trainer):
    """Stops rank 1, as a debugger does: it ignores signals, and its sockets stay open."""
    in_forward(trainer, lambda: strike(signal.SIGSTOP))


def rpn_of_one_rank(trainer):
    """Raises on rank 1 the error of Detectron2's RPN for scores that are not finite."""

    def fail():
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf/NaN. Training has diverged."
        )

    in_forward(trainer, fail)


def unused_on_one_rank(trainer):
    """Makes the losses of rank 1 independent of a layer, as a branch for empty images does."""

    def detach(module, inputs, output):
        return (output[0].detach(), output[1]) if is_due(trainer) else output

    trainer.checkpointer.model.roi_heads.box_predictor.register_forward_hook(detach)


def error_in_evaluation(trainer):
    def fail():
        raise RuntimeError("out of luck")

    in_evaluation(trainer, fail)


def worker_stopped(trainer):
    """Stops a loader's worker. Its pipe stays open, so the loader waits beyond its limit."""
    from tests.helpers.processes import children

    def stop():
        for worker in children(os.getpid()):
            os.kill(worker, signal.SIGSTOP)

    in_forward(trainer, stop)


def slow_steps(trainer):
    """Makes steps slow, so that the test has time to kill another process."""

    def wait(module, inputs):
        if trainer.iter == AT:
            Path(trainer.cfg.OUTPUT_DIR, "slow").touch()
        if trainer.iter >= AT:
            time.sleep(2)

    trainer.checkpointer.model.roi_heads.register_forward_pre_hook(wait)


def main(args):
    setup_logger(distributed_rank=comm.get_rank(), name="megdet_d2")
    fault = globals()[args.fault]
    overrides = EVALUATED if "evaluation" in args.fault else OVERRIDES
    # Workers take long to start on a busy machine, so only faults that need them have them.
    workers = int(args.fault in ("worker_stopped", "slow_steps"))
    overrides += ("MEGDET.TIMEOUT", args.timeout, "DATALOADER.NUM_WORKERS", workers)
    if fault is rpn_of_one_rank:  # only one rank sees it, so no rank rolls back
        overrides += ("MEGDET.ON_DIVERGENCE", "half_lr")
    train(comm.get_rank(), args.output, args.coco, overrides, fault=fault)


if __name__ == "__main__":
    fault, output, coco, timeout = sys.argv[1:]
    args = argparse.Namespace(
        fault=fault, output=output, coco=json.loads(coco), timeout=int(timeout),
        num_gpus=1 if "LOCAL_RANK" in os.environ else 2, num_machines=1, machine_rank=0,
        dist_url="auto",
    )  # fmt: skip
    launch(main, args, timeout=args.timeout)
