"""Lets this process be any rank of a large cluster, by torch's fake process group.

A fake group sends nothing: an all-gather returns copies of the own message. So only code whose
processes send the same can run in it, such as the checks of a config.
"""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from detectron2.utils import comm
from torch.testing._internal.distributed.fake_pg import FakeStore

from megdet_d2.engine.launch import remove_all_groups


@contextlib.contextmanager
def fake_rank(rank: int, machines: int, gpus: int) -> Iterator[None]:
    """Makes this process rank ``rank`` of ``machines`` x ``gpus`` processes, in a ``with``.

    Args:
        rank: from 0.
        machines: number of machines.
        gpus: processes of each machine, which are consecutive ranks.

    Raises:
        RuntimeError: this process is already one of several.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "a dry run needs a process without a process group: start it without torchrun"
        )
    world = machines * gpus
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    remove_all_groups()
    try:
        comm.create_local_process_group(gpus)
        yield
    finally:
        dist.destroy_process_group()
        remove_all_groups()
