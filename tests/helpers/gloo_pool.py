"""Keeps real gloo processes for many tests: starting them takes seconds, a task milliseconds.

A task is a function of a test module. Every process calls ``task(rank, *args)``, and the test gets
a list of the results. A task that raises on a rank, or takes too long, fails the test. The pool is
then replaced, because its processes may be out of step.
"""

import multiprocessing
import os
import time
import traceback

from megdet_d2.engine.rendezvous import reserved_port

THREADS = "1"
START_TIMEOUT = 200  # seconds


class RankError(AssertionError):
    """Reports a task that raised on one rank or more; the message has the tracebacks of all."""


class GlooPool:
    def __init__(self, world_size: int, ranks_per_machine: int | None = None):
        self.world_size = world_size
        self._ranks_per_machine = ranks_per_machine or world_size
        self._workers: list = []

    def run(self, task, *args, timeout: float = 60) -> list:
        """Calls ``task(rank, *args)`` in every process, and returns the results by rank."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((task, args))
        replies, deadline = [], time.monotonic() + timeout
        for rank, (_, pipe) in enumerate(self._workers):
            try:
                if not pipe.poll(max(0.1, deadline - time.monotonic())):
                    replies.append((False, f"rank {rank}: no answer within {timeout} s"))
                    continue
                replies.append(pipe.recv())
            except EOFError:
                replies.append((False, f"rank {rank}: the process died"))
        if not all(ok for ok, _ in replies):
            self.close()
            raise RankError("\n".join(str(reply) for ok, reply in replies if not ok))
        return [reply for _, reply in replies]

    def _start(self) -> None:
        # Forks come from a server that has imported everything once and has no threads yet. Eight
        # processes are ready as soon as one.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megdet_d2", "pytest"])
        os.environ["OMP_NUM_THREADS"] = THREADS  # before the server starts: its forks inherit it
        with reserved_port() as port:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(rank, self.world_size, self._ranks_per_machine, port, theirs),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._workers.append((process, ours))
            for _, pipe in self._workers:  # imports take long and do not count as a task's time
                if not pipe.poll(START_TIMEOUT) or pipe.recv() != "ready":
                    self.close()
                    raise RankError(f"a process of the pool was not ready within {START_TIMEOUT} s")

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()
        self._workers = []


def _serve(rank: int, world_size: int, ranks_per_machine: int, port: int, pipe) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from detectron2.utils import comm

    torch.set_num_threads(int(THREADS))
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    comm.create_local_process_group(ranks_per_machine)
    pipe.send("ready")
    while True:
        try:
            task, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            torch.manual_seed(rank)
            reply = True, task(rank, *args)
        except Exception:
            reply = False, f"rank {rank}:\n{traceback.format_exc()}"
        pipe.send(reply)
