"""A thin residual network for studies on processors: a few milliseconds per image.

MODEL.BACKBONE.NAME "build_thin_resnet_fpn_backbone". The parts are Detectron2's; what differs from
its ResNet-18 is the width, which Detectron2 fixes at 64 channels there, and a stem of stride 2
without pooling, which leaves something to see in images of 32 pixels.
"""

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from torch import Tensor, nn

# Residual blocks of each stage, as in ResNet-18.
BLOCKS = 2


class ThinStem(CNNBlockBase):
    """A 3×3 convolution of stride 2 with norm and ReLU: (N, 3, H, W) to (N, C, H/2, W/2).

    Args:
        in_channels: channels of the images.
        out_channels: C.
        norm: name of a norm, as ``detectron2.layers.get_norm`` takes it.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__(in_channels, out_channels, stride=2)
        self.conv1 = Conv2d(
            in_channels,
            out_channels,
            kernel_size=3,
            stride=2,
            padding=1,
            bias=False,
            norm=get_norm(norm, out_channels),
            activation=nn.functional.relu_,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features of ``x``."""
        return self.conv1(x)


@BACKBONE_REGISTRY.register()
def build_thin_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds an FPN, without a level on top, over basic blocks of few channels.

    Reads ``MODEL.RESNETS`` (``STEM_OUT_CHANNELS``, ``RES2_OUT_CHANNELS``, which doubles with each
    stage, ``OUT_FEATURES``, ``NORM``), ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.FPN``. Its strides
    are a ResNet's: 4 for res2, 8 for res3, and so on.
    """
    keys = cfg.MODEL.RESNETS
    stem = ThinStem(input_shape.channels, keys.STEM_OUT_CHANNELS, keys.NORM)
    before, channels, stages = keys.STEM_OUT_CHANNELS, keys.RES2_OUT_CHANNELS, []
    deepest = max(int(name.removeprefix("res")) for name in keys.OUT_FEATURES)
    for _ in range(2, deepest + 1):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                BLOCKS,
                stride_per_block=[2] + [1] * (BLOCKS - 1),
                in_channels=before,
                out_channels=channels,
                norm=keys.NORM,
            )
        )
        before, channels = channels, 2 * channels
    return FPN(
        bottom_up=ResNet(
            stem,
            stages,
            out_features=list(keys.OUT_FEATURES),
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        ),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
