"""Context around a box (Li et al., "Attentive Contexts"; Gidaris and Komodakis, multi-region CNN).

A box head sees the features F pooled from a box b. Here it sees as well those of larger boxes with
the same centre, and of the whole image I, joined by a 1×1 convolution back to C channels:

    F'(b) = ReLU(norm(W [F(b); F(s_1 b); ...; F(s_k b); F(I)]))

Both papers enlarge to s = 1.8. It stands in front of the box head, so any box head works behind it.
"""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn


@ROI_HEADS_REGISTRY.register()
class ContextROIHeads(StandardROIHeads):
    """``StandardROIHeads`` with a ``ContextPooler`` in front of the box head.

    Mask and keypoint heads pool as ever.
    """

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
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

    def forward(self, images, features, proposals, targets=None):
        """See ``ROIHeads.forward``.

        Raises:
            TypeError: built without a config, and with a box pooler that has no context.
        """
        if not isinstance(self.box_pooler, ContextPooler):
            raise TypeError(
                f"ContextROIHeads has a {type(self.box_pooler).__name__} as box_pooler, so there "
                "is no context; give ContextPooler(pooler, channels)"
            )
        self.box_pooler.image_sizes = images.image_sizes
        return super().forward(images, features, proposals, targets)


class ContextPooler(nn.Module):
    """The equation above; takes and returns what the ``ROIPooler`` it wraps does.

    Each region is pooled from the level that the wrapped pooler finds for its size.

    Args:
        pooler: pools (M, C, h, w).
        channels: C.
        scales: s_1 to s_k, by which width and height of a box are multiplied; what is then outside
            of the image is cut off.
        whole_image: join the features of the whole image as well.
        norm: of the convolution, as ``get_norm`` takes it.

    Attributes:
        image_sizes: (height, width) of each image in pixels, without padding: set before every
            forward, since boxes do not know their image.

    Raises:
        ValueError: neither scales nor the whole image; a scale that is not above 0.
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
                "MODEL.CONTEXT.SCALES is empty and WHOLE_IMAGE False, so there is no context; give "
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
        """Features (N, C, H, W) by level and boxes by image to (M, C, h, w)."""
        return self.join(torch.cat(self.regions(x, box_lists), dim=1))

    def regions(self, x: list[Tensor], box_lists: list[Boxes]) -> list[Tensor]:
        """F(b), F(s_1 b) to F(s_k b) and F(I), each (M, C, h, w), of all boxes."""
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
    """Boxes of the same centres, width and height times ``scale``, cut off at the image's edge.

    Args:
        image_size: (height, width), pixels.
    """
    centre = boxes.get_centers()
    half = (boxes.tensor[:, 2:] - boxes.tensor[:, :2]) * (scale / 2)
    larger = Boxes(torch.cat([centre - half, centre + half], dim=1))
    larger.clip(image_size)
    return larger
