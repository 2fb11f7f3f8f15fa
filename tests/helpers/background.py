"""Trainers whose evaluations show every bit of a model, fail, or wait; other processes import it.

python -m tests.helpers.background OUTPUT COCO     # trains; its background evaluation waits
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from megdet_d2 import Trainer, prepare_config
from tests.helpers.training import config

# Six updates, evaluated after the second, the fourth and the last.
KEYS = (
    "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 2, "TEST.BACKGROUND", True,
)  # fmt: skip


class Sums(DatasetEvaluator):
    """Gives sums over all detections, which differ with the last bits of a model."""

    def reset(self):
        self._sums = {"AP-scores": 0.0, "boxes": 0.0}

    def process(self, inputs, outputs):
        for output in outputs:
            found = output["instances"]
            self._sums["AP-scores"] += found.scores.double().sum().item()
            self._sums["boxes"] += found.pred_boxes.tensor.double().sum().item()

    def evaluate(self):
        return {"sums": self._sums}


class Summing(Trainer):
    """Evaluates AP and sums."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_dir=None):
        ap = super().build_evaluator(cfg, dataset_name, output_dir)
        return DatasetEvaluators([ap, Sums()])


class Failing(Summing):
    """Fails in a process beside the training."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_dir=None):
        if multiprocessing.parent_process() is not None:
            raise ValueError("no such class 'cat'")
        return super().build_evaluator(cfg, dataset_name, output_dir)


class Dying(Summing):
    """Ends its process."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        if multiprocessing.parent_process() is not None:
            os._exit(3)
        return super().test(cfg, model, evaluators)


class Waiting(Summing):
    """Writes its process's id to a file, and evaluates for an hour."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        Path(cfg.OUTPUT_DIR, "waits").write_text(str(os.getpid()))
        time.sleep(3600)


class Computing(Summing):
    """Runs no layer for some seconds: first computes as AP does, the second time it waits."""

    times = 0

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.times += 1
        Path(cfg.OUTPUT_DIR, "computes").touch()
        end = time.monotonic() + 12
        while time.monotonic() < end:
            if cls.times > 1:
                time.sleep(1)
        return {"times": {"AP": float(cls.times)}}


class Diverging(Summing):
    """Has weights that are not finite, once, before its fifth update."""

    spoilt = False

    def run_step(self):
        if self.iter == 4 and not self.spoilt:
            self.spoilt = True
            with torch.no_grad():
                self.model.backbone.fpn_output3.weight.fill_(float("nan"))
        super().run_step()


def run(kind, output, coco, *keys, resume=False):
    """Trains to the end, and returns the trainer."""
    cfg = config(output, coco, *KEYS, *keys)
    prepare_config(cfg)
    os.makedirs(output, exist_ok=True)
    seed_all_rng(cfg.SEED + comm.get_rank())
    trainer = kind(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


if __name__ == "__main__":  # as in a user's script, whose class is __main__'s
    output, coco = sys.argv[1:]
    run(Waiting, output, json.loads(coco), "TEST.EVAL_PERIOD", 1)
