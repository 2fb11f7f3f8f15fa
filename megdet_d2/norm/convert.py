"""Turns the batch norms of whole models into ``CrossGPUBatchNorm``, and back.

A layer changes its class and stays the same object. So it keeps its parameters, buffers, hooks,
parametrizations and attributes, and whoever refers to it still does.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .batch_norm import CrossGPUBatchNorm, name_layers
from .groups import BNGroup

# Classes whose ``forward`` only normalises, by the class that defines it. NaiveSyncBatchNorm is
# Detectron2's.
_NORMALIZERS = {"_BatchNorm", "SyncBatchNorm", "NaiveSyncBatchNorm"}
_FROZEN = "FrozenBatchNorm2d"  # Detectron2's, torchvision's, and copies of them


def convert_cgbn(
    model: nn.Module, process_group: BNGroup = None, include_frozen: bool = False
) -> nn.Module:
    """Turns every batch norm of ``model`` into a ``CrossGPUBatchNorm``, in place.

    Layers keep all that they hold, so an optimizer built before still has their parameters.

    Args:
        model: a model, or a batch norm.
        process_group: of all converted layers, see ``CrossGPUBatchNorm``; None for all processes.
        include_frozen: also converts the ``FrozenBatchNorm2d`` of Detectron2 and torchvision, whose
            γ and β then train.

    Returns:
        the model.

    Raises:
        ValueError: a layer cannot be converted: it does more than normalise, it does not know its
            channels yet (``LazyBatchNorm2d``), it is scripted or traced, or it is frozen and has no
            ε. The message names the layer. The model is then unchanged.
    """
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, CrossGPUBatchNorm):
            continue
        if isinstance(layer, _BatchNorm):
            _check_plain(name, layer)
        elif isinstance(layer, torch.jit.ScriptModule):
            _check_script(name, layer, include_frozen)
            continue
        elif include_frozen and _is_frozen(layer):
            _check_frozen(name, layer)
        else:
            continue
        layers.append(layer)
    CrossGPUBatchNorm(1, process_group=process_group)  # raises the error for a wrong group

    for layer in layers:
        _convert(layer, process_group)
    return name_layers(model)


def revert_cgbn(model: nn.Module) -> nn.Module:
    """Turns every ``CrossGPUBatchNorm`` of ``model`` into a plain batch norm, in place.

    The plain one has the class from before ``convert_cgbn``, or is a ``nn.BatchNorm2d``. Use it for
    export, and for code that does not support process groups.

    Args:
        model: a model, or a ``CrossGPUBatchNorm``.

    Returns:
        the model.

    Raises:
        ValueError: a layer does more than normalise: its class or the layer overrides ``forward``.
            The message names the layer. The model is then unchanged.
    """
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, CrossGPUBatchNorm):
            if type(layer).forward is not CrossGPUBatchNorm.forward or "forward" in vars(layer):
                raise ValueError(_does_more(name, layer))
            layers.append(layer)
    for layer in layers:
        plain = layer.reverts_to
        layer.tear_down()
        _change_class(layer, plain)
    return model


def _convert(layer: Any, process_group: BNGroup) -> None:
    if not isinstance(layer, _BatchNorm):
        _unfreeze(layer)
        plain: type[nn.Module] = nn.BatchNorm2d
    else:
        plain = parametrize.type_before_parametrizations(layer)
        if plain.forward is not _BatchNorm.forward:
            plain = nn.BatchNorm2d  # of a synchronized batch norm
    vars(layer).pop("process_group", None)  # of a SyncBatchNorm; here it is a property
    _change_class(layer, CrossGPUBatchNorm)
    layer.set_up(process_group)
    layer.reverts_to = plain


def _change_class(layer: nn.Module, to: type[nn.Module]) -> None:
    if parametrize.is_parametrized(layer):
        # Each parametrized module has its own class, with a property for each such tensor.
        own = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")}
        to = type(f"Parametrized{to.__name__}", (to,), own)
    layer.__class__ = to


def _is_frozen(layer: nn.Module) -> bool:
    return any(parent.__name__ == _FROZEN for parent in type(layer).__mro__)


def _unfreeze(layer: Any) -> None:
    """Gives a frozen batch norm the attributes of a batch norm; γ and β become parameters."""
    layer.num_features = layer.running_var.numel()
    layer.momentum, layer.affine, layer.track_running_stats = 0.1, True, True
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if not isinstance(value, nn.Parameter):
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(value.clone()))
    if getattr(layer, "num_batches_tracked", None) is None:
        count = torch.zeros((), dtype=torch.long, device=layer.running_var.device)
        layer.register_buffer("num_batches_tracked", count)


def _check_plain(name: str, layer: nn.Module) -> None:
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__} that does not know its channels yet; run "
            "the model once, on one image say, and convert it then"
        )
    owner = type(layer).forward.__qualname__.rpartition(".")[0]
    if owner not in _NORMALIZERS or "forward" in vars(layer):
        raise ValueError(_does_more(name, layer))


def _check_script(name: str, layer: torch.jit.ScriptModule, include_frozen: bool) -> None:
    kind = getattr(layer, "original_name", "")
    if "BatchNorm" in kind and (include_frozen or kind != _FROZEN):
        raise ValueError(
            f"layer {name!r} is a {kind} of TorchScript; convert the model before torch.jit.script "
            "or torch.jit.trace"
        )


def _check_frozen(name: str, layer: nn.Module) -> None:
    if not hasattr(layer, "eps"):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__} without eps; set layer.eps to the ε that "
            "its forward adds to the variance"
        )


def _does_more(name: str, layer: nn.Module) -> str:
    return (
        f"layer {name!r} is a {type(layer).__name__}, whose forward may do more than normalise, "
        "and the conversion would lose that; replace it by a plain batch norm and separate layers "
        "for the rest"
    )
