"""Checks that OUTPUT_DIR can be written, and says what to do where it cannot."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# A log, a config and the metrics of a short run take less.
_LEAST_BYTES = 2**20
_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def check_output_dir(folder: str) -> None:
    """Checks that ``OUTPUT_DIR`` can be made and written, without making it.

    Raises:
        NotADirectoryError: it, or a folder above it, is a file.
        PermissionError: it may not be written.
        OSError: its disk is full.
    """
    if "://" in folder:
        return
    path = Path(os.path.abspath(folder))
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    said = f"OUTPUT_DIR is {folder!r}"
    if not there.is_dir():
        raise NotADirectoryError(f"{said}, but {str(there)!r} is no folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{said}, but this user may not write to {str(there)!r}; give another, or change its "
            "rights"
        )
    disk = os.statvfs(there)
    if disk.f_blocks and disk.f_bavail * disk.f_frsize < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, f"{said}, whose disk is full; make room, or give another")


@contextlib.contextmanager
def naming_output_dir(folder: str) -> Iterator[None]:
    """Puts the file and the fix into an error of a full disk or of missing rights.

    Args:
        folder: OUTPUT_DIR, which the code inside of the ``with`` writes to.

    Raises:
        OSError: in place of that of the operating system, which often names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS or "OUTPUT_DIR" in str(error):
            raise
        where = error.filename or folder
        raise OSError(
            error.errno,
            f"could not write {where!r} ({error.strerror}), which is in OUTPUT_DIR {folder!r}. "
            "Make room there, or correct its rights, and continue with --resume",
        ) from error
