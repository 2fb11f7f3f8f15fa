"""Stops all processes after the same step on SIGTERM or SIGINT, with a checkpoint of that step."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from megdet_d2._moved import renamed

from .exchange import SIGNAL, StepExchange
from .hooks import is_due
from .uninterrupted import when_written

logger = logging.getLogger(__name__)

REQUEUE = 75
"""The exit status of a training that a signal has stopped and that has saved: EX_TEMPFAIL."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Whether this process ends with its training, as those that a launcher has started do.
_ends_with_training = False


def end_with_training() -> None:
    """Lets a training that leaves by a signal ignore others until this process has exited.

    A scheduler and a launcher may both send one. The second would change the exit status.
    """
    global _ends_with_training
    _ends_with_training = True


class StopOnSignal(HookBase):
    """Ends the training in all processes when one of them receives SIGTERM or SIGINT.

    The ``StepExchange`` of each update tells all processes whether any of them has received a
    signal. If so they save a checkpoint of this step together and exit with status ``REQUEUE``. A
    signal that arrives after the exchange is in that of the next update.

    Later hooks save, evaluate and write, which may take longer than a scheduler waits before it
    kills. A signal that arrives meanwhile ends the process at once, also amid an evaluation: rank 0
    saves, and exits with the same status. Only a file that is being written is finished before. A
    launcher ends the other processes when one has exited.

    Register it before the checkpointer's and the evaluation's hook. The trainer calls
    ``put_handlers_back`` after all hooks.

    Args:
        checkpointer: saves the checkpoint.
        exchange: of all processes.
        before_saving: functions that every process calls before rank 0 saves, in this order.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        exchange: StepExchange,
        *before_saving: Callable[[], None],
    ):
        self._checkpointer = checkpointer
        self._exchange = exchange  # has the signal's number
        self._before_saving = before_saving
        self._is_leaving = False
        self._is_between = False  # whether the hooks after a step are running
        self._handlers: dict[signal.Signals, Any] = {}

    def before_train(self) -> None:
        """Sets the handlers; only a main thread can, so elsewhere nothing is done."""
        with contextlib.suppress(ValueError):
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def before_step(self) -> None:
        """Lets the step end before a signal has an effect, since it needs all processes."""
        self._is_between = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._exchange.signal:
            return
        self._exchange.signal = number
        then = (
            "leaving the evaluation"
            if self._is_between
            else "stopping after this iteration or the next"
        )
        # A handler may interrupt a write to the same stream, which Python then refuses.
        with contextlib.suppress(RuntimeError):
            logger.info(f"{signal.Signals(number).name} received: saving, and {then}")
        if self._is_between:
            when_written(self._leave)

    def after_step(self) -> None:
        """Saves and exits if any process has received a signal.

        After the last step the other hooks first save ``model_final``.

        Raises:
            SystemExit: with status ``REQUEUE``, in every process.
        """
        number = int(self._exchange.complete()[:, SIGNAL].max())
        if number:
            self._exchange.signal = number
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        if number:
            for prepare in self._before_saving:
                prepare()
            self._save()
            comm.synchronize()  # or a launcher might kill the process that is still writing
            self._exit()
        self._is_between = True
        evaluates = is_due(self.trainer, self.trainer.cfg.TEST.EVAL_PERIOD)
        if self._exchange.signal and evaluates:  # received since the exchange; the next is far
            self._leave()

    def after_train(self) -> None:
        """Stops before the last evaluation or in it; a resume then makes it.

        Raises:
            SystemExit: with status ``REQUEUE``.
        """
        if self.trainer.has_finished:
            self._is_between = True
            if self._exchange.signal and self.trainer.cfg.DATASETS.TEST:
                self._leave()

    def _leave(self) -> None:
        """Ends this process alone, since the others may be amid an evaluation."""
        saved = os.path.basename(self._checkpointer.get_checkpoint_file())
        if not (self.trainer.has_finished and saved == "model_final.pth"):
            self._save()
        self._exit()

    def _save(self) -> None:
        iteration = self.trainer.iter
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)

    def _exit(self) -> NoReturn:
        self._is_leaving = True
        name = signal.Signals(self._exchange.signal).name
        logger.info(
            f"{name}: saved after iteration {self.trainer.last_iteration} and stopped "
            f"with status {REQUEUE}; continue with --resume"
        )
        sys.exit(REQUEUE)

    def put_handlers_back(self) -> None:
        """Puts the former handlers back, unless the process is about to exit by a signal."""
        if self._is_leaving and _ends_with_training:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers = {}


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
    shield_loader_worker="megdet_d2.data.stream.shield_loader_worker",
)
