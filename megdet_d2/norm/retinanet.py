"""The separate CGBN statistics for the pyramid levels of RetinaNet's heads."""

import logging
from typing import Any

import detectron2.layers
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from .batch_norm import CrossGPUBatchNorm, cgbn_layers

logger = logging.getLogger(__name__)


def separate_retinanet_levels(model: nn.Module) -> nn.Module:
    """Gives RetinaNet's heads separate CGBN statistics per pyramid level; levels share γ and β.

    Detectron2 does so for "BN" and "SyncBN" only, because it compares the name of the norm. With
    any other norm, levels of different statistics share one running mean, and Detectron2 warns
    that this may not work well. Here γ and β stay the same parameters, and each level starts from
    the shared running statistics. Buffer names become those of RetinaNet with "SyncBN".

    Args:
        model: changed in place; other models, and heads already separated, stay as they are.

    Returns:
        the model.
    """
    for head in model.modules():
        if not isinstance(head, RetinaNetHead) or not cgbn_layers(head):
            continue
        if not hasattr(detectron2.layers, "CycleBatchNormList"):
            logger.warning(
                "CGBN: the levels of RetinaNet's head share their running statistics, as every "
                "norm does there before Detectron2 0.6"
            )
            continue
        replaced = 0
        for subnet in (head.cls_subnet, head.bbox_subnet):
            for name, layer in subnet.named_children():
                if isinstance(layer, CrossGPUBatchNorm):
                    subnet.add_module(name, _levels(layer, head._num_features))
                    replaced += 1
        if replaced:
            logger.info(f"CGBN: separate statistics for RetinaNet's {head._num_features} levels")
    return model


def restart_levels(model: nn.Module) -> None:
    """Lets heads with statistics per level begin with the first level again.

    Detectron2's layer counts its calls, and a forward that an error ends leaves the count between
    two levels.

    Args:
        model: changed in place.
    """
    kind: Any = getattr(detectron2.layers, "CycleBatchNormList", ())
    for module in model.modules():
        if isinstance(module, kind):
            module._pos = 0


def _levels(layer: CrossGPUBatchNorm, length: int) -> nn.ModuleList:
    levels: Any = detectron2.layers.CycleBatchNormList(
        length=length,
        bn_class=CrossGPUBatchNorm,
        num_features=layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        process_group=layer.process_group,
        algorithm=layer.algorithm,
    ).to(layer.weight)
    # The same objects, so that an optimizer or DDP built before still has them.
    levels.weight, levels.bias = layer.weight, layer.bias
    for level in levels:
        for name, buffer in level.named_buffers():
            buffer.copy_(getattr(layer, name))
        level.accumulation_steps = layer.accumulation_steps
        level.valid_region = layer.valid_region
    return levels.train(layer.training)
