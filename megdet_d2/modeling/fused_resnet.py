"""ResNet blocks that apply CGBN, the shortcut and ReLU in one pass over the values.

Detectron2's blocks add the shortcut and apply ReLU after the norm. So they read and write a feature
map up to three times. The classes here override ``forward`` only. Parameters, buffers and their
names stay the same. TorchScript, which runs evaluation only, gets the separate passes.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from megdet_d2.norm.batch_norm import CrossGPUBatchNorm


class FusedBasicStem(BasicStem):
    """``BasicStem`` with the fused pass: (N, 3, H, W) to (N, C, H/4, W/4)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output; see the class for shapes."""
        if torch.jit.is_scripting():
            x = F.relu_(self.conv1(x))
        else:
            x = _conv_norm_relu(self.conv1, x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    """``BasicBlock`` with the fused pass: (N, C, H, W) to (N, C', H/s, W/s)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output; see the class for shapes."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if torch.jit.is_scripting():
            return F.relu_(self.conv2(F.relu_(self.conv1(x))) + shortcut)
        return _conv_norm_relu(self.conv2, _conv_norm_relu(self.conv1, x), shortcut)


class FusedBottleneckBlock(BottleneckBlock):
    """``BottleneckBlock`` with the fused pass: (N, C, H, W) to (N, C', H/s, W/s)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output; see the class for shapes."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if torch.jit.is_scripting():
            x = self.conv2(F.relu_(self.conv1(x)))
            return F.relu_(self.conv3(F.relu_(x)) + shortcut)
        out = _conv_norm_relu(self.conv2, _conv_norm_relu(self.conv1, x))
        return _conv_norm_relu(self.conv3, out, shortcut)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: FusedBasicStem,
    BasicBlock: FusedBasicBlock,
    BottleneckBlock: FusedBottleneckBlock,
}
_UNFUSED = {fused: plain for plain, fused in _FUSED.items()}


def fuse_activations(model: nn.Module) -> int:
    """Fuses the activations of the model's ResNet blocks with their CGBN layers, in place.

    It changes the class of a block. Some blocks stay as they are: those with another norm (frozen
    by FREEZE_AT, for example), with an activation in a convolution (SE's gates), deformable blocks,
    and blocks of other projects.

    Returns:
        the number of blocks that this call has fused.
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


def fused_blocks(model: nn.Module) -> int:
    """Returns the number of fused blocks in ``model``."""
    return sum(type(block) in _UNFUSED for block in model.modules())


def _conv_norm_relu(conv: Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    x = conv._conv_forward(x, conv.weight, conv.bias)
    if isinstance(conv.norm, CrossGPUBatchNorm):
        return conv.norm(x, residual, relu=True)
    x = conv.norm(x)  # revert_cgbn or freeze has replaced the CGBN layer
    return F.relu_(x if residual is None else x + residual)
