"""Squeeze-and-excitation (Hu et al., arXiv:1709.01507, Figures 1 to 3) in Detectron2's ResNets.

A residual block y = ReLU(x + u) becomes y = ReLU(x + s ⊙ u), a gate for each channel of u, the
normalised output of the block's last convolution:

    z = mean of u over H × W                          squeeze, Equation 2
    s = σ(W₂ δ(W₁ z)),  W₁: C → C/r,  δ = ReLU        excitation, Equation 3

Detectron2's convolution applies norm, then activation, before the block adds the shortcut: the
gate, torchvision's ``SqueezeExcitation``, is that activation. So blocks, whether basic, bottleneck
or deformable, of a ResNet or a ResNeXt, stay the stock ones, and so do the names of all parameters
but the gates' ``conv3.activation.fc1`` and ``.fc2`` (``conv2`` in basic blocks): weights of
ResNe(X)t load as ever, and those without a counterpart are the gates' alone.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import (
    BACKBONE_REGISTRY,
    FPN,
    ResNet,
    build_resnet_backbone,
)
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torch import nn
from torchvision.ops import SqueezeExcitation

# σ(2) = 0.88: near enough to 1 that a network with ResNe(X)t's weights computes about what it did,
# with enough of σ's slope left (0.10, of at most 0.25) for the gates to learn.
OPEN = 2.0


@BACKBONE_REGISTRY.register()
def build_se_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """``build_resnet_backbone`` with gates; keys MODEL.RESNETS and MODEL.SE.

    Raises:
        ValueError: as ``add_squeeze_excitation``.
    """
    return _add_by_config(build_resnet_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_se_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_resnet_fpn_backbone`` with gates in its ResNet; keys MODEL.RESNETS, FPN and SE.

    Raises:
        ValueError: as ``add_squeeze_excitation``.
    """
    fpn = build_resnet_fpn_backbone(cfg, input_shape)
    _add_by_config(fpn.bottom_up, cfg)
    return fpn


def add_squeeze_excitation(resnet: ResNet, reduction: int = 16) -> ResNet:
    """Puts a gate behind the last norm of every residual block, in place; returns the ResNet.

    Every gate starts as the constant σ(``OPEN``), for any input.

    Args:
        reduction: r; a block's gate has C/r hidden channels.

    Raises:
        ValueError: a reduction below 1, or over the channels of res2.
    """
    blocks = [block for stage in resnet.stages for block in stage]
    narrowest = min(block.out_channels for block in blocks)
    if not 1 <= reduction <= narrowest:
        raise ValueError(
            f"MODEL.SE.REDUCTION is {reduction}; give 1 to {narrowest}, the channels of res2"
        )
    for block in blocks:
        last = block.conv3 if hasattr(block, "conv3") else block.conv2
        last.activation = _gate(block.out_channels, reduction)
    return resnet


def _gate(channels: int, reduction: int) -> SqueezeExcitation:
    gate = SqueezeExcitation(channels, channels // reduction)
    nn.init.kaiming_normal_(gate.fc1.weight, nonlinearity="relu")
    nn.init.zeros_(gate.fc1.bias)
    nn.init.zeros_(gate.fc2.weight)
    nn.init.constant_(gate.fc2.bias, OPEN)
    return gate


def _add_by_config(resnet: ResNet, cfg: CfgNode) -> ResNet:
    add_squeeze_excitation(resnet, cfg.MODEL.SE.REDUCTION)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)  # the new gates of frozen stages too
