"""From one command line to all processes: Detectron2's launcher, or torchrun's environment."""

import argparse
import contextlib
import faulthandler
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from megdet_d2._moved import renamed

from .rendezvous import rendezvous
from .signals import REQUEUE, forwarded_signals

logger = logging.getLogger(__name__)


def launch(main: Callable, args: argparse.Namespace, timeout: float = 600):
    """Runs ``main(args)`` in every process of the training.

    Under torchrun (``LOCAL_RANK`` is set) this process is one of them and joins the others by the
    environment. Otherwise ``args`` are Detectron2's flags and its launcher starts them:
    ``--num-gpus`` processes on each of ``--num-machines``. Without a GPU they are gloo processes
    that share the cores.

    SIGTERM and SIGINT are passed on to all of them; a training that they stop exits with the status
    ``preempt.REQUEUE``. When one of them dies the others are ended, and when this process does they
    save, stop, and in any case end.

    Args:
        timeout: seconds to wait for other machines and processes: ``MEGDET.TIMEOUT``.

    Raises:
        ValueError: more processes than GPUs; flags that contradict torchrun's; machines of
            different numbers of processes under torchrun.
        RendezvousError: see ``rendezvous``.
        SystemExit: stopped by a signal.
    """
    if {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        return _join(main, args, timeout)
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, and this machine has {gpus}; lower it, or hide the "
            "GPUs to train on CPU processes: CUDA_VISIBLE_DEVICES= python train_net.py ..."
        )
    if not gpus and args.num_gpus > 1:
        # The children's libraries read it as they load: N processes of N threads would crawl.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.num_gpus)))
    start = functools.partial(
        d2_launch,
        num_gpus_per_machine=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
        timeout=timedelta(seconds=timeout),
    )
    if args.num_gpus * args.num_machines <= 1:  # 0 is one process without a GPU
        with leaving_within(timeout):
            return start(main)  # in this process
    rendezvous(args.dist_url, args.machine_rank, args.num_machines, args.num_gpus, timeout)
    with forwarded_signals() as received:
        try:
            return start(functools.partial(_run, main, os.getpid(), timeout))
        except (ProcessExitedException, ProcessRaisedException) as error:
            if getattr(error, "exit_code", None) == REQUEUE:
                sys.exit(REQUEUE)
            if received:  # before training began: they ended as any process does
                sys.exit(128 + received[0])
            if getattr(error, "signal_name", None):
                rank = args.machine_rank * args.num_gpus + error.error_index
                logger.error(
                    f"Rank {rank} was ended by {error.signal_name}, by somebody else or for want "
                    "of memory, and the other processes with it; go on with --resume"
                )
            raise


def may_restart() -> bool:
    """Whether torchrun starts the processes again when one of them fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def find_launcher() -> str:
    """A name of the process that has started this one, and of no other before or after it."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        began = ""
    return f"{socket.gethostname()} {parent} {began}"


def limit_waiting(seconds: float) -> None:
    """Sets how long collectives wait for other processes, in all process groups there are.

    Detectron2's launcher gives it to the group of all processes only.
    """
    # Older torch has it under another name.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            set_timeout(timedelta(seconds=seconds), group)


def exit_with_parent(parent: int, timeout: float) -> None:
    """Ends this process when its parent has gone, so that no orphan keeps a GPU.

    First by SIGTERM, upon which a training saves and stops; after ``timeout`` seconds at once.

    Args:
        parent: the process id of the parent.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        logger.error(f"The launcher, process {parent}, has gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(timeout)
        logger.error(f"Still here {timeout:g} s after the launcher (MEGDET.TIMEOUT): ending")
        os._exit(1)

    threading.Thread(target=watch, name="exit_with_launcher", daemon=True).start()


def _run(main: Callable, launcher: int, timeout: float, args: argparse.Namespace):
    exit_with_parent(launcher, timeout)
    with leaving_within(timeout):
        try:
            return main(args)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # torch's launcher may take it for success


@contextlib.contextmanager
def leaving_within(timeout: float) -> Iterator[None]:
    """Ends a process that an error has come out of, should it not be gone in so many seconds.

    Python waits for the workers of its loaders, and a launcher for Python.
    """
    try:
        yield
    except BaseException:
        faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)
        raise


def _join(main: Callable, args: argparse.Namespace, timeout: float):
    exit_with_parent(os.getppid(), timeout)
    local_rank, local_size = (int(os.environ[k]) for k in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if args.num_gpus not in (1, local_size) or args.num_machines != 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} under torchrun, which "
            f"has started {local_size} processes here: leave these flags to torchrun's "
            "--nproc-per-node and --nnodes"
        )
    gpus = torch.cuda.device_count()
    if gpus and local_size > gpus:
        raise ValueError(
            f"torchrun has started {local_size} processes, and this machine has {gpus} GPUs; lower "
            "--nproc-per-node"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    limit = timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        # torchrun keeps one store over its restarts, where addresses of dead processes still stand.
        store=dist.PrefixStore(agree_on_start(store, rank, world_size, timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    _check_local_sizes(local_size)
    comm.create_local_process_group(local_size)
    comm.synchronize()
    with leaving_within(timeout):
        result = main(args)
    # Not after an error: it would wait for processes that are elsewhere.
    dist.destroy_process_group()
    return result


def agree_on_start(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A name that the processes of this start have and those of earlier ones in ``store`` had not.

    torchrun's count of restarts is none: each machine's agent counts its own. So rank 0 gives out
    a new name, and each other process shows it one of its own under that, for which rank 0 then
    writes the answer. What an earlier start has left behind answers nobody.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        TimeoutError: they did not come.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("start", mine)
        for other in range(1, world_size):
            theirs = store.get(f"{mine}/{other}").decode()
            store.set(f"answer/{theirs}", mine)
        return mine
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", mine)
        if store.check([f"answer/{mine}"]):
            return store.get(f"answer/{mine}").decode()
        time.sleep(0.1)
    raise TimeoutError(f"Rank 0 did not answer rank {rank} within {timeout:g} s (MEGDET.TIMEOUT)")


def _check_local_sizes(local_size: int) -> None:
    sizes = comm.all_gather((int(os.environ.get("GROUP_RANK", 0)), local_size))
    machines = dict(sorted(sizes))
    if len(set(machines.values())) > 1:
        listed = ", ".join(f"machine {machine}: {size}" for machine, size in machines.items())
        raise ValueError(
            f"torchrun has started different numbers of processes on the machines ({listed}), and "
            "BN groups and Detectron2 count on equal ones: give all the same --nproc-per-node, or "
            "leave the odd machine out"
        )


__getattr__ = renamed(__name__, end_with="exit_with_parent")
