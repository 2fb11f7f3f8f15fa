"""Applies the config's ``MODEL.CGBN`` keys, all or only the BN size, to a built model.

``configure_cgbn`` is the one that a training loop calls. ``Trainer`` calls it too.
"""

import logging
import sys
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import nn

from .batch_norm import bare_model, cgbn_layers, name_layers, set_accumulation_steps
from .functional import ALGORITHMS
from .groups import consecutive_group, ranks_per_group
from .keys import NormKey, describe_norm_keys, plain_batch_norms
from .padding import count_padding, ignore_padding
from .registry import machine_group
from .retinanet import separate_retinanet_levels

logger = logging.getLogger(__name__)


def configure_cgbn(model: nn.Module, cfg: CfgNode, images_per_gpu: int) -> nn.Module:
    """Applies every ``MODEL.CGBN`` key of ``cfg`` to the CGBN layers of ``model``, in place.

    BN_SIZE and CROSS_MACHINE set the process group, and ALGORITHM the number of reductions.
    ``MEGDET.ACCUMULATION_STEPS`` sets the momentum of the running statistics. IGNORE_PADDING and
    FUSE_ACTIVATION are switched on or off. Each layer gets its name in the model, for errors.
    RetinaNet's heads get separate statistics per level, see ``separate_retinanet_levels``.

    Call it on every process with the same arguments, before weights are loaded. A second call
    replaces the values of the first. A model without CGBN layers stays as it is.

    Args:
        model: a Detectron2 model, plain or wrapped in ``DistributedDataParallel``.
        cfg: a config with the keys of ``add_megdet_config``.
        images_per_gpu: images that one process sees in one forward, that is in one micro-batch.

    Returns:
        the model.

    Raises:
        ValueError: a value is not valid. The message names the key. The model is then unchanged.
        RuntimeError: several processes run, and their machines are unknown, see ``machine_group``.
    """
    if "MEGDET" not in cfg:
        raise ValueError("cfg has no MEGDET keys: call megdet_d2.add_megdet_config(cfg) first")
    keys, steps = cfg.MODEL.CGBN, cfg.MEGDET.ACCUMULATION_STEPS
    if keys.ALGORITHM not in ALGORITHMS:
        raise ValueError(
            f"MODEL.CGBN.ALGORITHM is {keys.ALGORITHM!r}; use one of {', '.join(ALGORITHMS)}"
        )
    if steps < 1:
        raise ValueError(f"MEGDET.ACCUMULATION_STEPS is {steps!r}; give a whole number from 1")
    if not cgbn_layers(model):
        return model
    set_bn_size(model, keys.BN_SIZE, images_per_gpu, keys.CROSS_MACHINE)

    # Names and hooks belong to the model that DDP wraps.
    bare = bare_model(model)
    name_layers(separate_retinanet_levels(bare))
    for layer in cgbn_layers(bare):
        layer.algorithm = keys.ALGORITHM
    set_accumulation_steps(bare, steps)
    if keys.IGNORE_PADDING:
        ignore_padding(bare)
        if all(layer.valid_region is None for layer in cgbn_layers(bare)):
            logger.warning(
                "MODEL.CGBN.IGNORE_PADDING is True, but the model has no CGBN layer in a backbone "
                "or a dense head, whose input is padded"
            )
    else:
        count_padding(bare)
    _fuse_or_unfuse(bare, keys.FUSE_ACTIVATION)
    return model


def _fuse_or_unfuse(model: nn.Module, fuse: bool) -> None:
    module = "megdet_d2.modeling.fused_resnet"
    if not fuse and module not in sys.modules:  # then no block is fused
        return
    # Not at the top, because the package of the models does not load on an older Detectron2.
    from megdet_d2.modeling.fused_resnet import fuse_activations, fused_blocks, unfuse_activations

    if not fuse:
        unfuse_activations(model)
        return
    fused = fuse_activations(model)
    if fused:
        logger.info(f"CGBN: fused the activations of {fused} blocks")
    elif not fused_blocks(model):
        logger.warning(
            "MODEL.CGBN.FUSE_ACTIVATION is True, but the model has no ResNet block with CGBN "
            "that can be fused"
        )


def set_bn_size(
    model: nn.Module, bn_size: int, images_per_gpu: int, cross_machine: bool = False
) -> nn.Module:
    """Makes every CGBN layer of ``model`` normalise over ``bn_size`` images; also names the layers.

    Call it on every process with the same arguments. It may be called again.

    Args:
        bn_size: images in a group, the paper's "BN size" (Table 3). -1 stands for all images on
            the machine, or, with ``cross_machine``, of all processes.
        images_per_gpu: images that one process sees in one forward.
        cross_machine: allows groups that span machines, which the paper does not use.

    Returns:
        the model.

    Raises:
        ValueError: no equal groups have ``bn_size`` images. The message lists the valid sizes.
        RuntimeError: several processes run, and their machines are unknown, see ``machine_group``.
    """
    size = group_ranks(bn_size, images_per_gpu, cross_machine)
    whole_machine = not cross_machine and size == _machine_size()
    group = machine_group() if whole_machine else consecutive_group(size)
    for layer in cgbn_layers(model):
        layer.process_group = group
    return name_layers(model)


def group_ranks(bn_size: int, images_per_gpu: int, cross_machine: bool) -> int:
    """Returns the number of processes in a group of ``bn_size`` images; see ``set_bn_size``.

    Raises:
        ValueError: no equal groups have ``bn_size`` images. The message lists the valid sizes.
        RuntimeError: several processes run, and their machines are unknown, see ``machine_group``.
    """
    if cross_machine:
        return ranks_per_group(bn_size, images_per_gpu, comm.get_world_size())
    machine_group()  # raises the error that explains, where the machines are unknown
    return ranks_per_group(bn_size, images_per_gpu, _machine_size())


def images_per_group(model: nn.Module, images_per_gpu: int) -> int:
    """Returns the number of images that the CGBN layers normalise over; 0 without such layers."""
    layers = cgbn_layers(model)
    return images_per_gpu * layers[0].group_size() if layers else 0


def describe_norms(
    model: nn.Module, images_per_gpu: int, keys: Mapping[str, NormKey] | None = None
) -> str:
    """Returns a line for the log: the CGBN layers and their group, other batch norms, the keys.

    Args:
        model: plain or wrapped in ``DistributedDataParallel``.
        images_per_gpu: images that one process sees in one forward.
        keys: the NORM keys of the config, and the layers that the model made of each.
    """
    layers = cgbn_layers(model)
    frozen = sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    tail = f"{frozen} batch norms are frozen (by FREEZE_AT, or by NORM FrozenBN)"
    plain = len(plain_batch_norms(model))
    if plain:
        tail += f", and {plain} are plain, over the images of one process"
    by_key = describe_norm_keys(keys or {})
    if by_key:
        tail += f"; {by_key}"
    if not layers:
        return f"CGBN: no layer; {tail}"
    images = images_per_group(model, images_per_gpu)
    return (
        f"CGBN: {len(layers)} layers, each over {images} images on "
        f"{layers[0].group_size()} processes ({layers[0].algorithm}); {tail}"
    )


def _machine_size() -> int:
    # A run of one process need not have called Detectron2's launch.
    return 1 if comm.get_world_size() == 1 else comm.get_local_size()
