"""A box head with maxout (Goodfellow et al., ICML 2013), after Networks on Conv feature maps (NoC).

    h_i(x) = max_{j = 1..k} z_ij,   z_ij = xᵀ W_{·ij} + b_ij          (Goodfellow et al., §3)

NoC (Ren et al., TPAMI 2017) takes the maximum over two branches, for two neighbouring scales of an
image pyramid. With an FPN a region is pooled from one level, so there is no second branch. Here the
maximum is that of the definition, over k linear maps of the same features.
"""

from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from torch import Tensor, nn


class Maxout(nn.Module):
    """The elementwise maximum of k linear maps: (R, D) to (R, D'); R may be 0.

    Args:
        in_features, out_features: D and D'.
        pieces: k.

    Raises:
        ValueError: pieces is below 2, which would be a linear map.
    """

    def __init__(self, in_features: int, out_features: int, pieces: int):
        super().__init__()
        if pieces < 2:
            raise ValueError(f"MODEL.MAXOUT.PIECES is {pieces}; give 2 or more")
        self.shape = (out_features, pieces)
        self.linear = nn.Linear(in_features, out_features * pieces)
        weight_init.c2_xavier_fill(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        """Returns h(x), (R, D')."""
        z = self.linear(x).unflatten(1, self.shape)
        return z.max(dim=2).values


@ROI_BOX_HEAD_REGISTRY.register()
class MaxoutBoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` with ``Maxout`` in place of each fully connected layer and its ReLU.

    The input is (R, C, H, W), the output (R, D); R may be 0. Convolutions and their norm are those
    of the stock head. With MODEL.ROI_BOX_HEAD.NUM_CONV above 0 this is NoC's head with maxout.

    Args:
        input_shape: C, H and W.
        pieces: k, as in ``Maxout``.
        kwargs: conv_dims, fc_dims and conv_norm, as in ``FastRCNNConvFCHead``.

    Raises:
        ValueError: pieces is below 2, or there is no fully connected layer.
    """

    fcs: list[Any]

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, pieces: int, **kwargs: Any):
        super().__init__(input_shape, **kwargs)
        if not self.fcs:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.NUM_FC is 0, but MaxoutBoxHead has maxout in the fully "
                "connected layers; give 1 or more, or use FastRCNNConvFCHead"
            )
        for k, fc in enumerate(self.fcs, start=1):
            self.add_module(f"fc{k}", Maxout(fc.in_features, fc.out_features, pieces))
            delattr(self, f"fc_relu{k}")  # the maximum is the nonlinearity
        self.fcs = [layer for layer in self if isinstance(layer, Maxout)]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Returns the constructor's arguments."""
        return super().from_config(cfg, input_shape) | {"pieces": cfg.MODEL.MAXOUT.PIECES}
