"""Replaces the batch norms of whole models by ``CrossGPUBatchNorm``, and back."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .batch_norm import CrossGPUBatchNorm, name_layers
from .groups import BNGroup

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Classes whose ``forward`` only normalises, by the class that defines it. NaiveSyncBatchNorm is
# Detectron2's.
_NORMALIZERS = {"_BatchNorm", "SyncBatchNorm", "NaiveSyncBatchNorm"}
_HOOK_TABLES = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_cgbn(
    model: nn.Module, process_group: BNGroup = None, include_frozen: bool = False
) -> nn.Module:
    """Replaces every batch norm of ``model`` by a ``CrossGPUBatchNorm`` with the same state.

    Parameters stay the same objects, so an optimizer built before still holds them.

    Args:
        model: converted in place, unless the model itself is a batch norm.
        process_group: of all converted layers, see ``CrossGPUBatchNorm``; None for all processes.
        include_frozen: also converts Detectron2's ``FrozenBatchNorm2d``, whose γ and β then train.

    Returns:
        the model, or the layer that replaces it.

    Raises:
        ValueError: a batch norm's class overrides ``forward``, for an activation say. The model is
            then unchanged.
    """
    for name, layer in model.named_modules():
        owner = type(layer).forward.__qualname__.rpartition(".")[0]
        if _is_batch_norm(layer) and owner not in _NORMALIZERS:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose forward may do more than "
                "normalise, and the conversion would lose that; replace it by a plain batch norm "
                "and separate layers for the rest"
            )

    def convert(layer: Any) -> nn.Module:
        frozen = include_frozen and type(layer).__name__ == "FrozenBatchNorm2d"
        if not (frozen or _is_batch_norm(layer)):
            return layer
        new = CrossGPUBatchNorm(
            layer.num_features,
            layer.eps,
            getattr(layer, "momentum", 0.1),
            getattr(layer, "affine", True),
            getattr(layer, "track_running_stats", True),
            process_group,
        )
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm3d)):
            new.reverts_to = type(layer)
        return _move_state(layer, new)

    return name_layers(_replace(model, convert))


def revert_cgbn(model: nn.Module) -> nn.Module:
    """Replaces every ``CrossGPUBatchNorm`` of ``model`` by a plain batch norm, in place.

    The plain one is ``nn.BatchNorm2d``, or the 1-D or 3-D batch norm that ``convert_cgbn``
    replaced. Use it for export, and for code that does not support process groups.

    Returns:
        the model, or the layer that replaces it.
    """

    def revert(layer: nn.Module) -> nn.Module:
        if not isinstance(layer, CrossGPUBatchNorm):
            return layer
        new = layer.reverts_to(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        return _move_state(layer, new)

    return _replace(model, revert)


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _BATCH_NORMS) and not isinstance(layer, CrossGPUBatchNorm)


def _replace(module: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Applies ``convert`` to every layer, once even where the layer occurs in several places."""
    converted: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                if child not in converted:
                    converted[child] = convert(child)
                parent._modules[name] = converted[child]
    return convert(module)


def _move_state(old: nn.Module, new: nn.Module) -> nn.Module:
    for name in _STATE:
        value: Any = getattr(old, name, None)
        if value is None and name == "num_batches_tracked" and new.track_running_stats:
            continue  # FrozenBatchNorm2d has no count, so new starts from 0
        if isinstance(getattr(new, name), nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.clone())
        setattr(new, name, value)
    for table in [name for name in vars(new) if name.endswith(_HOOK_TABLES)]:
        # The table itself, not a copy, so that the handles still remove their hooks.
        setattr(new, table, getattr(old, table))
    if new.track_running_stats:
        for name in ("num_batches_tracked", "num_batches_skipped"):
            if getattr(new, name, None) is not None:
                setattr(new, name, getattr(new, name).to(new.running_mean.device))
    return new.train(old.training)
