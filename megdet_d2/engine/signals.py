"""Stops all processes after the same step on SIGTERM or SIGINT, with a checkpoint of that step."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from megdet_d2._moved import renamed

from .collectives import largest_over_processes

logger = logging.getLogger(__name__)

REQUEUE = 75
"""The exit status of a training that a signal has stopped and that has saved: EX_TEMPFAIL."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(HookBase):
    """Ends the training in all processes when one of them receives SIGTERM or SIGINT.

    After each step one small all-reduce tells all processes whether any of them has received a
    signal. If so they save a checkpoint of this step together and exit with status ``REQUEUE``.
    A signal in the last step changes nothing, since training ends there anyway.

    Register it before the checkpointer's and the evaluation's hook, because a scheduler waits only
    seconds before it kills.

    Args:
        checkpointer: saves the checkpoint.
        before_saving: functions that every process calls before rank 0 saves, in this order.
    """

    def __init__(self, checkpointer: Checkpointer, *before_saving: Callable[[], None]):
        self._checkpointer = checkpointer
        self._before_saving = before_saving
        self._received = 0  # the signal's number
        self._handlers: dict[signal.Signals, Any] = {}

    def before_train(self) -> None:
        """Sets the handlers; only a main thread can, so elsewhere nothing is done."""
        with contextlib.suppress(ValueError):
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def after_step(self) -> None:
        """Saves and exits if any process has received a signal.

        Raises:
            SystemExit: with status ``REQUEUE``, in every process.
        """
        number = largest_over_processes(self._received)
        iteration = self.trainer.iter
        if not number or iteration + 1 >= self.trainer.max_iter:
            return
        for prepare in self._before_saving:
            prepare()
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        comm.synchronize()  # or a launcher might kill the process that is still writing
        logger.info(
            f"{signal.Signals(number).name}: saved after iteration {iteration} and stopped with "
            f"status {REQUEUE}; continue with --resume"
        )
        sys.exit(REQUEUE)

    def after_train(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Passes SIGTERM and SIGINT on to the processes that this process has started.

    Yields:
        a list that receives the number of each signal.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                if child.pid is not None:
                    os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


__getattr__ = renamed(
    __name__,
    agree="megdet_d2.engine.collectives.largest_over_processes",
    shield_loader_worker="megdet_d2.data.stream.shield_loader_worker",
)
