"""ResNet's blocks with CGBN, the addition of the shortcut and ReLU in one pass over the values.

Detectron2's blocks apply ReLU, and add the shortcut, behind the convolution's norm, so that a
feature map is read and written up to three times. The classes here differ from their parents in
``forward`` alone; parameters, buffers and their names are the same.
"""

import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from megdet_d2.norm.batch_norm import CrossGPUBatchNorm


class FusedBasicStem(BasicStem):
    """(N, 3, H, W) to (N, C, H/4, W/4), as ``BasicStem``."""

    def forward(self, x: Tensor) -> Tensor:
        x = _conv_norm_relu(self.conv1, x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    """(N, C, H, W) to (N, C', H/s, W/s), as ``BasicBlock``."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return _conv_norm_relu(self.conv2, _conv_norm_relu(self.conv1, x), shortcut)


class FusedBottleneckBlock(BottleneckBlock):
    """(N, C, H, W) to (N, C', H/s, W/s), as ``BottleneckBlock``."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = _conv_norm_relu(self.conv2, _conv_norm_relu(self.conv1, x))
        return _conv_norm_relu(self.conv3, out, shortcut)


_FUSED = {
    BasicStem: FusedBasicStem,
    BasicBlock: FusedBasicBlock,
    BottleneckBlock: FusedBottleneckBlock,
}
_UNFUSED = {fused: plain for plain, fused in _FUSED.items()}


def fuse_activations(model: nn.Module) -> int:
    """Fuses the activations of the model's ResNet blocks with their CGBN layers, in place.

    Returns:
        How many blocks it did. Left alone are blocks with another norm (those that FREEZE_AT has
        frozen, for one), with an activation of their own (SE's gates), deformable ones and those of
        other projects.
    """
    fused = 0
    for block in model.modules():
        convs = [conv for name, conv in block.named_children() if name != "shortcut"]
        if type(block) in _FUSED and all(
            isinstance(c.norm, CrossGPUBatchNorm) and c.activation is None for c in convs
        ):
            block.__class__ = _FUSED[type(block)]
            fused += 1
    return fused


def unfuse_activations(model: nn.Module) -> nn.Module:
    """Undoes ``fuse_activations``, in place; returns the model."""
    for block in model.modules():
        block.__class__ = _UNFUSED.get(type(block), type(block))
    return model


def _conv_norm_relu(conv: Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    x = conv._conv_forward(x, conv.weight, conv.bias)
    if isinstance(conv.norm, CrossGPUBatchNorm):
        return conv.norm(x, residual, relu=True)
    x = conv.norm(x)  # the model has been reverted, or frozen, since
    return F.relu_(x if residual is None else x + residual)
