"""The seam into Detectron2: ``NORM: "CGBN"``, and the groups of a machine.

``get_norm`` is a dict inside a function, and a dozen modules of Detectron2, and most projects,
hold it under their own name from the moment they are imported. So it is wrapped once, and every
attribute of every loaded module that *is* the stock function is bound to the wrapper; modules
loaded later import the wrapper. This is one of the plugin's two patches of Detectron2.
"""

import functools
import logging
import sys
from collections.abc import Callable

import detectron2.layers.batch_norm as d2_batch_norm
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import nn

from .batch_norm import CrossGPUBatchNorm, cgbn_layers, name_layers
from .groups import SELF, BNGroup, consecutive_group, ranks_per_group

logger = logging.getLogger(__name__)

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


def set_bn_size(
    model: nn.Module, bn_size: int, images_per_gpu: int, cross_machine: bool = False
) -> nn.Module:
    """Makes every ``CrossGPUBatchNorm`` of ``model`` normalise over ``bn_size`` images.

    Every process has to call it, with the same arguments; it may be called again.

    Args:
        bn_size: images in a group, the paper's "BN size"; -1 for all on the machine, or, with
            ``cross_machine``, in the world.
        images_per_gpu: images a process sees in a step.
        cross_machine: let a group span machines, which the paper does not.

    Raises:
        ValueError: no equal groups make up ``bn_size``; the message lists the sizes that work.
    """
    size = group_ranks(bn_size, images_per_gpu, cross_machine)
    whole_machine = not cross_machine and size == _machine_size()
    group = machine_group() if whole_machine else consecutive_group(size)
    for layer in cgbn_layers(model):
        layer.process_group = group
    return name_layers(model)


def group_ranks(bn_size: int, images_per_gpu: int, cross_machine: bool) -> int:
    """Processes of a group of ``bn_size`` images, on this process's machine or in the world.

    Raises:
        ValueError: as ``set_bn_size``. RuntimeError: as ``machine_group``.
    """
    if cross_machine:
        return ranks_per_group(bn_size, images_per_gpu, comm.get_world_size())
    machine_group()  # the error that explains, where the machine is not known
    return ranks_per_group(bn_size, images_per_gpu, _machine_size())


def _machine_size() -> int:
    # A process group of one process need not have been told what a machine is.
    return 1 if comm.get_world_size() == 1 else comm.get_local_size()


def separate_retinanet_levels(model: nn.Module) -> nn.Module:
    """Gives RetinaNet's heads statistics of their own for every pyramid level, γ and β shared.

    Detectron2 does so for "BN" and "SyncBN" by comparing the name; with any other it lets levels of
    different statistics share one running mean, which its own warning says may not work well.
    Parameter names become those of Detectron2's RetinaNet with "SyncBN". In place; returns the
    model.
    """
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

    for head in model.modules():
        if not isinstance(head, RetinaNetHead):
            continue
        for subnet in (head.cls_subnet, head.bbox_subnet):
            for name, layer in subnet.named_children():
                if isinstance(layer, CrossGPUBatchNorm):
                    levels = CycleBatchNormList(
                        length=head._num_features,
                        bn_class=CrossGPUBatchNorm,
                        num_features=layer.num_features,
                        eps=layer.eps,
                        momentum=layer.momentum,
                        process_group=layer.process_group,
                        algorithm=layer.algorithm,
                    )
                    subnet.add_module(name, levels.to(layer.weight).train(layer.training))
        logger.info(f"CGBN: RetinaNet's {head._num_features} levels have statistics of their own")
    return model


def images_per_group(model: nn.Module, images_per_gpu: int) -> int:
    """Images that the model's CGBN layers normalise over; 0 where it has none."""
    layers = cgbn_layers(model)
    return images_per_gpu * layers[0].group_size() if layers else 0


def describe_norms(model: nn.Module, images_per_gpu: int) -> str:
    """One line for the log: CGBN layers, what they are over, and batch norms that are frozen."""
    layers = cgbn_layers(model)
    frozen = sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    tail = f"{frozen} batch norms are frozen (by FREEZE_AT, or by NORM FrozenBN)"
    if not layers:
        return f"CGBN: no layer; {tail}"
    images = images_per_group(model, images_per_gpu)
    return (
        f"CGBN: {len(layers)} layers, each over {images} images on "
        f"{layers[0].group_size()} processes ({layers[0].algorithm}); {tail}"
    )


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
