"""Maxout (Goodfellow et al., ICML 2013) in the box head of Networks on Conv feature maps (NoC).

    h_i(x) = max_{j = 1..k} z_ij,   z_ij = xᵀ W_{·ij} + b_ij          (Goodfellow et al., §3)

NoC (Ren et al., TPAMI 2017) takes the maximum over two branches, one for each of two neighbouring
scales of an image pyramid. Here it is that of the definition, over k linear maps of the same
features: with an FPN a region is pooled from one level, and there is no second branch.
"""

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from torch import Tensor, nn


class Maxout(nn.Module):
    """(R, D), any R from 0, to (R, D'): the largest of k linear maps, element by element.

    Args:
        in_features, out_features: D and D'.
        pieces: k.

    Raises:
        ValueError: pieces below 2, which would leave a linear map.
    """

    def __init__(self, in_features: int, out_features: int, pieces: int):
        super().__init__()
        if pieces < 2:
            raise ValueError(f"MODEL.MAXOUT.PIECES is {pieces}; give 2 or more")
        self.shape = (out_features, pieces)
        self.linear = nn.Linear(in_features, out_features * pieces)
        weight_init.c2_xavier_fill(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x).unflatten(1, self.shape)
        return z.max(dim=2).values


@ROI_BOX_HEAD_REGISTRY.register()
class MaxoutBoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` with ``Maxout`` for each fully connected layer and its ReLU.

    Of (R, C, H, W), any R from 0, it makes (R, D). Convolutions, with their norm, are the stock
    head's: with MODEL.ROI_BOX_HEAD.NUM_CONV above 0 this is NoC's head with maxout.

    Args:
        input_shape: C, H and W.
        pieces: ``Maxout``'s.
        kwargs: conv_dims, fc_dims and conv_norm, as ``FastRCNNConvFCHead``.

    Raises:
        ValueError: pieces below 2; no fully connected layer.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, pieces: int, **kwargs):
        super().__init__(input_shape, **kwargs)
        if not self.fcs:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.NUM_FC is 0, and MaxoutBoxHead has maxout in the fully "
                "connected layers; give 1 or more, or use FastRCNNConvFCHead"
            )
        for k, fc in enumerate(self.fcs, start=1):
            self.add_module(f"fc{k}", Maxout(fc.in_features, fc.out_features, pieces))
            delattr(self, f"fc_relu{k}")  # the maximum is the nonlinearity
        self.fcs = [layer for layer in self if isinstance(layer, Maxout)]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return super().from_config(cfg, input_shape) | {"pieces": cfg.MODEL.MAXOUT.PIECES}
