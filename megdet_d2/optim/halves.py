"""The gradients of two halves of a mini-batch: of processes, or of micro-batches of one process."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor


class Halves:
    """The gradient of one update as the sum of two parts, one of each half.

    The mean gradient of a mini-batch is a sum over processes and micro-batches. ``first`` is what
    the first half adds to it, and the rest is what the second adds. On W processes the first half
    are the first W // 2, whole BN groups where these are consecutive. One process takes the first
    k // 2 of its k micro-batches.

    Call ``keep`` after the backward of each micro-batch, ``exchange`` after the last one and before
    gradients are averaged over processes, and ``split`` afterwards. It holds one more copy of the
    gradients, from the middle of the backwards on one process, and from ``exchange`` on otherwise.

    Args:
        parameters: those that are trained, the same in every process and in the same order.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = parameters
        self._world, self._rank = comm.get_world_size(), comm.get_rank()
        self._first: list[Tensor] = []

    def keep(self, done: int, total: int) -> None:
        """Keeps the gradient of the first half, if one process has just computed it.

        Args:
            done: micro-batches whose backward has ended.
            total: micro-batches of the update.

        Raises:
            ValueError: there is one process with one micro-batch.
        """
        if self._world > 1:
            return
        if total < 2:
            raise ValueError(describe_missing_halves())
        if done == total // 2:
            self._first = [gradient.clone() for gradient in self._gradients()]

    def exchange(self) -> None:
        """Adds up the gradients of the first half of the processes. Every process has to call it.

        That is one all-reduce of all gradients in one message, also of parameters without one.
        """
        if self._world == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in self._gradients()])
        if self._rank < self._world // 2:
            flat /= self._world
        else:
            flat.zero_()
        dist.all_reduce(flat)
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        self._first = [
            part.view(parameter.shape)
            for part, parameter in zip(parts, self._parameters, strict=True)
        ]

    def split(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields of each parameter the parts of both halves, whose sum is its mean gradient."""
        for first, gradient in zip(self._first, self._gradients(), strict=True):
            yield first, gradient - first

    def _gradients(self) -> Iterator[Tensor]:
        for parameter in self._parameters:
            gradient = parameter.grad
            yield torch.zeros_like(parameter) if gradient is None else gradient


def describe_missing_halves(where: str = "") -> str:
    """Returns the error of an update that has one part.

    Args:
        where: the updates, if they are not all: "in iteration 20 of MEGDET.BATCH_WARMUP".
    """
    steps = f"one micro-batch {where}" if where else "MEGDET.ACCUMULATION_STEPS 1"
    more = "more MEGDET.ACCUMULATION_STEPS" if where else "MEGDET.ACCUMULATION_STEPS 2 or more"
    return (
        "MEGDET.OPTIMIZER is 'agvm', which compares the gradients of two halves of a mini-batch, "
        f"but one process with {steps} computes only one; use two or more processes, or {more}"
    )


def keeps_first_half(cfg: CfgNode, world_size: int) -> bool:
    """Returns True if a process keeps a second copy of its gradients during several backwards.

    That is AGVM on one process, which compares halves of its micro-batches.
    """
    return cfg.MEGDET.OPTIMIZER == "agvm" and world_size == 1


def check_halves(steps: int, where: str = "") -> None:
    """Checks that the mini-batch of the running processes has two halves.

    The authors' code needs two processes too. Half of a micro-batch in an additional backward would
    double the time, and change the statistics of batch norms.

    Args:
        steps: micro-batches of an update.
        where: see ``describe_missing_halves``.

    Raises:
        ValueError: there is one process with one micro-batch.
    """
    if comm.get_world_size() == 1 and steps < 2:
        raise ValueError(describe_missing_halves(where))
