"""Makes one process a group of two, as if the other had the same images and sent the same.

So one GPU, or one CPU, runs the code for several processes: all launches, messages and checks. A
collective becomes one small kernel. What it takes to wait for another process is left out.
"""

from typing import Any

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


def join_twin() -> None:
    """Starts the group of two, which is also that of Detectron2's local processes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    comm.create_local_process_group(2)
    for name in _ANSWERS:
        if hasattr(dist, name):  # older torch lacks the last
            setattr(dist, name, _ANSWERS[name])


def _all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    tensor.mul_(2)


def _all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    for place in tensors:
        place.copy_(tensor)


def _all_gather_single(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    output.view(2, -1).copy_(tensor.view(1, -1).expand(2, -1))


_ANSWERS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_single,
    "all_gather_single": _all_gather_single,
}
