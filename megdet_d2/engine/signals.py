"""SIGTERM and SIGINT: every process stops after the same step, with a checkpoint of it."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing
from detectron2.engine import HookBase
from detectron2.utils import comm

from .checkpoint import Checkpointer

logger = logging.getLogger(__name__)

REQUEUE = 75
"""The exit status of a training that was told to stop and has saved: EX_TEMPFAIL, "try again"."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(HookBase):
    """Ends the training in all processes when one of them is sent SIGTERM or SIGINT.

    After each step the processes agree, by one small all-reduce, whether any of them was told to
    stop. If so they save a checkpoint of this step together and exit with the status ``REQUEUE``.
    In the last step training just ends as it would have.

    Stands before the checkpointer and the evaluation hook: a scheduler grants seconds.

    Args:
        checkpointer: gathers and saves.
        before_saving: called in every process, for what a checkpoint holds besides.
    """

    def __init__(self, checkpointer: Checkpointer, before_saving: Callable[[], None]):
        self._checkpointer = checkpointer
        self._before_saving = before_saving
        self._received = 0  # the signal's number
        self._handlers = {}

    def before_train(self):
        with contextlib.suppress(ValueError):  # only a main thread may set handlers
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number, frame):
        self._received = number

    def after_step(self):
        number = agree(self._received)
        done = self.trainer.iter + 1
        if not number or done >= self.trainer.max_iter:
            return
        self._before_saving()
        self._checkpointer.gather()
        self._checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        comm.synchronize()  # or a launcher might end the process that still writes
        logger.info(
            f"{signal.Signals(number).name}: saved after iteration {self.trainer.iter} and stopped "
            f"with status {REQUEUE}; go on with --resume"
        )
        sys.exit(REQUEUE)

    def after_train(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def agree(number: int) -> int:
    """The largest ``number`` of all processes. Every process has to call it."""
    if comm.get_world_size() == 1:
        return number
    # On CPU also where training is on GPUs: nothing then waits for the GPU.
    flag = torch.tensor(number)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return int(flag)


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Passes SIGTERM and SIGINT on to the processes that this one has started.

    Yields:
        the list of the signals' numbers, as they come.
    """
    received: list[int] = []

    def forward(number, frame):
        received.append(number)
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
