"""Real processes that are to fail: started, watched, and seen to have gone."""

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
    """In a session of its own, so that all it leaves behind can be found."""
    log = tempfile.TemporaryFile("w+")  # a pipe would fill up while a test waits for another
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env={**environment(), **env}, cwd=ROOT, start_new_session=True,
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    process.log = log
    return process


def finish(process, within=240) -> tuple[int, str]:
    """Its status, within so many seconds, and all that it and its children wrote."""
    status = process.wait(within)
    process.log.seek(0)
    return status, process.log.read()


def wait_for(path, process, within=240) -> None:
    deadline = time.monotonic() + within
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, finish(process, 1)[1]
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that a process has started, by /proc; not Python's helper of shared memory."""
    return [p for p, fields in _processes() if int(fields[1]) == pid and not _is_tracker(p)]


def session(pid: int) -> list[int]:
    """Living processes of the session that ``pid`` began."""
    return [p for p, fields in _processes() if int(fields[3]) == pid and fields[0] != "Z"]


def all_gone(pid: int, within: float) -> float:
    """Seconds until no process of the session is left; fails after ``within``."""
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
        except OSError:  # it has gone
            continue


def _is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
