"""The process groups for a BN size, the number of images that share statistics (MegDet Table 3).

A group is a run of consecutive ranks. So it stays inside one machine (§3.3) if its size divides the
number of processes there. All processes create the groups in the same order, before training.

DDP has no part in these groups. It reduces gradients on torch's default group, in an order that
differs between processes where one of them does not use a parameter.
"""

from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .collective import OutOfStepError, prepare


class SelfGroup:
    """The type of ``SELF``, the group of this process alone, which needs no communicator."""

    def __repr__(self) -> str:
        return "SELF"


SELF = SelfGroup()
BNGroup: TypeAlias = "dist.ProcessGroup | DeviceMesh | SelfGroup | None"

_cache: dict[tuple[dist.ProcessGroup | None, int], BNGroup] = {}
_world_names: dict[dist.ProcessGroup | None, str] = {}


def ranks_per_group(bn_size: int, images_per_gpu: int, ranks: int) -> int:
    """Returns the number of processes that together see ``bn_size`` images.

    Args:
        bn_size: images in a group; -1 for the images of all ``ranks`` processes.
        images_per_gpu: images that one process sees in one forward.
        ranks: processes to divide into groups: those of a machine, or all.

    Raises:
        ValueError: no whole number of processes has ``bn_size`` images, or their number does not
            divide ``ranks``. The message lists the valid sizes.
    """
    if bn_size == -1:
        return ranks
    possible = [k * images_per_gpu for k in range(1, ranks + 1) if ranks % k == 0]
    if bn_size not in possible:
        nearest = sorted(sorted(possible, key=lambda size: (abs(size - bn_size), size))[:2])
        raise ValueError(
            f"MODEL.CGBN.BN_SIZE is {bn_size}, but no equal groups of the {ranks} processes with "
            f"{images_per_gpu} images each have this size. Nearest valid sizes: "
            f"{' and '.join(map(str, nearest))} (all: {', '.join(map(str, possible))}, or -1). "
            "MODEL.CGBN.CROSS_MACHINE allows groups that span machines. For no batch statistics at "
            'all, the paper\'s "BN size 0", use NORM: "FrozenBN".'
        )
    return bn_size // images_per_gpu


def consecutive_group(size: int) -> BNGroup:
    """Returns this process's group when the world is divided into runs of ``size`` ranks.

    Every process has to call it, in the same order. A second call with the same size returns the
    same group. Without a process group, or for ``size`` 1, it returns ``SELF``.
    """
    if not dist.is_initialized() or size == 1:
        return SELF
    key = (dist.group.WORLD, size)
    if key not in _cache:
        # A new group even for the whole world. DDP reduces on the default group in backward, and a
        # layer's reduction there would wait for it.
        group, _ = dist.new_subgroups(size, timeout=_world_timeout())
        prepare(group)
        _cache[key] = group
    return _cache[key]


@torch.compiler.assume_constant_result
def world_group_name() -> str:
    """Returns the name of the group of all processes that layers without a group use.

    The first call creates it, so every process has to make that call. A layer calls it in forward,
    which they all run. A constructor may run on one process alone.

    Raises:
        OutOfStepError: the group is not there yet, and other processes do not create it in time.
    """
    world = dist.group.WORLD
    if world in _world_names:  # in each forward of a layer
        return _world_names[world]
    try:
        group = consecutive_group(dist.get_world_size())
    except RuntimeError as error:
        raise OutOfStepError(
            "CGBN: the processes could not form the group of a layer without process_group: "
            "another process has ended, or is in other code. Every process has to run the same "
            f"layers in the same order. The backend reports: {error}"
        ) from error
    assert isinstance(group, dist.ProcessGroup)  # of one process, layers do not ask
    _world_names[world] = group.group_name
    return group.group_name


def remove_groups() -> None:
    """Removes the groups that this module keeps, after ``destroy_process_group``."""
    _cache.clear()
    _world_names.clear()


def _world_timeout() -> timedelta | None:
    # torch gives new groups the default limit, and not that of init_process_group.
    world = dist.group.WORLD
    try:
        return world._get_backend(world._device_types[-1]).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # a backend, or an older torch, that does not say it
        return None
