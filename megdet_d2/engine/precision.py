"""The number formats of a training: bfloat16 by autocast, and the precision of float32 products."""

import contextlib

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer

from .accumulation import AccumulationTrainer, accumulate

AMP_PRECISIONS = ("float16", "bfloat16")
FLOAT32_PRECISIONS = ("highest", "high", "medium")


class BFloat16Trainer(AccumulationTrainer):
    """An ``AccumulationTrainer`` whose forward runs under autocast to bfloat16, on any device.

    bfloat16 has the range of float32, so losses are not scaled and no update is skipped. Its
    checkpoints are those of a training in float32.

    Args:
        trainer: a stock trainer, whose model, loader and optimizer are used.
        steps: micro-batches per update; 1 or more.
    """

    def _precision(self) -> contextlib.AbstractContextManager:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16)


def check_precision(cfg: CfgNode, eval_only: bool = False) -> None:
    """Checks ``SOLVER.AMP.PRECISION`` and ``FLOAT32_PRECISION``.

    Args:
        cfg: a config; MODEL.DEVICE has to be the one that is used.
        eval_only: skip the keys that only a training uses.

    Raises:
        ValueError: a value is not valid, or float16 is to be used without a GPU.
    """
    amp = cfg.SOLVER.AMP
    if amp.PRECISION not in AMP_PRECISIONS:
        raise ValueError(
            f"SOLVER.AMP.PRECISION is {amp.PRECISION!r}; use one of {', '.join(AMP_PRECISIONS)}"
        )
    uses_float16 = amp.ENABLED and amp.PRECISION == "float16" and not eval_only
    if uses_float16 and cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "SOLVER.AMP.ENABLED is True, and there is no GPU, but Detectron2's mixed precision in "
            'float16 needs one; set SOLVER.AMP.PRECISION "bfloat16", or SOLVER.AMP.ENABLED False'
        )
    if cfg.FLOAT32_PRECISION and cfg.FLOAT32_PRECISION not in FLOAT32_PRECISIONS:
        raise ValueError(
            f"FLOAT32_PRECISION is {cfg.FLOAT32_PRECISION!r}; use one of "
            f'{", ".join(FLOAT32_PRECISIONS)}, or "" for torch\'s default'
        )


def build_inner_trainer(trainer: SimpleTrainer, cfg: CfgNode) -> SimpleTrainer:
    """Returns a trainer of the config's precision and micro-batches; a stock one where it will do.

    Args:
        trainer: Detectron2's, plain or in mixed precision.
        cfg: a config.
    """
    steps = cfg.MEGDET.ACCUMULATION_STEPS
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bfloat16":
        return BFloat16Trainer(trainer, steps)
    return accumulate(trainer, steps)


def set_float32_precision(cfg: CfgNode) -> None:
    """Sets ``FLOAT32_PRECISION`` for this process, as newer Detectron2's ``default_setup`` does."""
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
