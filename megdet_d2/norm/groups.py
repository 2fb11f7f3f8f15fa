"""BN size, the number of images whose statistics are shared (MegDet Table 3), as process groups.

A group is a run of consecutive ranks, so that it stays inside one machine (§3.3) wherever its size
divides the machine's. Groups are made once, by every process in the same order, before training:
no layer ever makes one in its forward.
"""

from typing import TypeAlias

import torch.distributed as dist


class _Self:
    """The group of this process alone, for which no communicator is needed."""

    def __repr__(self) -> str:
        return "SELF"


SELF = _Self()
BNGroup: TypeAlias = "dist.ProcessGroup | _Self | None"

_cache: dict[tuple[dist.ProcessGroup, int], BNGroup] = {}


def ranks_per_group(bn_size: int, images_per_gpu: int, ranks: int) -> int:
    """How many processes share their statistics, so that together they see ``bn_size`` images.

    Args:
        bn_size: images in a group; -1 for all that the ``ranks`` processes have.
        images_per_gpu: images of one process.
        ranks: the processes a group may be made of: a machine's, or the world's.

    Raises:
        ValueError: no whole number of processes gives ``bn_size``, or their number does not divide
            ``ranks``. The message lists the values that work.
    """
    if bn_size == -1:
        return ranks
    possible = [k * images_per_gpu for k in range(1, ranks + 1) if ranks % k == 0]
    if bn_size not in possible:
        nearest = sorted(sorted(possible, key=lambda size: (abs(size - bn_size), size))[:2])
        raise ValueError(
            f"MODEL.CGBN.BN_SIZE is {bn_size}, which no equal groups of the {ranks} processes with "
            f"{images_per_gpu} images each make up. Nearest that work: "
            f"{' and '.join(map(str, nearest))} (all: {', '.join(map(str, possible))}, or -1). "
            "MODEL.CGBN.CROSS_MACHINE lets a group span machines; for no batch statistics at all, "
            'the paper\'s "BN size 0", use NORM: "FrozenBN".'
        )
    return bn_size // images_per_gpu


def consecutive_group(size: int) -> BNGroup:
    """This process's group when the world is cut into runs of ``size`` ranks.

    Every process has to call it, in the same order as the others. Cached: a second call with the
    same size returns the same group. Without a process group, or for ``size`` 1, it is ``SELF``.
    """
    if not dist.is_initialized() or size == 1:
        return SELF
    key = (dist.group.WORLD, size)
    if key not in _cache:
        # A group of its own even for the whole world: a layer's reduction in backward then waits
        # for none of DDP's, which are in flight on the default group.
        _cache[key], _ = dist.new_subgroups(size)
    return _cache[key]
