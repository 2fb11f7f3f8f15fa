"""The one collective of the norm: a sum over the group that notices processes out of step.

A process that skips a layer, or runs two in another order, makes its peers add up statistics of
different layers: with messages of different sizes gloo aborts the process, with equal sizes the
numbers mix in silence. So all messages have one length, and each carries a stamp of its layer and
direction. With s the stamp of each of K processes, K Σs² = (Σs)² if and only if all are equal
(Cauchy-Schwarz), which every process of the group sees at once, in the first call that does not
match.
"""

import zlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# Channels a message has room for; wider layers take multiples of it. One constant, so that nobody
# has to agree on it first. 32 KiB travel as fast as one: latency decides.
ROOM = 2048
# Bits of a stamp: squares of it add up exactly in float64 over 8,192 processes.
_STAMP_BITS = 20

_RULE = (
    "Every process has to run the same layers in the same order, one without images on an empty "
    "input."
)

# On CUDA, by group: whether a mismatch has been seen, on the device, so that no layer waits for it.
_mismatch: dict[str, Tensor] = {}


class OutOfStepError(RuntimeError):
    """Processes of one group were in different CGBN layers, or one did not come."""


def all_reduce(group: str, layer: str, direction: str, *parts: Tensor) -> tuple[Tensor, ...]:
    """The sums of ``parts``, float64 vectors, over the processes of ``group``, as one message.

    Args:
        group: the process group's name; "" returns the parts as they are.
        layer: the layer's name, the same on every process.
        direction: "forward", "forward, variance" or "backward".

    Raises:
        OutOfStepError: on CPU, on every process, where they are in different layers or directions,
            or where the collective itself fails or times out. On CUDA a mismatch is kept for
            ``raise_if_out_of_step``, and NCCL's watchdog ends a process whose peer does not come.
    """
    if not group:
        return parts
    process_group = _resolve_process_group(group)
    sizes = [part.numel() for part in parts]
    used = sum(sizes)
    length = 2 * ROOM * max(1, -(-(used - 1) // (2 * ROOM))) + 1
    message = parts[0].new_zeros(length + 2)
    torch.cat(parts, out=message[:used])
    stamp = zlib.crc32(f"{layer} {direction}".encode()) % 2**_STAMP_BITS
    # Slices: older versions of torch wait for the device to set a single element.
    message[length : length + 1] = stamp
    message[length + 1 :] = stamp**2
    try:
        dist.all_reduce(message, group=process_group)
    except RuntimeError as error:
        raise OutOfStepError(
            f"CGBN layer {layer}, {direction}: the all-reduce over the {process_group.size()} "
            "processes of its group failed: another process has ended, or is somewhere else. "
            f"{_RULE} The backend says: {error}"
        ) from error
    if message.is_cuda:
        total, squares = message[length], message[length + 1]
        differ = process_group.size() * squares != total.square()
        # In place, so that a replayed CUDA graph of the layer writes here too.
        if group not in _mismatch:
            _mismatch[group] = torch.zeros_like(differ)
        _mismatch[group].logical_or_(differ)
    else:
        total, squares = message[length:].tolist()
        if process_group.size() * squares != total**2:
            _raise(process_group, layer, direction)
    return message[:used].split(sizes)


def raise_if_out_of_step() -> None:
    """Raises what CUDA layers have noticed since the last call; waits for the device.

    Raises:
        OutOfStepError: processes of a group were in different layers.
    """
    for flag in _mismatch.values():
        if bool(flag):
            flag.zero_()
            raise OutOfStepError(
                "CGBN: in this step the processes of a group were in different layers, and their "
                f"statistics were mixed. {_RULE}"
            )


def _raise(process_group: dist.ProcessGroup, layer: str, direction: str) -> None:
    # All processes of the group are here: the sums that brought this one are the same on each.
    places: list = [None] * process_group.size()
    dist.all_gather_object(places, f"{layer}, {direction}", group=process_group)
    ranks = dist.get_process_group_ranks(process_group)
    listed = "; ".join(f"rank {rank}: {place}" for rank, place in zip(ranks, places, strict=True))
    raise OutOfStepError(
        f"CGBN: the processes of a group are in different layers. {listed}. {_RULE}"
    )
