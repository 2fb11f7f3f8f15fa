"""From one command line to all processes: Detectron2's launcher, or torchrun's environment."""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .preempt import REQUEUE, forwarded_signals


def launch(main: Callable, args: argparse.Namespace):
    """Runs ``main(args)`` in every process of the training.

    Under torchrun (``LOCAL_RANK`` is set) this process is one of them and joins the others by the
    environment. Otherwise ``args`` are Detectron2's flags and its launcher starts them:
    ``--num-gpus`` processes on each of ``--num-machines``. Without a GPU they are gloo processes
    that share the cores.

    SIGTERM and SIGINT are passed on to all of them; a training that they stop exits with the status
    ``preempt.REQUEUE``.

    Raises:
        ValueError: more processes than GPUs; flags that contradict torchrun's.
        SystemExit: stopped by a signal.
    """
    if {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        return _join(main, args)
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
    )
    if args.num_gpus * args.num_machines == 1:
        return start(main)  # in this process
    with forwarded_signals() as received:
        try:
            return start(functools.partial(_run, main))
        except (ProcessExitedException, ProcessRaisedException) as error:
            if getattr(error, "exit_code", None) == REQUEUE:
                sys.exit(REQUEUE)
            if received:  # before training began: they ended as any process does
                sys.exit(128 + received[0])
            raise


def restarts() -> tuple[int, int]:
    """How often torchrun has restarted the processes, and how often it may; (0, 0) without it."""
    names = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
    done, most = (int(os.environ.get(name, 0)) for name in names)
    return done, most


def _run(main: Callable, args: argparse.Namespace):
    try:
        return main(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # torch's launcher may take it for success


def _join(main: Callable, args: argparse.Namespace):
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
    store, rank, world_size = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        # torchrun keeps one store over its restarts, where addresses of dead processes still stand.
        store=dist.PrefixStore(f"restart_{restarts()[0]}", store),
        rank=rank,
        world_size=world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    try:
        comm.create_local_process_group(local_size)
        comm.synchronize()
        return main(args)
    finally:
        dist.destroy_process_group()
