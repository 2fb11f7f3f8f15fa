"""Context around a box (Li et al., "Attentive Contexts"; Gidaris and Komodakis, multi-region CNN).

A stock box head gets the features F pooled from a box b. Here it also gets the features of larger
boxes with the same centre, and of the whole image I. A 1×1 convolution joins them to C channels:

    F'(b) = ReLU(norm(W [F(b); F(s_1 b); ...; F(s_k b); F(I)]))

Both papers use s = 1.8. The module comes before the box head, so it works with any box head.
"""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn


@ROI_HEADS_REGISTRY.register()
class ContextROIHeads(StandardROIHeads):
    """``StandardROIHeads`` with a ``ContextPooler`` before the box head.

    The poolers of mask and keypoint heads are the stock ones.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_box_head(cfg, input_shape)
        keys = cfg.MODEL.CONTEXT
        ret["box_pooler"] = ContextPooler(
            ret["box_pooler"],
            input_shape[ret["box_in_features"][0]].channels,
            scales=keys.SCALES,
            whole_image=keys.WHOLE_IMAGE,
            norm=cfg.MODEL.ROI_BOX_HEAD.NORM,
        )
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Sets the image sizes of the pooler, then runs ``StandardROIHeads.forward``.

        Raises:
            TypeError: the box pooler is no ``ContextPooler``; possible only without a config.
        """
        if not isinstance(self.box_pooler, ContextPooler):
            raise TypeError(
                f"ContextROIHeads has a {type(self.box_pooler).__name__} as box_pooler, so there "
                "is no context; use ContextPooler(pooler, channels)"
            )
        self.box_pooler.image_sizes = images.image_sizes
        return super().forward(images, features, proposals, targets)


class ContextPooler(nn.Module):
    """A pooler that computes F'(b) of the module's equation from the ``ROIPooler`` that it wraps.

    It has the inputs and outputs of that pooler, which selects the level of each region by size.

    Args:
        pooler: pools boxes to (M, C, h, w).
        channels: C.
        scales: s_1 to s_k, factors of a box's width and height. The enlarged box is clipped to the
            image.
        whole_image: also joins the features of the whole image.
        norm: the norm of the convolution, as in ``get_norm``.

    Attributes:
        image_sizes: (height, width) of each image in pixels, without padding. Set it before every
            forward, since boxes do not store the size of their image.

    Raises:
        ValueError: there are neither scales nor the whole image, or a scale is not above 0.
    """

    def __init__(
        self,
        pooler: ROIPooler,
        channels: int,
        scales: Sequence[float] = (1.8,),
        whole_image: bool = True,
        norm: str = "",
    ):
        super().__init__()
        if not (scales or whole_image):
            raise ValueError(
                "MODEL.CONTEXT.SCALES is empty and WHOLE_IMAGE False, so there is no context; set "
                "scales such as (1.8,), or use a MODEL.ROI_HEADS.NAME without context"
            )
        if any(scale <= 0 for scale in scales):
            raise ValueError(f"MODEL.CONTEXT.SCALES is {scales}; give factors above 0")
        self.pooler = pooler
        self.scales = tuple(scales)
        self.whole_image = whole_image
        self.image_sizes: list[tuple[int, int]] = []
        self.join = Conv2d(
            channels * (1 + len(self.scales) + whole_image),
            channels,
            kernel_size=1,
            bias=not norm,
            norm=get_norm(norm, channels),
            activation=nn.ReLU(),
        )
        weight_init.c2_msra_fill(self.join)

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Returns F'(b) of all boxes, (M, C, h, w).

        Args:
            x: features (N, C, H, W), by level.
            box_lists: boxes, by image; M in all.
        """
        return self.join(torch.cat(self.regions(x, box_lists), dim=1))

    def regions(self, x: list[Tensor], box_lists: list[Boxes]) -> list[Tensor]:
        """Returns F(b), F(s_1 b) to F(s_k b) and F(I) of all boxes, each (M, C, h, w)."""
        pooled = [self.pooler(x, box_lists)]
        for scale in self.scales:
            larger = [
                enlarge(boxes, scale, size)
                for boxes, size in zip(box_lists, self.image_sizes, strict=True)
            ]
            pooled.append(self.pooler(x, larger))
        if self.whole_image:
            corners = [[0, 0, width, height] for height, width in self.image_sizes]
            images = [Boxes(x[0].new_tensor([box], dtype=torch.float32)) for box in corners]
            number = torch.tensor([len(boxes) for boxes in box_lists], device=x[0].device)
            pooled.append(self.pooler(x, images)[torch.repeat_interleave(number)])
        return pooled


def enlarge(boxes: Boxes, scale: float, image_size: tuple[int, int]) -> Boxes:
    """Returns boxes with the same centres, enlarged by ``scale`` and clipped to the image.

    Args:
        scale: factor of width and height.
        image_size: (height, width), pixels.
    """
    centre = boxes.get_centers()
    half = (boxes.tensor[:, 2:] - boxes.tensor[:, :2]) * (scale / 2)
    larger = Boxes(torch.cat([centre - half, centre + half], dim=1))
    larger.clip(image_size)
    return larger
