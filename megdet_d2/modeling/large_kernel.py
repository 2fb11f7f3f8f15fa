"""Large separable kernels (Peng et al., Large Kernel Matters, CVPR 2017, Figure 2B).

The layer covers k×k pixels with 4k taps per channel. One path is a k×1 and then a 1×k convolution.
The other is a 1×k and then a k×1 convolution. There is no nonlinearity inside a path:

    y = W₂ʰ ∗ (W₁ᵛ ∗ x) + W₂ᵛ ∗ (W₁ʰ ∗ x)

``LargeKernelRPNHead`` uses it in place of the RPN's 3×3 convolution. ``LargeKernelBoxHead`` uses it
to compute the thin feature map of Light-Head R-CNN (Li et al., arXiv:1711.07264).
"""

from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from torch import Tensor, nn
from torch.nn import functional as F

from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.registry import machine_group


class LargeKernel(nn.Module):
    """The layer ReLU(norm(y)), y as in the module's equation: (N, C, H, W) to (N, C', H, W).

    N may be 0.

    Args:
        in_channels, out_channels: C and C'.
        size: k, odd.
        mid_channels: channels between the two convolutions of each path.
        norm: a layer over C' channels; with None the second convolutions have a bias.

    Raises:
        ValueError: the size is even, which would change height and width; or a number of channels
            is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        mid_channels: int,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(
                f"a large kernel's size is {size}; give an odd number for MODEL.LARGE_KERNEL.SIZE "
                "and BOX_SIZE"
            )
        if min(mid_channels, out_channels) < 1:
            raise ValueError(
                f"a large kernel has {mid_channels} middle and {out_channels} output channels; "
                "give 1 or more for MODEL.LARGE_KERNEL.MID_CHANNELS and BOX_CHANNELS"
            )

        def path(first: tuple[int, int], second: tuple[int, int]) -> nn.Sequential:
            # No bias inside, so that the path is one linear map, with zeros beyond the border.
            return nn.Sequential(
                nn.Conv2d(in_channels, mid_channels, first, padding="same", bias=False),
                nn.Conv2d(mid_channels, out_channels, second, padding="same", bias=norm is None),
            )

        self.vertical_first = path((size, 1), (1, size))
        self.horizontal_first = path((1, size), (size, 1))
        self.norm = norm
        for layer in (*self.vertical_first, *self.horizontal_first):
            # Each path keeps the variance, so the sum has twice x's: He's factor before a ReLU.
            weight_init.c2_xavier_fill(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ReLU(norm(y)), (N, C', H, W)."""
        y = self.vertical_first(x) + self.horizontal_first(x)
        return F.relu(y if self.norm is None else self.norm(y))


@RPN_HEAD_REGISTRY.register()
class LargeKernelRPNHead(StandardRPNHead):
    """``StandardRPNHead`` with a ``LargeKernel`` in place of its 3×3 convolution.

    All levels share the layer, which runs once per level. So in training a batch norm uses the
    statistics of one level at a time. With "CGBN" the running statistics are separate per level
    too, as in Detectron2's RetinaNet. Other batch norms mix the running statistics of all levels.

    Args:
        in_channels, kwargs: as in ``StandardRPNHead``.
        size, mid_channels: as in ``LargeKernel``.
        norm: as in the *.NORM keys.
        num_levels: feature maps per forward.

    Raises:
        ValueError: the size is even, or MODEL.RPN.CONV_DIMS has more than one entry.
    """

    conv: Any

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        mid_channels: int,
        norm: str = "",
        num_levels: int = 1,
        **kwargs: Any,
    ):
        super().__init__(in_channels=in_channels, **kwargs)
        if isinstance(self.conv, nn.Sequential):
            raise ValueError(
                f"MODEL.RPN.CONV_DIMS has {len(self.conv)} entries, but LargeKernelRPNHead has one "
                "large kernel; give one entry, or use StandardRPNHead"
            )
        channels = self.conv.out_channels
        if norm == "CGBN":
            layer = CycleBatchNormList(
                num_levels, CrossGPUBatchNorm, num_features=channels, process_group=machine_group()
            )
        else:
            layer = get_norm(norm, channels)
        self.conv = LargeKernel(in_channels, channels, size, mid_channels, layer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict:
        """Returns the constructor's arguments."""
        keys = cfg.MODEL.LARGE_KERNEL
        return super().from_config(cfg, input_shape) | {
            "size": keys.SIZE,
            "mid_channels": keys.MID_CHANNELS,
            "norm": keys.NORM,
            "num_levels": len(input_shape),
        }


@ROI_BOX_HEAD_REGISTRY.register()
class LargeKernelBoxHead(FastRCNNConvFCHead):
    """A ``LargeKernel`` from C to few channels, and fully connected layers, for each region.

    The input is (R, C, H, W), the output (R, D); R may be 0. The head is a ``FastRCNNConvFCHead``
    with one convolution; it does not read MODEL.ROI_BOX_HEAD.NUM_CONV and CONV_DIM. Light-Head
    R-CNN applies the kernel to the whole image, before the pooling. Here it comes after the
    pooling, like every box head in Detectron2.

    Args:
        input_shape: C, H and W.
        size, mid_channels: as in ``LargeKernel``.
        channels: channels of the thin map; Light-Head R-CNN has 10 × 7 × 7.
        fc_dims: D of each fully connected layer, in order.
        conv_norm: the norm of the thin map, as in the *.NORM keys.

    Raises:
        ValueError: the size is even.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        size: int,
        mid_channels: int,
        channels: int,
        fc_dims: list[int],
        conv_norm: str = "",
    ):
        super().__init__(input_shape, conv_dims=[channels], fc_dims=fc_dims, conv_norm=conv_norm)
        norm = get_norm(conv_norm, channels)
        # Replaces the stock head's 3×3 convolution, before the fully connected layers.
        self.conv1 = LargeKernel(input_shape.channels, channels, size, mid_channels, norm)
        self.conv_norm_relus = [self.conv1]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Returns the constructor's arguments."""
        keys, head = cfg.MODEL.LARGE_KERNEL, cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "size": keys.BOX_SIZE,
            "mid_channels": keys.MID_CHANNELS,
            "channels": keys.BOX_CHANNELS,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": head.NORM,
        }
