"""Checks on methods that a project's trainer overrides: what is logged has to be what is done."""

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import LRMultiplier

logger = logging.getLogger(__name__)


def overrides(kind: type[DefaultTrainer], base: type[DefaultTrainer], *methods: str) -> bool:
    """Returns True if ``kind``, a subclass of ``base``, redefines one of these methods."""
    return any(
        inspect.getattr_static(kind, name) is not inspect.getattr_static(base, name)
        for name in methods
    )


def accepts(method: Callable, *arguments: Any) -> bool:
    """Returns True if a method takes these positional arguments."""
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    return True


def check_tta_method(cfg: CfgNode, kind: Any) -> None:
    """Checks that ``test_with_tta`` of a trainer's class can name the results of the average.

    Raises:
        ValueError: it takes no suffix, and ``MEGDET.EMA_DECAY`` needs one.
    """
    if not (cfg.TEST.AUG.ENABLED and cfg.MEGDET.EMA_DECAY):
        return
    if not accepts(kind.test_with_tta, cfg, None, ""):
        raise ValueError(
            f"MEGDET.EMA_DECAY and TEST.AUG.ENABLED are set, but {kind.__name__}.test_with_tta "
            "takes no suffix for the average; define it as test_with_tta"
            '(cls, cfg, model, suffix=""), or set one of the two keys off'
        )


def check_base_lr(cfg: CfgNode, optimizer: torch.optim.Optimizer, owner: str) -> None:
    """Checks that an optimizer uses the learning rate of ``MEGDET.POLICY``, if one is set.

    Other parameters may have multiples of it, but one group has the learning rate itself.

    Args:
        cfg: a resolved config.
        optimizer: as the trainer's ``build_optimizer`` has returned it.
        owner: the name of the trainer's class, for the message.

    Raises:
        ValueError: no group has it. The message names both and the fix.
    """
    expected = cfg.SOLVER.BASE_LR
    found = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
    if cfg.MEGDET.POLICY and not any(math.isclose(lr, expected, rel_tol=1e-6) for lr in found):
        listed = ", ".join(f"{lr:g}" for lr in sorted(found)[:6])
        raise ValueError(
            f"MEGDET.POLICY {cfg.MEGDET.POLICY!r} gives SOLVER.BASE_LR {expected:g}, but the "
            f"optimizer of {owner}.build_optimizer has the learning rates {listed}; take "
            'cfg.SOLVER.BASE_LR there, or set MEGDET.POLICY ""'
        )


class LearningRateCheck:
    """Compares the learning rate of each update with that of ``MEGDET.POLICY``.

    They differ where no hook steps the scheduler, where it is stepped twice, or where someone sets
    another one. In the first two updates of a run that is an error, later a warning, once.

    Args:
        policy: ``MEGDET.POLICY``; with "" nothing is compared.
        owner: the name of the trainer's class, for messages.
    """

    def __init__(self, policy: str, owner: str):
        self._policy = policy
        self._owner = owner
        self._updates = 0
        self._warned = not policy

    def check(self, trainer: DefaultTrainer) -> None:
        """Compares after an update, before any hook has changed the learning rate for the next.

        Raises:
            ValueError: they differ in one of the first two updates.
        """
        if self._warned:
            return
        self._updates += 1
        used = [group["lr"] for group in trainer.optimizer.param_groups]
        scheduler = trainer.scheduler
        is_ours = isinstance(scheduler, LRMultiplier)
        if is_ours and scheduler.last_epoch == trainer.iter:
            planned = scheduler.get_lr()
            if all(map(_is_close, used, planned)):
                return
            reason = f"MEGDET.POLICY {self._policy!r} gives {planned[0]:g}; something sets another"
        elif is_ours:
            reason = (
                f"the schedule of MEGDET.POLICY {self._policy!r} has been stepped "
                f"{scheduler.last_epoch} times; have one hooks.LRScheduler() in build_hooks, and "
                "call scheduler.step() nowhere else"
            )
        else:
            reason = (
                f"MEGDET.POLICY {self._policy!r} has another schedule, and trainer.scheduler is a "
                f"{type(scheduler).__name__}; leave trainer.scheduler as it is"
            )
        said = (
            f"{self._owner}: the update of iteration {trainer.iter} had the learning rate "
            f'{used[0]:g}, but {reason}, or set MEGDET.POLICY ""'
        )
        if self._updates <= 2:
            raise ValueError(said)
        self._warned = True
        logger.warning(said)


class GuardCheck:
    """Finds updates that a divergence guard has not checked, as an own ``run_step`` may make.

    Args:
        guard: a ``DivergenceGuard``, or another object that counts its ``checks``.
        action: ``MEGDET.ON_DIVERGENCE``; with "stop" there is a warning, once, else an error.
        owner: the name of the trainer's class, for messages.
    """

    def __init__(self, guard: Any, action: str, owner: str):
        self._guard = guard
        self._action = action
        self._owner = owner
        self._checks = 0
        self._warned = False

    def begin(self) -> None:
        """Starts an update."""
        self._checks = self._guard.checks

    def end(self) -> None:
        """Ends an update.

        Raises:
            ValueError: it was not checked, and roll-backs need that.
        """
        if self._guard.checks != self._checks:
            return
        said = (
            f"{self._owner}.run_step does not call self._trainer.after_backward() after "
            "its backward, so losses and gradients that are not finite are not noticed"
        )
        if self._action != "stop":
            raise ValueError(
                f'{said}; call it, or set MEGDET.ON_DIVERGENCE "stop", which is {self._action!r}'
            )
        if not self._warned:
            self._warned = True
            logger.warning(f"{said}; call it")


def can_be_lowered(scheduler: Any) -> bool:
    """Returns True if a scheduler's learning rates follow from its ``base_lrs``, as a closed form.

    Those of Detectron2 and DeepLab do. Some of torch's multiply the last learning rate instead, and
    schedulers of other packages have no ``base_lrs``. Then a roll-back cannot halve it.
    """
    base_lrs = getattr(scheduler, "base_lrs", None)
    if not base_lrs:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a call outside of step
        before = scheduler.get_lr()
        try:
            scheduler.base_lrs = [2 * lr for lr in base_lrs]
            after = scheduler.get_lr()
        finally:
            scheduler.base_lrs = base_lrs
    return all(_is_close(2 * a, b) for a, b in zip(before, after, strict=True))


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
