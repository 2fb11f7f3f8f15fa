"""One training of an ablation's row, in processes of this machine."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from megdet_d2.engine.signals import REQUEUE

from .results import FAILURE, find_error
from .rows import Row

CONSOLE = "console.txt"


def train_arguments(row: Row, seed: int, folder: Path) -> list[str]:
    """What train_net.py is told; without the number of processes, which is the launcher's."""
    return [
        "--config-file", str(row.config_file), "--resume", *row.opts,
        "SEED", str(seed), "OUTPUT_DIR", str(folder),
    ]  # fmt: skip


class Training:
    """A row trained here, on processes of this machine, to its end or its failure.

    What it prints goes to console.txt, and why it failed to failure.json, in ``folder``.

    Args:
        on_cpu: hide the GPUs.
        jobs: trainings that share the machine.

    Raises:
        BlockingIOError: another process trains in ``folder``.
    """

    def __init__(self, row: Row, seed: int, folder: Path, script: str, on_cpu: bool, jobs: int = 1):
        self.row, self.seed, self.folder = row, seed, folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-W", "ignore", script,
            "--num-gpus", str(row.processes), "--dist-url", "auto",
            *train_arguments(row, seed, folder),
        ]  # fmt: skip
        env = dict(os.environ)
        if on_cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if jobs > 1:  # else each takes all cores for itself, and they crawl
            threads = max(1, (os.cpu_count() or 1) // (jobs * row.processes))
            env.setdefault("OMP_NUM_THREADS", str(threads))
        with open(folder / CONSOLE, "ab") as console:
            # Held as long as the training lives, which may be longer than this process.
            fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin = console.tell()  # it may hold what an earlier one printed
            self._process = subprocess.Popen(
                command, env=env, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )

    def images_done(self) -> int:
        """Images that it has trained on."""
        return min(iterations_done(self.folder) * self.row.batch_size, self.row.images)

    def poll(self) -> bool:
        """Whether the training has ended; writes failure.json if it has failed."""
        code = self._process.poll()
        # Told to stop, it has saved and is to be resumed: no failure.
        if code not in (None, 0, REQUEUE):
            failure = {"exit_code": code, "reason": failure_reason(self._printed())}
            if code < 0:
                failure["reason"] = f"killed by signal {-code}"
            unfinished = self.folder / f"{FAILURE}.tmp"
            unfinished.write_text(json.dumps(failure) + "\n")
            unfinished.replace(self.folder / FAILURE)
        return code is not None

    def stop(self) -> None:
        """Tells it and its processes to save and end; it is to be resumed."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Until it has ended."""
        self._process.wait()

    def _printed(self) -> str:
        with open(self.folder / CONSOLE, "rb") as console:
            console.seek(self._begin)
            return console.read().decode(errors="replace")


def failure_reason(text: str) -> str:
    """Why a training ended, from what it printed: its error, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return find_error(text) or (lines[-1] if lines else "it printed nothing")


def iterations_done(folder: Path) -> int:
    """Iterations until the last line of metrics.json; 0 where there is none."""
    path = folder / "metrics.json"
    if not path.is_file():
        return 0
    found = re.findall(rb'"iteration": (\d+)', path.read_bytes()[-20_000:])
    return int(found[-1]) + 1 if found else 0
