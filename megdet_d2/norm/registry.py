"""The seam into Detectron2: ``NORM: "CGBN"``, and the groups of a machine.

``get_norm`` is a dict inside a function, and a dozen modules of Detectron2, and most projects,
hold it under their own name from the moment they are imported. So it is wrapped once, and every
attribute of every loaded module that *is* the stock function is bound to the wrapper; modules
loaded later import the wrapper. This is one of the plugin's two patches of Detectron2.
"""

import functools
import sys
from collections.abc import Callable

import detectron2.layers.batch_norm as d2_batch_norm
from detectron2.config import CfgNode
from detectron2.utils import comm
from fvcore.common.registry import Registry

from megdet_d2._moved import renamed

from .batch_norm import CrossGPUBatchNorm
from .groups import SELF, BNGroup

NORM_REGISTRY = Registry("NORM")
NORM_REGISTRY.__doc__ = """
Norm layers by the names that Detectron2's ``*.NORM`` keys take, before Detectron2's own.
An entry is called with the number of channels and returns a module.
"""

_STOCK_NAMES = "BN, SyncBN, FrozenBN, GN, LN, nnSyncBN, naiveSyncBN, naiveSyncBN_N"


@NORM_REGISTRY.register()
class CGBN(CrossGPUBatchNorm):
    """The layer that ``NORM: "CGBN"`` stands for: over every image on the machine.

    Named with "BN" because Detectron2 finds batch norms shared by RetinaNet's levels by that
    substring.
    """

    def __init__(self, num_features: int):
        super().__init__(num_features, process_group=machine_group())


def uses_cgbn(cfg: CfgNode) -> bool:
    """Whether any ``NORM`` key of the config, in any section, is "CGBN"."""
    return any(
        uses_cgbn(value) if isinstance(value, CfgNode) else (key == "NORM" and value == "CGBN")
        for key, value in cfg.items()
    )


def machine_group() -> BNGroup:
    """The processes of this machine: the group that Detectron2's ``launch`` makes.

    Raises:
        RuntimeError: several processes run, on several machines, and nobody has said which of them
            share a machine.
    """
    if comm.get_world_size() == 1:
        return SELF
    if comm._LOCAL_PROCESS_GROUP is None:
        raise RuntimeError(
            f'NORM: "CGBN" was built in one of {comm.get_world_size()} processes before they '
            "were told which share a machine. Call detectron2.utils.comm."
            "create_local_process_group(processes_per_machine) right after "
            "torch.distributed.init_process_group, as Detectron2's and megdet_d2's launch do."
        )
    return comm.get_local_process_group()


def _wrap(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def get_norm(norm, out_channels):
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

    get_norm._megdet_stock = stock
    return get_norm


def install() -> None:
    """Binds the wrapped ``get_norm`` wherever the stock one is bound; harmless if repeated."""
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
