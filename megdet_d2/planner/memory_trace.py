"""Records every allocation of a training step whose large tensors have no memory.

The step is the real one: forward, losses, backward and optimizer of the real model. Its weights and
images are fake tensors of torch, which have a shape and no values, and so is everything that is
computed from them. Ground truth, anchors and labels are small and real. So matching and sampling
decide on real numbers. Where the step asks a fake tensor for its values, ``StepTrace`` answers with
those that take the most memory: all of a mask is true, and NMS removes nothing.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class StepTrace(TorchDispatchMode):
    """A mode that lists the allocations of all operators that run in it.

    Attributes:
        events: pairs of a storage's number and its bytes, in the order of the step. The bytes are
            negative where it is freed.
        kinds: the kind of a storage by its number, such as "gradients"; see ``label``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.kinds: dict[int, str] = {}
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by address
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def hide_weights(self, model: nn.Module) -> None:
        """Replaces the parameters of ``model`` by fake ones. Buffers, such as anchors, stay."""
        made: dict[int, nn.Parameter] = {}  # the levels of RetinaNet's head share parameters
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in made:
                    fake = self._fake.from_tensor(parameter.detach())
                    made[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                setattr(module, name, made[id(parameter)])

    def hide(self, tensor: Tensor) -> Tensor:
        """Returns a fake tensor with the shape, dtype and layout of ``tensor``."""
        return self._fake.from_tensor(tensor)

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of ``tensors`` as ``kind``, also those that no operator has made."""
        for tensor in tensors:
            self.kinds[self._track(tensor)] = kind

    # --- operators -------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator on real or on fake tensors, and records what it allocates."""
        result = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        if extra := _work_space(func, args, result):
            number = len(self.events)
            self.kinds[number] = "workspace"
            self.events += [(number, extra), (number, -extra)]
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _scalar(args[0])
        if func is aten.equal.default:
            return True
        if func is torch.ops.torchvision.nms.default:
            return torch.arange(len(args[0]))
        if func in _INDEXING:
            args = (args[0], [i for index in args[1] for i in _positions(index)], *args[2:])
        if func._schema.name.endswith("_") and type(args[0]) is Tensor:
            return args[0]  # such as running statistics, whose values do not matter
        try:
            return func(*args, **kwargs)
        except DynamicOutputShapeException:
            return func(*tree_map_only(FakeTensor, _fullest, args), **kwargs)

    # --- allocations -----------------------------------------------------------------------------

    def _track(self, tensor: Tensor) -> int:
        """Returns the number of the tensor's storage, and records the storage if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number, size = len(self.events), storage.nbytes()
        self.events.append((number, size))

        def freed(_: Any) -> None:
            del self._alive[address]
            self.events.append((number, -size))

        self._alive[address] = number, weakref.ref(storage, freed)
        return number


def _work_space(func: Any, args: Any, result: Any) -> int:
    """Returns the bytes that a convolution needs for the time that it runs.

    Libraries copy its tensors into another layout: oneDNN does so on CPUs, and cuDNN mostly.
    """
    if func is aten.convolution.default:
        tensors, transposed = (args[0], result), args[6]
        copied = 2 * _bytes(result) if transposed else max(map(_bytes, tensors))
    elif func is aten.convolution_backward.default:
        tensors = args[:2]
        copied = sum(map(_bytes, tensors))
    else:
        return 0
    # A tensor in channels_last stays as it is.
    return copied if all(tensor.is_contiguous() for tensor in tensors) else 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _scalar(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """Returns the positions of a mask's true values, one tensor per dimension; or the index."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return list(_fullest(index).nonzero().unbind(1))


def _fullest(tensor: Tensor) -> Tensor:
    """Returns real values for a fake tensor: all of a mask, and ones in any other type."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    return torch.ones(tensor.shape, dtype=tensor.dtype)
