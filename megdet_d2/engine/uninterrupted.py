"""Lets a handler of signals wait until a file is written.

A handler that raises ``SystemExit`` amid torch's writer spoils the file. The writer may also raise
another error in its place, which hides why the process ends.
"""

import contextlib
from collections.abc import Callable, Iterator

_writing = 0
_waiting: list[Callable[[], None]] = []


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets the actions of ``when_written`` wait to its end. If writing fails, they are left out."""
    global _writing
    _writing += 1
    try:
        yield
    except BaseException:
        _waiting.clear()
        raise
    finally:
        _writing -= 1
    while _waiting and not _writing:
        _waiting.pop()()


def when_written(action: Callable[[], None]) -> None:
    """Calls ``action`` now, or after the file that is being written.

    Args:
        action: may raise ``SystemExit``.
    """
    if _writing:
        _waiting.append(action)
    else:
        action()
