"""Ends a process whose training step takes too long, after printing the stacks of all threads."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

_STDERR = sys.__stderr__ or 2  # a notebook's sys.stderr has no file descriptor


class Watchdog:
    """A last resort for waits that no other limit ends, such as a stopped loader worker.

    One thread watches all steps. ``faulthandler.dump_traceback_later`` would start a thread for
    each step and wait until it has started and ended: milliseconds where the cores are busy.

    Args:
        seconds: limit of one step.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._deadline: float | None = None
        self._stop: threading.Event | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Ends the process if the inside of a ``with`` takes too long."""
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()
        self._deadline = time.monotonic() + self._seconds
        try:
            yield
        finally:
            self._deadline = None

    def stop(self) -> None:
        """Ends the thread; ``watch`` starts another."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(min(1.0, self._seconds / 10)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                print(f"A step has taken longer than {self._seconds:g} s", file=sys.stderr)
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                os._exit(1)
