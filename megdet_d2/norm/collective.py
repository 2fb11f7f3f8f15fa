"""The collective of the norm: a sum over the group that detects processes out of step.

If a process skips a layer, or runs two layers in another order, the group adds up statistics of
different layers. With messages of different sizes gloo aborts the process; with equal sizes the
numbers mix silently. So all messages have one length, and each carries a stamp s of its layer and
direction. Over K processes, K Σs² = (Σs)² if and only if all stamps are equal (Cauchy-Schwarz).
Every process of the group sees a mismatch at once, in the first call that does not match.
"""

import contextlib
import functools
import zlib
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# Channels that fit into a message; wider layers take multiples of it. A constant needs no agreement
# between processes. Sending 32 KiB takes as long as 1 KiB, since latency dominates.
ROOM = 2048
# Bits of a stamp. Its squares add up exactly in float64 over 8,192 processes.
_STAMP_BITS = 20

# A message of the whole update, in place of a layer.
_UPDATE, _OUT_OF_MEMORY = "update", "out of memory"

_RULE = (
    "Every process has to run the same layers in the same order; a process without images runs "
    "them on an empty input."
)

# For each group and GPU: a flag on the device that is 1 after a mismatch. No layer waits for it.
_mismatch: dict[tuple[str, torch.device], Tensor] = {}


class OutOfStepError(RuntimeError):
    """The error for processes of a group that are in different CGBN layers, or missing."""


class GroupOutOfMemoryError(OutOfStepError):
    """The error for processes of a group, one of which has called ``report_out_of_memory``."""


def all_reduce(group: str, layer: str, direction: str, *parts: Tensor) -> tuple[Tensor, ...]:
    """Returns the sums of ``parts`` over the processes of ``group``, sent as one message.

    Args:
        group: name of the process group; "" returns the parts unchanged.
        layer: the layer's name, the same on every process.
        direction: "forward", "forward, variance" or "backward".
        parts: float64 vectors, of the same sizes on every process.

    Raises:
        RuntimeError: the group does not exist any more, see ``find_group``.
        OutOfStepError: on CPU, on every process: the processes are in different layers or
            directions, or the collective fails or times out. On CUDA ``raise_if_out_of_step``
            raises a mismatch later, and NCCL's watchdog ends a process that waits too long.
    """
    if not group:
        return parts
    sizes = [part.numel() for part in parts]
    used = sum(sizes)
    message = new_message(parts[0], used, group).zero_()
    torch.cat(parts, out=message[:used])
    stamp = stamp_of(layer, direction)
    # Slices: older versions of torch wait for the device to set a single element.
    message[-2:-1] = stamp
    message[-1:] = stamp**2
    processes = send(message, group, layer, direction)
    flag = mismatch_flag(group, message.device)
    if flag is not None:
        compare_stamps(message, processes, flag)
    else:
        total, squares = message[-2:].tolist()
        if processes * squares != total**2:
            _raise(find_group(group, layer), layer, direction)
    return message[:used].split(sizes)


def meet(group: str) -> None:
    """Waits for the processes of ``group`` at the end of an update.

    Raises:
        GroupOutOfMemoryError: on CPU, one of them has called ``report_out_of_memory`` instead.
    """
    all_reduce(group, _UPDATE, "end", torch.zeros(1, dtype=torch.float64))


def report_out_of_memory(group: str) -> None:
    """Takes part in the next collective of ``group``, whatever it is, and makes it fail.

    So on CPU all other processes raise ``GroupOutOfMemoryError``, if they end updates by ``meet``.
    """
    with contextlib.suppress(GroupOutOfMemoryError):
        all_reduce(group, _UPDATE, _OUT_OF_MEMORY, torch.zeros(1, dtype=torch.float64))


def message_size(used: int, group: str) -> int:
    """Returns the length of a message with ``used`` values: with a group it also has stamps."""
    if not group:
        return used
    return 2 * ROOM * max(1, -(-(used - 1) // (2 * ROOM))) + 3


def new_message(x: Tensor, used: int, group: str) -> Tensor:
    """Returns a float64 vector on x's device for ``used`` values; its last two places take stamps.

    The values between them are undefined. They are sent, and nothing reads them.
    """
    return x.new_empty(message_size(used, group), dtype=torch.float64)


@functools.lru_cache(8192)
def stamp_of(layer: str, direction: str) -> int:
    """Returns the stamp of a layer's message."""
    return zlib.crc32(f"{layer} {direction}".encode()) % 2**_STAMP_BITS


def send(message: Tensor, group: str, layer: str, direction: str) -> int:
    """Adds up a message over the processes of ``group``, in place; does nothing without a group.

    Returns:
        the number of processes.

    Raises:
        RuntimeError, OutOfStepError: as ``all_reduce`` does, but the stamps are not compared.
    """
    if not group:
        return 1
    process_group = find_group(group, layer)
    try:
        dist.all_reduce(message, group=process_group)
    except RuntimeError as error:
        raise OutOfStepError(
            f"CGBN layer {layer}, {direction}: the all-reduce over the {process_group.size()} "
            "processes of its group failed: another process has ended, or is in other code. "
            f"{_RULE} DDP and other code must not use the layers' group. The backend reports: "
            f"{error}"
        ) from error
    return process_group.size()


def mismatch_flag(group: str, device: torch.device) -> Tensor | None:
    """Returns the flag (1,), int32, of a group on a CUDA device; None elsewhere."""
    if not group or device.type != "cuda":
        return None
    key = group, device
    if key not in _mismatch:
        _mismatch[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _mismatch[key]


def prepare(group: dist.ProcessGroup) -> None:
    """Makes the flag of a new group on this process's GPU, if the group communicates there.

    In its first use it could be made in the capture of a CUDA graph, and belong to the graph.
    """
    if torch.cuda.is_available() and "cuda" in dist.get_backend_config(group):
        mismatch_flag(group.group_name, torch.device("cuda", torch.cuda.current_device()))


def compare_stamps(message: Tensor, processes: int, flag: Tensor) -> None:
    """Sets the flag if the processes have sent different stamps, without waiting."""
    # In place, so that a replayed CUDA graph writes to the same flag.
    flag.logical_or_(processes * message[-1:] != message[-2:-1].square())


def find_group(name: str, layer: str, ranks: list[int] | None = None) -> dist.ProcessGroup:
    """Returns the process group of that name.

    Args:
        name: the group's name. torch gives it to another group after ``destroy_process_group``.
        layer: the layer's name, for errors.
        ranks: the ranks that the group must have; None for any.

    Raises:
        RuntimeError: there is no such group. It was destroyed, or the layer was saved by another
            program.
    """
    error: Exception | None = None
    try:
        group = _resolve_process_group(cast(Any, name))
        if ranks is None or dist.get_process_group_ranks(group) == ranks:
            return group
    except (RuntimeError, KeyError, ValueError) as reason:
        error = reason
    raise RuntimeError(
        f"CGBN layer {layer}: its process group {name!r} does not exist (any more). It was "
        "destroyed, or the layer was saved by another program. Assign layer.process_group, or "
        "call megdet_d2.set_bn_size(model, bn_size, images_per_gpu)."
    ) from error


def raise_if_out_of_step() -> None:
    """Raises an error if a CUDA layer has seen a mismatch since the last call.

    It waits for the device.

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


def _raise(process_group: dist.ProcessGroup, layer: str, direction: str) -> NoReturn:
    # All processes of the group call this, because the sums that differ are the same on each.
    places: list = [None] * process_group.size()
    dist.all_gather_object(places, f"{layer}, {direction}", group=process_group)
    if f"{_UPDATE}, {_OUT_OF_MEMORY}" in places:
        raise GroupOutOfMemoryError("another process of the group has run out of memory")
    ranks = dist.get_process_group_ranks(process_group)
    listed = "; ".join(f"rank {rank}: {place}" for rank, place in zip(ranks, places, strict=True))
    raise OutOfStepError(
        f"CGBN: the processes of a group are in different layers. {listed}. {_RULE}"
    )
