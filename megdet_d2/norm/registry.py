"""Adds ``NORM: "CGBN"`` to Detectron2, by a wrapper around ``get_norm``.

Detectron2's ``get_norm`` is a dict inside a function, so there is no registry to extend. A dozen
modules of Detectron2, and most projects, import the function by its name. So ``install`` wraps it,
and binds the wrapper in every loaded module that has the stock function. Modules that are loaded
later import the wrapper. docs/architecture.md lists this and every other patch of Detectron2.
"""

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import detectron2.layers.batch_norm as d2_batch_norm
from detectron2.config import CfgNode
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import nn

from megdet_d2._moved import renamed

from .batch_norm import CrossGPUBatchNorm
from .groups import SELF, BNGroup

NORM_REGISTRY = Registry("NORM")
NORM_REGISTRY.__doc__ = """
Norm layers by name, for Detectron2's ``*.NORM`` keys. They come before Detectron2's norms.
An entry is called with the number of channels and returns a module.
"""

_STOCK_NAMES = "BN, SyncBN, FrozenBN, GN, LN, nnSyncBN, naiveSyncBN, naiveSyncBN_N"


@NORM_REGISTRY.register()
class CGBN(CrossGPUBatchNorm):
    """The layer that ``NORM: "CGBN"`` builds; it normalises over all images on the machine.

    The class name has "BN" in it, because Detectron2 looks for this substring to find batch norms
    that RetinaNet's levels share.
    """

    def __init__(self, num_features: int):
        super().__init__(num_features, process_group=machine_group())


def uses_norm(cfg: CfgNode, *names: str) -> bool:
    """Returns True if any key of the config, in any section, is one of ``names``."""
    return any(
        uses_norm(value, *names) if isinstance(value, CfgNode) else value in names
        for value in cfg.values()
        if isinstance(value, (CfgNode, str))
    )


def uses_cgbn(cfg: CfgNode) -> bool:
    """Returns True if any key of the config, in any section, is "CGBN"."""
    return uses_norm(cfg, "CGBN")


def machine_group() -> BNGroup:
    """Returns the group of this machine's processes, which Detectron2's ``launch`` creates.

    Raises:
        RuntimeError: several processes run without that group.
    """
    if comm.get_world_size() == 1:
        return SELF
    if comm._LOCAL_PROCESS_GROUP is None:
        raise RuntimeError(
            f'NORM: "CGBN" was built in one of {comm.get_world_size()} processes, but the groups '
            "of processes that share a machine do not exist yet. Call detectron2.utils.comm."
            "create_local_process_group(processes_per_machine) right after "
            "torch.distributed.init_process_group, as Detectron2's and megdet_d2's launch do."
        )
    return comm.get_local_process_group()


@contextlib.contextmanager
def watched_norms(note: Callable[[str, nn.Module], None]) -> Iterator[None]:
    """Calls ``note(name, layer)`` for every layer that ``get_norm`` makes of a name, in a ``with``.

    Args:
        note: gets the same string object that was given to ``get_norm``.
    """
    token = _watcher.set(note)
    try:
        yield
    finally:
        _watcher.reset(token)


_watcher: contextvars.ContextVar[Callable[[str, nn.Module], None] | None] = contextvars.ContextVar(
    "watcher", default=None
)


def _wrap(stock: Callable) -> Any:
    @functools.wraps(stock)
    def get_norm(norm: Any, out_channels: int) -> Any:
        layer, watcher = make(norm, out_channels), _watcher.get()
        if watcher is not None and isinstance(layer, nn.Module):
            watcher(norm, layer)
        return layer

    def make(norm: Any, out_channels: int) -> Any:
        if not isinstance(norm, str) or norm == "":
            return stock(norm, out_channels)
        if norm in NORM_REGISTRY:
            return NORM_REGISTRY.get(norm)(out_channels)
        try:
            return stock(norm, out_channels)
        except KeyError:
            ours = ", ".join(name for name, _ in NORM_REGISTRY)
            raise KeyError(
                f"unknown norm {norm!r}: megdet_d2 has {ours}; Detectron2 has {_STOCK_NAMES}"
            ) from None

    wrapper: Any = get_norm
    wrapper._megdet_stock = stock
    return wrapper


def install() -> None:
    """Binds the wrapped ``get_norm`` wherever the stock one is bound; may be called again."""
    if hasattr(d2_batch_norm.get_norm, "_megdet_stock"):
        wrapped = d2_batch_norm.get_norm
    else:
        wrapped = _wrap(d2_batch_norm.get_norm)
    stock = wrapped._megdet_stock
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock:
                setattr(module, name, wrapped)


__getattr__ = renamed(
    __name__,
    cgbn_layers="megdet_d2.norm.batch_norm.cgbn_layers",
    describe_norms="megdet_d2.norm.configure.describe_norms",
    group_ranks="megdet_d2.norm.configure.group_ranks",
    images_per_group="megdet_d2.norm.configure.images_per_group",
    separate_retinanet_levels="megdet_d2.norm.retinanet.separate_retinanet_levels",
    set_bn_size="megdet_d2.norm.configure.set_bn_size",
)
