"""A training that breaks by itself: python -m tests.helpers.faulty FAULT OUTPUT COCO TIMEOUT ...

The launcher, the trainer and what happens to it are the real ones. OUTPUT/pids is written when the
fault comes, so that a test knows whom to look for.
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

AT = 3  # the iteration
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
            if len(images) == 16:  # 12 an evaluation: in the second, of AT
                act()

    trainer.checkpointer.model.register_forward_pre_hook(hook)


def while_saving(trainer):
    """Rank 0, when part of the file is written."""

    def watch():
        while not any(Path(trainer.cfg.OUTPUT_DIR).glob("*0000003.pth*")):
            time.sleep(0.001)
        strike()

    if comm.is_main_process():
        threading.Thread(target=watch, daemon=True).start()


def hung(trainer):
    """Stopped, as by a debugger: it ignores whatever it is sent, and its sockets stay open."""
    in_forward(trainer, lambda: strike(signal.SIGSTOP))


def rpn_of_one_rank(trainer):
    """What Detectron2's RPN raises where its scores are not finite, on one rank alone."""

    def fail():
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf/NaN. Training has diverged."
        )

    in_forward(trainer, fail)


def error_in_evaluation(trainer):
    def fail():
        raise RuntimeError("out of luck")

    in_evaluation(trainer, fail)


def worker_stopped(trainer):
    """Its pipe stays open: the loader waits for it, whatever its own limit is."""
    from tests.helpers.processes import children

    def stop():
        for worker in children(os.getpid()):
            os.kill(worker, signal.SIGSTOP)

    in_forward(trainer, stop)


def slow_steps(trainer):
    """No fault but time for one: the test kills somebody else."""

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
    # Only where they are what it is about: they take long to start where the machine is busy.
    workers = int(args.fault in ("worker_stopped", "slow_steps"))
    overrides += ("MEGDET.TIMEOUT", args.timeout, "DATALOADER.NUM_WORKERS", workers)
    if fault is rpn_of_one_rank:  # the others know nothing of it, and so nobody rolls back
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
