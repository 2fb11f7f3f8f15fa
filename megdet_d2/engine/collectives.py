"""A small collective on the CPU, for decisions that all processes have to take alike."""

from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm


def largest_over_processes(
    number: int, group: dist.ProcessGroup | None = None, timeout: float | None = None
) -> int:
    """Returns the largest ``number`` of all processes. Every process has to call it.

    Args:
        number: this process's value.
        group: a gloo group of all processes; None takes Detectron2's.
        timeout: seconds to wait for the other processes; None takes the group's own limit.

    Raises:
        RuntimeError: another process did not call it in time.
    """
    if comm.get_world_size() == 1:
        return number
    # On the CPU even where training is on GPUs, so that nothing waits for the GPU.
    largest = torch.tensor(number)
    group = group if group is not None else comm._get_global_gloo_group()
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True)
    work.wait() if timeout is None else work.wait(timedelta(seconds=timeout))
    return int(largest)
