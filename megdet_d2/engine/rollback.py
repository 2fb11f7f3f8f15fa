"""Returns a diverged training to a good checkpoint, and changes its schedule."""

import logging
import os
import weakref
from dataclasses import dataclass
from typing import Any

from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils import comm

from .divergence import DivergenceError
from .overrides import can_be_lowered

logger = logging.getLogger(__name__)

ON_DIVERGENCE = ("stop", "half_lr", "longer_warmup")


@dataclass(frozen=True)
class ScheduleBackoff:
    """The changes that roll-backs have made to the schedule; saved in checkpoints.

    Attributes:
        rollbacks: number of roll-backs.
        lr_factor: multiplies the learning rate.
        warmup_images: the least length of the warm-up, in images.
    """

    rollbacks: int = 0
    lr_factor: float = 1.0
    warmup_images: int = 0

    def next(self, action: str, warmup_images: int, images_seen: int) -> "ScheduleBackoff":
        """Returns the changes after one more roll-back.

        Args:
            action: "half_lr", or "longer_warmup" for one twice as long, and of at least twice
                ``images_seen``.
            warmup_images: length of the config's warm-up, in images.
            images_seen: images when training diverged.
        """
        rollbacks = self.rollbacks + 1
        if action == "half_lr":
            return ScheduleBackoff(rollbacks, self.lr_factor / 2, self.warmup_images)
        so_far = max(warmup_images, self.warmup_images)
        return ScheduleBackoff(rollbacks, self.lr_factor, 2 * max(so_far, images_seen))


class RollBack:
    """Does what ``MEGDET.ON_DIVERGENCE`` says, at most ``MEGDET.MAX_ROLLBACKS`` times in a run.

    Args:
        trainer: a ``Trainer``; only a weak reference is kept.

    Attributes:
        is_possible: whether ``Trainer.train`` has been called, which rolls back, and not an
            override alone.
    """

    def __init__(self, trainer: DefaultTrainer):
        self._trainer: Any = weakref.proxy(trainer)
        self._last_file = ""  # of the last roll-back
        self.is_possible = False

    def check(self) -> None:
        """Checks before training what a roll-back needs.

        Raises:
            ValueError: the key asks for roll-backs, and this trainer cannot make them.
        """
        trainer = self._trainer
        action, scheduler = trainer.cfg.MEGDET.ON_DIVERGENCE, trainer.scheduler
        if action != "stop" and not self.is_possible:
            raise ValueError(
                f"MEGDET.ON_DIVERGENCE is {action!r}, but {trainer.__class__.__name__} trains "
                "without a call of megdet_d2.Trainer.train, which rolls back; override run_step or "
                'hooks in place of train, or set MEGDET.ON_DIVERGENCE "stop"'
            )
        if action != "stop" and not can_be_lowered(scheduler):
            raise ValueError(
                f"MEGDET.ON_DIVERGENCE is {action!r}, but the learning rates of "
                f"{type(scheduler).__name__} do not follow from its base_lrs, so that a "
                'roll-back cannot lower them; set MEGDET.ON_DIVERGENCE "stop"'
            )

    def __call__(self, error: DivergenceError) -> None:
        """Loads the newest good checkpoint, with another schedule. Every process has to call it.

        Args:
            error: the reason.

        Raises:
            DivergenceError: no roll-back is allowed, or none is left.
        """
        trainer = self._trainer
        keys, progress, diverged = trainer.cfg.MEGDET, trainer.progress, trainer.iter
        done = progress.backoff.rollbacks
        if keys.ON_DIVERGENCE == "stop":
            raise error
        if done >= keys.MAX_ROLLBACKS:
            raise DivergenceError(
                f"{error}. MEGDET.MAX_ROLLBACKS, {keys.MAX_ROLLBACKS}, are used up"
            ) from error
        warmup_images = trainer.cfg.SOLVER.WARMUP_ITERS * trainer.layout.batch_size
        backoff = progress.backoff.next(keys.ON_DIVERGENCE, warmup_images, trainer.images_seen)
        progress.backoff = backoff
        trainer.rebuild_hooks()
        last = trainer.checkpointer.get_checkpoint_file()
        if comm.is_main_process() and last == self._last_file:
            # The second time from here: training may have begun to diverge before it was saved.
            if os.path.basename(last) != "model_start.pth":  # older ones are from another run
                trainer.checkpointer.step_back()
        comm.synchronize()
        trainer.resume_or_load(resume=True)
        self._last_file = trainer.checkpointer.get_checkpoint_file()
        trainer.restart_loader()
        logger.warning(
            f"MEGDET.ON_DIVERGENCE {keys.ON_DIVERGENCE}: roll-back {done + 1} of "
            f"{keys.MAX_ROLLBACKS}, from iteration {diverged} to {trainer.start_iter}. The "
            f"learning rate is now {backoff.lr_factor:g} x the config's; the warm-up takes at "
            f"least {backoff.warmup_images} images. Reason: {error}"
        )


def works_again(hook: HookBase) -> bool:
    """Returns True if a hook can be used after its ``after_train``; otherwise logs that it ends."""
    if not isinstance(hook, (hooks.EvalHook, hooks.CallbackHook)):
        return True
    logger.warning(f"A {type(hook).__name__} that was added to the trainer ends with the roll-back")
    return False
