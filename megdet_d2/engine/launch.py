"""The start of all processes from one command line, by Detectron2's launcher or by torchrun."""

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
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from megdet_d2._moved import renamed
from megdet_d2.norm.groups import remove_groups

from .rendezvous import rendezvous, reserved_port
from .signals import REQUEUE, end_with_training, forwarded_signals

logger = logging.getLogger(__name__)


def launch(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, timeout: float = 600
) -> Any:
    """Runs ``main(args)`` in every process of the training.

    Under torchrun (``LOCAL_RANK`` is set) this process is one of them and joins the others by the
    environment. Otherwise Detectron2's launcher starts ``--num-gpus`` processes on each of
    ``--num-machines`` machines. Without a GPU they are gloo processes that share the cores.

    SIGTERM and SIGINT are passed on to all processes. A training that they stop exits with status
    ``signals.REQUEUE``. If one of the processes dies, the others are ended. If this process dies,
    they save and stop, and end after ``timeout`` in any case.

    Args:
        main: function to run; it has to be importable, since other processes import it.
        args: Detectron2's flags, from ``default_argument_parser``.
        timeout: seconds to wait for other machines and processes: ``MEGDET.TIMEOUT``.

    Returns:
        the result of ``main``, where this process runs it; otherwise None.

    Raises:
        ValueError: more processes than GPUs; flags that contradict torchrun's; different numbers
            of processes per machine under torchrun.
        RendezvousError: machines did not meet, see ``rendezvous``.
        SystemExit: a signal has stopped the training.
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
        args=(args,),
        timeout=timedelta(seconds=timeout),
    )
    if args.num_gpus * args.num_machines <= 1:  # 0 is one process without a GPU
        with leaving_within(timeout):
            return start(main, dist_url=args.dist_url)  # in this process
    rendezvous(args.dist_url, args.machine_rank, args.num_machines, args.num_gpus, timeout)
    with _address(args) as url, forwarded_signals() as received:
        try:
            return start(functools.partial(_run, main, os.getpid(), timeout), dist_url=url)
        except (ProcessExitedException, ProcessRaisedException) as error:
            if getattr(error, "exit_code", None) == REQUEUE:
                sys.exit(REQUEUE)
            if received:  # before training began: they ended as any process does
                sys.exit(128 + received[0])
            name = getattr(error, "signal_name", None)
            if name:
                rank = args.machine_rank * args.num_gpus + error.error_index
                logger.error(
                    f"Rank {rank} was ended by {name}, by another program or because memory ran "
                    "out, and the other processes with it; continue with --resume"
                )
            raise


@contextlib.contextmanager
def _address(args: argparse.Namespace) -> Iterator[str]:
    """Yields ``--dist-url``, "auto" on one machine as an address, and keeps its port for rank 0."""
    url = urlparse(args.dist_url)
    if args.dist_url == "auto" and args.num_machines == 1:
        with reserved_port() as port:
            yield f"tcp://127.0.0.1:{port}"
    elif url.scheme == "tcp" and args.machine_rank == 0:
        with reserved_port(url.port):
            yield args.dist_url
    else:
        yield args.dist_url


def may_restart() -> bool:
    """Returns True if torchrun starts the processes again when one of them fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def find_launcher() -> str:
    """Returns a name of the process that has started this one; no other process has the same."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        began = ""
    return f"{socket.gethostname()} {parent} {began}"


def limit_waiting(seconds: float) -> None:
    """Sets the time limit of collectives in all process groups that exist.

    Detectron2's launcher sets it for the group of all processes only.

    Args:
        seconds: the limit.
    """
    # Older versions of torch have it under another name.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            set_timeout(timedelta(seconds=seconds), group)


def exit_with_parent(parent: int, timeout: float) -> None:
    """Ends this process after its parent has ended, so that no orphan keeps a GPU.

    It first sends SIGTERM, so that a training saves and stops, and after ``timeout`` seconds ends
    the process at once.

    Args:
        parent: process id of the parent.
        timeout: seconds between both.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        logger.error(f"The launcher, process {parent}, has gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(timeout)
        logger.error(f"Still running {timeout:g} s after the launcher (MEGDET.TIMEOUT): ending")
        os._exit(1)

    threading.Thread(target=watch, name="exit_with_launcher", daemon=True).start()


def _run(main: Callable, launcher: int, timeout: float, args: argparse.Namespace) -> Any:
    exit_with_parent(launcher, timeout)
    end_with_training()
    with leaving_within(timeout):
        try:
            return main(args)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # torch's launcher may take the error for success


@contextlib.contextmanager
def leaving_within(timeout: float) -> Iterator[None]:
    """Ends the process if it is still alive ``timeout`` seconds after an error in the ``with``.

    Python waits for the workers of its loaders, and a launcher waits for Python.
    """
    try:
        yield
    except BaseException:
        faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__ or 2)
        raise


def _join(main: Callable, args: argparse.Namespace, timeout: float) -> Any:
    exit_with_parent(os.getppid(), timeout)
    end_with_training()
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
        # torchrun keeps one store over its restarts, which still has addresses of dead processes.
        store=dist.PrefixStore(name_start(store, rank, world_size, timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    _check_local_sizes(local_size)
    comm.create_local_process_group(local_size)
    comm.synchronize()
    with leaving_within(timeout):
        result = main(args)
    # Not after an error, where it would wait for processes that do something else.
    dist.destroy_process_group()
    remove_all_groups()
    return result


def remove_all_groups() -> None:
    """Removes the groups that this package and Detectron2 keep, after ``destroy_process_group``.

    Else their threads run until Python ends. One that then frees a tensor would abort the process,
    whose work is done.
    """
    remove_groups()
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()


def name_start(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """Returns a name for this start of the processes, which no earlier start in ``store`` had.

    torchrun's count of restarts would not do, since each machine's agent has another count. So rank
    0 writes a new name. Each other process writes a random number under that name, and rank 0
    answers to this number. An entry of an earlier start gets no answer.

    Args:
        store: shared by all processes, also over restarts.
        rank, world_size: of this process, and the number of processes.
        timeout: seconds to wait for the other processes.

    Raises:
        TimeoutError: rank 0 did not answer in time.
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
            f"torchrun has started different numbers of processes on the machines ({listed}), but "
            "BN groups and Detectron2 need equal ones: give all the same --nproc-per-node, or "
            "leave out the machine that differs"
        )


__getattr__ = renamed(__name__, agree_on_start="name_start", end_with="exit_with_parent")
