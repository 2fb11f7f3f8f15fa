"""Limits the memory of training steps: by torch's allocator on a GPU, by counting on a CPU."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20
# The common name is newer than torch 2.4.
OutOfMemoryError: type[RuntimeError] = getattr(
    torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators take and return, until they are freed.

    The result of an operator that does not fit raises an error, as on a GPU. It counts storages,
    each once, in steps that run inside of a ``with``. Memory inside of operators is not counted.

    Args:
        limit: bytes.

    Attributes:
        limit: may be set at any time.
        live: bytes now.
        peak: the largest ``live`` so far.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self._storages:
                freed = functools.partial(self._free, key, size)
                self._storages[key] = weakref.ref(storage, freed)
                self.live += size

    def _free(self, key: int, size: int, storage: weakref.ref) -> None:
        del self._storages[key]
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(_tensors_in((args, result)))
        self.peak = max(self.peak, self.live)
        if self.live > self.limit:
            raise OutOfMemoryError(
                f"MEGDET.MEMORY_LIMIT_MB is {self.limit / MIB:g}, and {func} needs "
                f"{self.live / MIB:.1f} MiB of live tensors"
            )
        return result


def _tensors_in(value: Any) -> Iterator[Tensor]:
    # Thousands of operators in a step: torch's walk through trees takes several times as long.
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)


class MemoryLimit:
    """Applies ``MEGDET.MEMORY_LIMIT_MB`` to the steps of a training.

    On a GPU torch's allocator is limited for the whole process; 0 leaves it the device. On a CPU
    the steps inside of ``limited`` are counted.

    Attributes:
        counter: of a CPU; None on a GPU.
    """

    def __init__(self, cfg: CfgNode):
        limit = cfg.MEGDET.MEMORY_LIMIT_MB * MIB
        self.counter: LiveBytes | None = None
        if cfg.MODEL.DEVICE == "cpu":
            self.counter = LiveBytes(int(limit))
        elif limit:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))

    def limited(self, tensors: Iterable[Tensor] = ()) -> contextlib.AbstractContextManager:
        """Returns a context in which operators raise ``OutOfMemoryError`` above the limit.

        Args:
            tensors: that are there already, such as parameters, gradients and momenta.
        """
        if self.counter is None:
            return contextlib.nullcontext()
        self.counter.add(tensors)
        return self.counter


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns parameters, buffers, gradients and the optimizer's tensors."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return [*parameters, *model.buffers(), *gradients, *states]
