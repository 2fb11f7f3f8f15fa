"""Atrous convolution (Yu and Koltun, arXiv:1511.07122; DeepLab, arXiv:1606.00915) under an FPN.

    (F ∗_l k)(p) = Σ_{s + l t = p} F(s) k(t)                       (Yu and Koltun, Equation 2)

The taps of a kernel are l pixels apart. So it covers a larger field without a loss of resolution.
Detectron2's MODEL.RESNETS.RES5_DILATION 2 sets l = 2 in every 3×3 convolution of res5, and stride 1
in place of stride 2 at the start of res5. The levels are:

    stride      4     8     16      32    64
    stock       res2  res3  res4    res5
                p2    p3    p4      p5    p6
    here        res2  res3  res5             (res5 is computed from res4, at res4's stride)
                p2    p3    p4      p5    p6

An FPN needs each level at twice the stride of the one before. So res5 takes the place of res4, and
the stock FPN uses res2, res3 and res5. ``AtrousTopBlock`` builds p5 and p6 from p4. Every level has
its stock stride, so anchors and the assignment of boxes to levels do not change.
"""

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn


class AtrousTopBlock(nn.Module):
    """The FPN's top block: p5 by a 3×3 convolution of stride 2, and p6 by FPN's subsampling.

    Args:
        channels: C, the same for every level.
        norm: the norm of the convolution, as in the *.NORM keys.
    """

    num_levels = 2
    in_feature = "p4"

    def __init__(self, channels: int, norm: str = ""):
        super().__init__()
        self.p5 = Conv2d(
            channels, channels, kernel_size=3, stride=2, padding=1, bias=not norm,
            norm=get_norm(norm, channels),
        )  # fmt: skip
        weight_init.c2_xavier_fill(self.p5)
        self.p6 = LastLevelMaxPool()

    def forward(self, p4: Tensor) -> list[Tensor]:
        """Returns p5 (N, C, ⌈H/2⌉, ⌈W/2⌉) and p6 (N, C, ⌈H/4⌉, ⌈W/4⌉) of p4 (N, C, H, W)."""
        p5 = self.p5(p4)
        return [p5, *self.p6(p5)]


@BACKBONE_REGISTRY.register()
def build_atrous_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds the FPN on a ResNet with dilated res5; p2 to p6 have strides 4, 8, 16, 32 and 64.

    MODEL.ATROUS.BOTTOM_UP names the ResNet's builder. The other keys are in MODEL.RESNETS and
    MODEL.FPN.

    Raises:
        ValueError: RES5_DILATION is not 2; FPN.IN_FEATURES do not end in res5, or contain res4;
            ATROUS.BOTTOM_UP is not registered, or has other outputs.
    """
    dilation, in_features = cfg.MODEL.RESNETS.RES5_DILATION, list(cfg.MODEL.FPN.IN_FEATURES)
    bottom_up = cfg.MODEL.ATROUS.BOTTOM_UP
    if dilation != 2:
        raise ValueError(
            f"MODEL.RESNETS.RES5_DILATION is {dilation}, but {cfg.MODEL.BACKBONE.NAME} needs a "
            "dilated res5; set it to 2, or MODEL.BACKBONE.NAME to build_resnet_fpn_backbone"
        )
    if in_features[-1:] != ["res5"] or "res4" in in_features:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {in_features}, but a dilated res5 has res4's stride, 16, "
            'and takes its place; set IN_FEATURES, and MODEL.RESNETS.OUT_FEATURES, to ["res2", '
            '"res3", "res5"]'
        )
    if bottom_up not in BACKBONE_REGISTRY:
        raise ValueError(
            f"MODEL.ATROUS.BOTTOM_UP is {bottom_up!r}, but no backbone has this name; use "
            "build_resnet_backbone or build_se_resnet_backbone"
        )
    resnet = BACKBONE_REGISTRY.get(bottom_up)(cfg, input_shape)
    outputs = resnet.output_shape()
    if not set(in_features) <= set(outputs):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {in_features}, but {bottom_up} (MODEL.ATROUS.BOTTOM_UP) has "
            f"the outputs {', '.join(outputs)}; choose a ResNet without FPN, and set MODEL.RESNETS."
            "OUT_FEATURES to IN_FEATURES"
        )
    return FPN(
        bottom_up=resnet,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=AtrousTopBlock(cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
