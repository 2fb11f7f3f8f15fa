"""Measures the variances of AGVM in the updates of a training."""

import logging
import weakref
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, optim

from megdet_d2.optim.agvm import AGVM, relative_variances
from megdet_d2.optim.halves import Halves, check_halves
from megdet_d2.schedule.build import phases_from_config

from .progress import Layout, TrainingProgress

logger = logging.getLogger(__name__)


class Modulation:
    """Updates AGVM's factors in the updates in which a measurement is due.

    Each measurement writes the factors μ as scalars "agvm/" and the module. Modules whose gradient
    is zero in a half, or not finite under a ``GradScaler``, keep their factor.

    Args:
        optimizer: whose factors are updated.
        progress: knows the end of the warm-up; only a weak reference is kept.
        interval: updates between two measurements.
        after_warmup: updates between the end of the warm-up and the first measurement.
        owner: the name of the trainer's class, for messages.
    """

    def __init__(
        self,
        optimizer: AGVM,
        progress: TrainingProgress,
        interval: int,
        after_warmup: int,
        owner: str,
    ):
        self._optimizer = optimizer
        self._progress: TrainingProgress = weakref.proxy(progress)
        self._interval, self._after_warmup = interval, after_warmup
        self._owner = owner
        self._measured = -1  # the iteration of the last measurement

    def is_due(self, iteration: int) -> bool:
        """Returns True if the variances are measured in this iteration.

        It is the same in all processes, and follows from the iteration alone after a resume.
        """
        past = iteration - self._progress.warmup_iters - self._after_warmup
        return past >= 0 and past % self._interval == 0

    def begin(self, iteration: int) -> Halves | None:
        """Returns what collects the gradients of both halves; None where nothing is measured."""
        if not self.is_due(iteration):
            return None
        self._measured = iteration
        groups = self._optimizer.param_groups
        return Halves([parameter for group in groups for parameter in group["params"]])

    def end(self, halves: Halves) -> None:
        """Updates the factors. Every process has to call it, after gradients are averaged."""
        modules, variances = relative_variances(self._pairs(halves))
        if comm.get_world_size() > 1:
            dist.broadcast(variances, 0)  # GPUs of two kinds may differ in the last bit
        self._optimizer.update_factors(dict(zip(modules, variances.tolist(), strict=True)))
        storage = get_event_storage()
        for module, factor in self._optimizer.factors.items():
            storage.put_scalar(f"agvm/{module}", factor, smoothing_hint=False)

    def _pairs(self, halves: Halves) -> Iterator[tuple[str, Tensor, Tensor]]:
        groups = self._optimizer.param_groups
        modules = [group["module"] for group in groups for _ in group["params"]]
        for module, (first, second) in zip(modules, halves.split(), strict=True):
            yield module, first, second

    def check(self, iteration: int) -> None:
        """Checks that an update has measured what was due.

        Raises:
            ValueError: it has not, because an own ``run_step`` makes the updates.
        """
        if self.is_due(iteration) and self._measured != iteration:
            self.refuse(f"{self._owner}.run_step")

    def refuse(self, who: str) -> NoReturn:
        """Raises a ``ValueError`` about updates that are made without measurements.

        Args:
            who: the method or class that makes them.
        """
        raise ValueError(
            f"MEGDET.OPTIMIZER is 'agvm', but {who} makes its updates itself, so the gradients of "
            "two halves of a mini-batch are not compared; call Detectron2's run_step there, or set "
            "MEGDET.OPTIMIZER 'sgd'"
        )


def check_modulation(cfg: CfgNode) -> None:
    """Checks that all updates which are measured have two halves.

    Args:
        cfg: a resolved config with ``MEGDET.OPTIMIZER`` "agvm".

    Raises:
        ValueError: there is one process, and updates of one micro-batch.
    """
    first = _first_measurement(cfg)
    # The mini-batch never shrinks, so no later update has fewer micro-batches.
    batch_size = phases_from_config(cfg).batch_size(first)
    check_halves(
        Layout.from_config(cfg).at(batch_size).accumulation_steps,
        f"in iteration {first} of MEGDET.BATCH_WARMUP" if cfg.MEGDET.BATCH_WARMUP else "",
    )


def build_modulation(
    cfg: CfgNode, optimizer: optim.Optimizer, progress: TrainingProgress, owner: str
) -> Modulation | None:
    """Returns the measurements of ``MEGDET.AGVM``; None for another optimizer.

    The log says how many there will be. It warns if there will be none.

    Args:
        cfg: a resolved config.
        optimizer: the trainer's.
        progress: the trainer's.
        owner: the name of the trainer's class, for messages.

    Raises:
        ValueError: see ``check_modulation``.
    """
    if not isinstance(optimizer, AGVM):
        return None
    check_modulation(cfg)
    keys = cfg.MEGDET.AGVM
    _describe(cfg)
    return Modulation(optimizer, progress, keys.INTERVAL, keys.AFTER_WARMUP, owner)


def _first_measurement(cfg: CfgNode) -> int:
    return cfg.SOLVER.WARMUP_ITERS + cfg.MEGDET.AGVM.AFTER_WARMUP


def _describe(cfg: CfgNode) -> None:
    keys, first, end = cfg.MEGDET.AGVM, _first_measurement(cfg), cfg.SOLVER.MAX_ITER
    if first >= end:
        room = end - cfg.SOLVER.WARMUP_ITERS
        fix = f"set MEGDET.AGVM.AFTER_WARMUP below {room}" if room > 0 else "shorten the warm-up"
        logger.warning(
            f"MEGDET.OPTIMIZER is 'agvm', but MEGDET.AGVM.AFTER_WARMUP {keys.AFTER_WARMUP} after a "
            f"warm-up of {cfg.SOLVER.WARMUP_ITERS} updates is no less than the {end} of the "
            f"training, so no gradient variance is measured, and this is a training with SGD; {fix}"
        )
        return
    count = -(-(end - first) // keys.INTERVAL)
    moved = 1 - keys.SMOOTHING**count
    logger.info(
        f"AGVM measures {count} times from iteration {first} on: at the end its factors have gone "
        f"{moved:.0%} of the way from 1 (MEGDET.AGVM.INTERVAL {keys.INTERVAL}, SMOOTHING "
        f"{keys.SMOOTHING:g})"
    )
