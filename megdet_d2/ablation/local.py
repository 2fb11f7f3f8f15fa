"""Trains the jobs of an ablation in processes of this machine."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from megdet_d2.engine.signals import REQUEUE
from megdet_d2.schedule.build import phases_from_config

from .job import Job
from .results import FAILURE, find_error, read_result

CONSOLE = "console.txt"
POLL_SECONDS = 1.0


def train_all(
    jobs: Sequence[Job],
    program: Sequence[str],
    on_cpu: bool,
    parallel: int,
    on_end: Callable[[], object],
) -> None:
    """Trains the jobs in their order, with a progress bar that counts images.

    When this process is stopped, by a signal or an error, the trainings save and stop too.

    Args:
        program: the words after ``python`` that start a training: a script, or -m and a module.
        on_cpu: hide the GPUs.
        parallel: number of trainings at a time.
        on_end: is called after each training.
    """
    pending = list(jobs)
    running: list[Training] = []
    finished_images = 0
    with (
        _signals_exit(),
        tqdm(
            total=sum(job.row.images for job in jobs),
            unit=" images",
            smoothing=0.05,
            dynamic_ncols=True,
        ) as bar,
    ):
        try:
            while pending or running:
                while pending and len(running) < parallel:
                    job = pending.pop(0)
                    try:
                        running.append(Training(job, program, on_cpu, parallel))
                    except BlockingIOError:
                        bar.write(f"{job.folder}: another process trains it; skipped", sys.stderr)
                        bar.total -= job.row.images
                    started = f"{len(jobs) - len(pending)}/{len(jobs)} "
                    bar.set_description(started + ", ".join(t.job.name for t in running))
                time.sleep(POLL_SECONDS)
                for training in [t for t in running if t.poll()]:
                    running.remove(training)
                    job, result = training.job, read_result(training.job)
                    done = job.row.images if result.status == "done" else training.images_done()
                    finished_images += done
                    bar.total -= job.row.images - done  # a failed training is shorter than planned
                    if result.status != "done":
                        bar.write(f"{job.name}: {result.status}: {result.reason}", sys.stderr)
                    on_end()
                bar.update(finished_images + sum(t.images_done() for t in running) - bar.n)
        finally:  # also on an error or a signal: no training goes on alone
            for training in running:
                training.stop()
            for training in running:
                training.wait()


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into ``SystemExit``, so that ``train_all`` stops its trainings."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Training:
    """A job that runs on this machine, to its end or its failure.

    Its output goes to console.txt in the job's folder, the reason of an error to failure.json.

    Args:
        program: the words after ``python`` that start a training: a script, or -m and a module.
        on_cpu: hide the GPUs.
        parallel: number of trainings that share the machine.

    Raises:
        BlockingIOError: another process trains in this folder.
    """

    def __init__(self, job: Job, program: Sequence[str], on_cpu: bool, parallel: int = 1) -> None:
        self.job = job
        job.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-W", "ignore", *program,
            "--num-gpus", str(job.row.processes), "--dist-url", "auto", *job.train_arguments(),
        ]  # fmt: skip
        env = dict(os.environ)
        if on_cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if parallel > 1:  # otherwise each takes all cores, and all become slow
            threads = max(1, (os.cpu_count() or 1) // (parallel * job.row.processes))
            env.setdefault("OMP_NUM_THREADS", str(threads))
        with open(job.folder / CONSOLE, "ab") as console:
            # The training inherits the lock, and holds it even if it outlives this process.
            fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin = console.tell()  # the output of an earlier training comes before
            self._process = subprocess.Popen(
                command, env=env, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )

    def images_done(self) -> int:
        """Returns the number of images that the training has seen."""
        row = self.job.row
        done = phases_from_config(row.cfg).images(iterations_done(self.job.folder))
        return min(done, row.images)

    def poll(self) -> bool:
        """Returns True if the training has ended; writes failure.json if an error ended it."""
        code = self._process.poll()
        # REQUEUE: a signal stopped it, and it has saved. It can be resumed and has not failed.
        if code not in (None, 0, REQUEUE):
            failure = {"exit_code": code, "reason": failure_reason(self._printed())}
            if code < 0:
                failure["reason"] = f"killed by signal {-code}"
            unfinished = self.job.folder / f"{FAILURE}.tmp"
            unfinished.write_text(json.dumps(failure) + "\n")
            unfinished.replace(self.job.folder / FAILURE)
        return code is not None

    def stop(self) -> None:
        """Sends SIGTERM to all its processes: they save and end, and can be resumed."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Waits until the training has ended."""
        self._process.wait()

    def _printed(self) -> str:
        with open(self.job.folder / CONSOLE, "rb") as console:
            console.seek(self._begin)
            return console.read().decode(errors="replace")


def failure_reason(text: str) -> str:
    """Returns the error in the output of a training that it ended, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return find_error(text) or (lines[-1] if lines else "it printed nothing")


def iterations_done(folder: Path) -> int:
    """Returns the iteration of the last line of metrics.json plus 1; 0 without such a line."""
    path = folder / "metrics.json"
    if not path.is_file():
        return 0
    found = re.findall(rb'"iteration": (\d+)', path.read_bytes()[-20_000:])
    return int(found[-1]) + 1 if found else 0
