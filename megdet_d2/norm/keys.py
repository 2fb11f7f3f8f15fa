"""The NORM keys of a config: the layers that Detectron2's ``get_norm`` made of each, and the rest.

Not every project calls ``get_norm``. AdelaiDet's FCOS compares the name with those that it knows,
and makes no norm of another one. Others write ``nn.BatchNorm2d`` into their code. Nothing here can
change that, but the log says it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from detectron2.layers import NaiveSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_norm import CrossGPUBatchNorm, bare_model

# Stands for a key where layers of "CGBN" are of none.
UNKNOWN = "no known key"

_CONVERT = "megdet_d2.convert_cgbn(model), in an overridden Trainer.build_model, converts them"


@dataclass(eq=False)
class NormKey:
    """A NORM key of the config that a model was built from.

    Attributes:
        value: the name of the norm.
        is_read: the model has read the key.
        layers: those that ``get_norm`` has made of the value, also those that were frozen later.
    """

    value: str
    is_read: bool = False
    layers: list[nn.Module] = field(default_factory=list, repr=False)


def is_norm_key(name: str, value: Any) -> bool:
    """Returns True if a key names a norm, as ``NORM`` does, or any key whose value is "CGBN"."""
    return isinstance(value, str) and len(value) > 1 and (name.endswith("NORM") or value == "CGBN")


def describe_norm_keys(keys: Mapping[str, NormKey]) -> str:
    """Returns the keys that name CGBN, each with the number of layers that the model made of it.

    Args:
        keys: by their full names.
    """
    named = {key: norm for key, norm in sorted(keys.items()) if norm.value == "CGBN"}
    made = [f"{key} {len(norm.layers)}" for key, norm in named.items() if norm.is_read]
    rest = [key for key, norm in named.items() if not norm.is_read]
    unread = f"; this model does not read {', '.join(rest)}" if rest else ""
    return f"layers made by key: {', '.join(made) or 'none'}{unread}" if named else ""


def plain_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the batch norms of ``model`` that normalise over one process's images, by name."""
    synchronized = CrossGPUBatchNorm, nn.SyncBatchNorm, NaiveSyncBatchNorm
    return {
        name: layer
        for name, layer in bare_model(model).named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, synchronized)
    }


def find_missing_norms(model: nn.Module, keys: Mapping[str, NormKey]) -> list[str]:
    """Returns a warning for each NORM key without effect, and one for batch norms of no key.

    Args:
        model: as it is trained.
        keys: those of the config that it was built from, by their full names or ``UNKNOWN``.

    Returns:
        none for a config without "CGBN".
    """
    cgbn = {key: norm for key, norm in sorted(keys.items()) if norm.value == "CGBN"}
    if not cgbn:
        return []
    found = []
    made = {id(layer) for norm in keys.values() for layer in norm.layers}
    for key, norm in cgbn.items():
        # Layers of no known key may be of this one: a project may make a new string of its value.
        if norm.is_read and not norm.layers and UNKNOWN not in keys:
            found.append(
                f'{key} is "CGBN" and the model reads it, but makes no layer of it: its code does '
                "not call Detectron2's get_norm, or has no norm there with these settings. Set "
                f'{key} "BN", or another norm that the project knows; {_CONVERT}'
            )
    plain = {
        name: layer for name, layer in plain_batch_norms(model).items() if id(layer) not in made
    }
    # The project makes these itself, and the config asks for them.
    asked = any(
        norm.value != "CGBN" and "BN" in norm.value and norm.is_read and not norm.layers
        for norm in keys.values()
    )
    if plain and not asked:
        names = list(plain)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        found.append(
            f"{len(plain)} batch norms are plain {type(plain[names[0]]).__name__}, which "
            f"normalises over the images of one process: {', '.join(names[:5])}{more}. No NORM "
            f"key made them, so 'CGBN' in {', '.join(cgbn)} does not reach them; {_CONVERT}"
        )
    return found
