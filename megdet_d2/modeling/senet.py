"""Adds squeeze-and-excitation to ResNets (Hu et al., arXiv:1709.01507, Figures 1 to 3).

A residual block y = ReLU(x + u) becomes y = ReLU(x + s ⊙ u). Here u is the normalised output of the
block's last convolution, and s is a gate with one value per channel:

    z = mean of u over H × W                          squeeze, Equation 2
    s = σ(W₂ δ(W₁ z)),  W₁: C → C/r,  δ = ReLU        excitation, Equation 3

Detectron2's convolution applies its norm, then its activation, before the block adds the shortcut.
The gate, torchvision's ``SqueezeExcitation``, is this activation. So the blocks (basic, bottleneck
or deformable, of a ResNet or a ResNeXt) are the stock ones, and weights of ResNe(X)t load normally.
The only new parameters are the gates' ``conv3.activation.fc1`` and ``.fc2`` (``conv2`` in basic
blocks).
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

from .thin_resnet import build_thin_resnet_fpn_backbone

# σ(2) = 0.88 is close to 1, so a network with ResNe(X)t's weights computes nearly the same. And the
# slope of σ there, 0.10 of at most 0.25, lets the gates learn.
OPEN = 2.0


@BACKBONE_REGISTRY.register()
def build_se_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds Detectron2's ResNet with gates, by the keys MODEL.RESNETS and MODEL.SE.

    Raises:
        ValueError: the reduction is not valid, see ``add_squeeze_excitation``.
    """
    return _add_by_config(build_resnet_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_se_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds Detectron2's FPN on a ResNet with gates, by the keys MODEL.RESNETS, FPN and SE.

    Raises:
        ValueError: the reduction is not valid, see ``add_squeeze_excitation``.
    """
    return _add_below(build_resnet_fpn_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_thin_se_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds the FPN of the studies with gates, see ``build_thin_resnet_fpn_backbone``.

    Raises:
        ValueError: the reduction is not valid, see ``add_squeeze_excitation``.
    """
    return _add_below(build_thin_resnet_fpn_backbone(cfg, input_shape), cfg)


def add_squeeze_excitation(resnet: ResNet, reduction: int = 16) -> ResNet:
    """Adds a gate after the last norm of every residual block, in place.

    At first every gate is the constant σ(``OPEN``), for any input.

    Args:
        reduction: r; the gate of a block with C channels has C/r hidden channels.

    Returns:
        the ResNet.

    Raises:
        ValueError: the reduction is below 1, or above the channels of res2.
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


def _add_below(fpn: FPN, cfg: CfgNode) -> FPN:
    _add_by_config(fpn.bottom_up, cfg)
    return fpn


def _add_by_config(resnet: ResNet, cfg: CfgNode) -> ResNet:
    add_squeeze_excitation(resnet, cfg.MODEL.SE.REDUCTION)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)  # again, for the gates of frozen stages
