"""Starts real processes that a test makes fail, and checks that they have ended."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.paths import ROOT


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(*command, **env) -> subprocess.Popen:
    """Starts Python with this command, in a new session, by which its processes can be found."""
    log = tempfile.TemporaryFile("w+")  # a pipe could fill up and block the process
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env={**environment(), **env}, cwd=ROOT, start_new_session=True,
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    process.log = log
    return process


def finish(process, within=240) -> tuple[int, str]:
    """Waits ``within`` seconds at most; returns the exit status and all output, children's too."""
    status = process.wait(within)
    process.log.seek(0)
    return status, process.log.read()


def wait_for(path, process, within=240) -> None:
    deadline = time.monotonic() + within
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, finish(process, 1)[1]
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Returns the child processes of ``pid``, without Python's tracker of shared memory."""
    return sorted(p for p, f in _processes() if int(f[1]) == pid and not _is_tracker(p))


def session(pid: int) -> list[int]:
    """Returns the running processes of the session that ``pid`` began."""
    return [p for p, fields in _processes() if int(fields[3]) == pid and fields[0] != "Z"]


def all_gone(pid: int, within: float) -> float:
    """Waits until the session has no process; returns the seconds, or fails after ``within``."""
    began = time.monotonic()
    while session(pid):
        left = [Path(f"/proc/{p}/cmdline").read_text().replace("\0", " ") for p in session(pid)]
        assert time.monotonic() - began < within, f"still there after {within} s: {left}"
        time.sleep(0.2)
    return time.monotonic() - began


def _processes():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue


def _is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
