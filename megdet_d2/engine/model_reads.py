"""Records which keys of the config a model reads while it is built, and its norms of each key."""

import copy
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from megdet_d2.norm.keys import UNKNOWN, NormKey, is_norm_key
from megdet_d2.norm.registry import watched_norms


class ModelReads:
    """A ``build_model`` that notes which keys the model reads, and the norms it makes of them.

    Only so are they known of every architecture: a project may have any number of such keys, of
    which a model reads a few.

    Args:
        build: takes a config and returns a model.

    Attributes:
        keys: the full keys that the calls so far have read.
        norms: all NORM keys of the last call, by their full names. Layers of "CGBN" that are of
            none of them are under ``UNKNOWN``.
    """

    def __init__(self, build: Callable[[CfgNode], nn.Module]):
        self._build = build
        self.keys: set[str] = set()
        self.norms: dict[str, NormKey] = {}

    def __call__(self, cfg: CfgNode) -> nn.Module:
        """Builds the model."""
        noting = _NotingConfig(cfg)
        noting.note(self.keys)
        self.norms = _separate_norms(noting)
        by_identity = {id(norm.value): norm for norm in self.norms.values()}
        other = NormKey("CGBN", is_read=True)
        if cfg.is_frozen():
            noting.freeze()

        def note(name: str, layer: nn.Module) -> None:
            norm = by_identity.get(id(name), other if name == other.value else None)
            if norm is not None:
                norm.layers.append(layer)

        with watched_norms(note):
            model = self._build(noting)
        for key, norm in self.norms.items():
            norm.is_read = key in self.keys
        if other.layers:
            self.norms[UNKNOWN] = other
        return model


class _NotingConfig(CfgNode):
    """A config that notes which keys are read from it."""

    def __getitem__(self, key: str) -> Any:
        if "megdet_keys" in self.__dict__ and key in self:
            self.__dict__["megdet_keys"].add(self.__dict__["megdet_path"] + key)
        return super().__getitem__(key)

    def note(self, keys: set[str], path: str = "") -> None:
        """Makes the config note the reads, and all below it.

        Args:
            keys: gets the full keys.
            path: the full key of this part of the config and a dot; "" for the whole config.
        """
        self.__dict__.update(megdet_path=path, megdet_keys=keys)
        for key, value in self.items():
            if isinstance(value, _NotingConfig):
                value.note(keys, f"{path}{key}.")

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # A model may keep its config. In a file it is Detectron2's, which loads without this class.
        state = {k: v for k, v in self.__dict__.items() if k not in ("megdet_path", "megdet_keys")}
        return CfgNode, (), state, None, iter(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> "_NotingConfig":
        copied = type(self)()
        for key, value in self.items():
            dict.__setitem__(copied, key, copy.deepcopy(value, memo))
        copied.note(self.__dict__["megdet_keys"], self.__dict__["megdet_path"])
        if self.is_frozen():
            copied.freeze()
        return copied


def _separate_norms(node: CfgNode, path: str = "") -> dict[str, NormKey]:
    """Gives each NORM key a string object that no other has; returns these, by their full keys.

    ``get_norm`` gets this object, and so it is known which key a layer was made of.
    """
    found: dict[str, NormKey] = {}
    for name, value in list(node.items()):
        if isinstance(value, CfgNode):
            found |= _separate_norms(value, f"{path}{name}.")
        elif is_norm_key(name, value):
            found[path + name] = NormKey("".join(list(value)))
            dict.__setitem__(node, name, found[path + name].value)
    return found
