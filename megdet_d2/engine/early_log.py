"""Keeps what is logged before there is a log file, and writes it there.

The checks of a config run before ``default_setup``, which opens OUTPUT_DIR/log.txt. So their
warnings and Detectron2's table of classes would be on the console at best.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

_NAMES = ("megdet_d2", "detectron2")


class _Keeper(logging.Handler):
    """Keeps records, each with the handlers that have already had it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: list[tuple[logging.LogRecord, list[logging.Handler]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in _handlers(record.name) if handler is not self]
        self.kept.append((record, others))
        if not others and logging.lastResort and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)  # as without this handler


_keeper = _Keeper()


@contextlib.contextmanager
def kept_log() -> Iterator[None]:
    """Keeps what megdet_d2 and Detectron2 log inside of a ``with``, for ``write_kept_log``."""
    _keeper.kept.clear()  # of another config
    loggers = [logging.getLogger(name) for name in _NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(_keeper)
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(_keeper)
            logger.setLevel(level)


def write_kept_log() -> None:
    """Writes the kept records to the handlers that there are now, such as that of log.txt.

    First it lets megdet_d2 log where Detectron2 does, unless a script has set up its logger. Where
    no log has been set up, the records are kept.
    """
    theirs = logging.getLogger("detectron2").handlers
    ours = logging.getLogger("megdet_d2")
    if not theirs:
        return
    if not ours.handlers:
        ours.setLevel(logging.DEBUG)
        reached = _handlers(ours.name)  # those of the root, one of which may be a console
        for handler in theirs:
            if handler not in reached and not (_is_console(handler) and reached):
                ours.addHandler(handler)
    for record, had in _keeper.kept:
        shown = record.levelno >= logging.WARNING
        for handler in _handlers(record.name):
            if handler not in had and not (shown and _is_console(handler)):
                handler.handle(record)
    _keeper.kept.clear()


def _handlers(name: str) -> list[logging.Handler]:
    found: list[logging.Handler] = []
    logger: logging.Logger | None = logging.getLogger(name)
    while logger:
        found += logger.handlers
        logger = logger.parent if logger.propagate else None
    return found


def _is_console(handler: logging.Handler) -> bool:
    return getattr(handler, "stream", None) in (sys.stdout, sys.stderr)
