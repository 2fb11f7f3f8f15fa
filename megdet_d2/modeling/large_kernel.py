"""Large separable kernels (Peng et al., Large Kernel Matters, CVPR 2017, Figure 2B).

A k×k convolution for the price of 4k taps a channel: a k×1 and then a 1×k convolution, beside a 1×k
and then a k×1, summed, with nothing between the two, unlike in a plain separable convolution:

    y = W₂ʰ ∗ (W₁ᵛ ∗ x) + W₂ᵛ ∗ (W₁ʰ ∗ x)

``LargeKernelRPNHead`` has it in the place of the RPN's 3×3 convolution; ``LargeKernelBoxHead``
makes the thin map of Light-Head R-CNN (Li et al., arXiv:1711.07264) with it.
"""

from collections.abc import Sequence

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
    """ReLU(norm(y)), y as above: (N, C, H, W), any N from 0, to (N, C', H, W).

    Args:
        in_channels, out_channels: C and C'.
        size: k, odd.
        mid_channels: between the two convolutions of each path.
        norm: a layer over C' channels; None for a bias in its place.

    Raises:
        ValueError: an even size, whose output would not have the input's height and width; no
            channels.
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
                f"a large kernel has {mid_channels} channels within and {out_channels} behind it; "
                "give 1 or more for MODEL.LARGE_KERNEL.MID_CHANNELS and BOX_CHANNELS"
            )

        def path(first: tuple[int, int], second: tuple[int, int]) -> nn.Sequential:
            # No bias within: the path is one linear map, and at the border sees plain zeros.
            return nn.Sequential(
                nn.Conv2d(in_channels, mid_channels, first, padding="same", bias=False),
                nn.Conv2d(mid_channels, out_channels, second, padding="same", bias=norm is None),
            )

        self.vertical_first = path((size, 1), (1, size))
        self.horizontal_first = path((1, size), (size, 1))
        self.norm = norm
        for layer in (*self.vertical_first, *self.horizontal_first):
            # Each path keeps the variance, so their sum has twice x's: He's factor before a ReLU.
            weight_init.c2_xavier_fill(layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.vertical_first(x) + self.horizontal_first(x)
        return F.relu(y if self.norm is None else self.norm(y))


@RPN_HEAD_REGISTRY.register()
class LargeKernelRPNHead(StandardRPNHead):
    """``StandardRPNHead`` with a ``LargeKernel`` for its 3×3 convolution; in and out as there.

    All levels share the layer, each in a call of its own, so with a batch norm each is normalised
    by its own statistics in training. With "CGBN" it has running statistics of its own as well, as
    in Detectron2's RetinaNet; other batch norms mix those of all levels.

    Args:
        in_channels, kwargs: ``StandardRPNHead``'s.
        size, mid_channels: ``LargeKernel``'s.
        norm: as *.NORM keys have it.
        num_levels: feature maps in a forward.

    Raises:
        ValueError: an even size; more than one entry in MODEL.RPN.CONV_DIMS.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        mid_channels: int,
        norm: str = "",
        num_levels: int = 1,
        **kwargs,
    ):
        super().__init__(in_channels=in_channels, **kwargs)
        if isinstance(self.conv, nn.Sequential):
            raise ValueError(
                f"MODEL.RPN.CONV_DIMS has {len(self.conv)} entries, and LargeKernelRPNHead has one "
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
        keys = cfg.MODEL.LARGE_KERNEL
        return super().from_config(cfg, input_shape) | {
            "size": keys.SIZE,
            "mid_channels": keys.MID_CHANNELS,
            "norm": keys.NORM,
            "num_levels": len(input_shape),
        }


@ROI_BOX_HEAD_REGISTRY.register()
class LargeKernelBoxHead(FastRCNNConvFCHead):
    """A ``LargeKernel`` from C to a few channels over each region, then fully connected layers.

    Of (R, C, H, W), any R from 0, it makes (R, D), as ``FastRCNNConvFCHead`` with one convolution;
    MODEL.ROI_BOX_HEAD.NUM_CONV and CONV_DIM are not read.
    Light-Head R-CNN has the kernel over the whole image, in front of the pooling; here it is behind
    the pooling, as is all that is registered as a box head.

    Args:
        input_shape: C, H and W.
        size, mid_channels: ``LargeKernel``'s.
        channels: of the thin map; Light-Head's is 10 × 7 × 7.
        fc_dims: D of each fully connected layer, in order.
        conv_norm: of the thin map, as *.NORM keys have it.

    Raises:
        ValueError: an even size.
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
        # In the place of the stock head's 3×3 convolution, before the fully connected layers.
        self.conv1 = LargeKernel(input_shape.channels, channels, size, mid_channels, norm)
        self.conv_norm_relus = [self.conv1]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        keys, head = cfg.MODEL.LARGE_KERNEL, cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "size": keys.BOX_SIZE,
            "mid_channels": keys.MID_CHANNELS,
            "channels": keys.BOX_CHANNELS,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": head.NORM,
        }
