"""Segmentation supervision (Mao et al., CVPR 2017; Shrivastava and Gupta, ECCV 2016).

In training, the detector also predicts the class of each cell p of a feature map P. The features
learn from this loss. Inference does not run the additional layers f:

    L = L_rpn + L_rcnn + λ mean_p(−log softmax(f(P)_p)[y_p]),  p over the cells inside the images

The labels y come from the masks, or from the boxes for data without masks.
"""

from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("boxes", "masks")
IGNORED = -1


@ROI_HEADS_REGISTRY.register()
class SegmentationROIHeads(StandardROIHeads):
    """``StandardROIHeads`` with the additional loss ``loss_segmentation``.

    Args:
        segmentation_head: f, (N, C, h, w) to logits (N, K + 1, h, w). The last one is background.
        segmentation_in_feature: name of the feature map P.
        segmentation_stride: pixels between two cells of P.
        segmentation_targets: "boxes" or "masks".
        segmentation_loss_weight: λ.

    Raises:
        ValueError: the targets are unknown, or the feature map does not exist.
    """

    @configurable
    def __init__(
        self,
        *,
        segmentation_head: nn.Module,
        segmentation_in_feature: str,
        segmentation_stride: int,
        segmentation_targets: str = "boxes",
        segmentation_loss_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if segmentation_targets not in TARGETS:
            raise ValueError(
                f"MODEL.SEGMENTATION.TARGETS is {segmentation_targets!r}; use one of "
                f"{', '.join(TARGETS)}"
            )
        self.segmentation_head = segmentation_head
        self.segmentation_in_feature = segmentation_in_feature
        self.segmentation_stride = segmentation_stride
        self.segmentation_targets = segmentation_targets
        self.segmentation_loss_weight = segmentation_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Returns the constructor's arguments."""
        keys, name = cfg.MODEL.SEGMENTATION, cfg.MODEL.SEGMENTATION.IN_FEATURE
        if name not in input_shape:
            raise ValueError(
                f"MODEL.SEGMENTATION.IN_FEATURE is {name!r}; the backbone has "
                f"{', '.join(input_shape)}"
            )
        if keys.TARGETS == "masks" and not cfg.MODEL.MASK_ON:
            raise ValueError(
                'MODEL.SEGMENTATION.TARGETS is "masks", but MODEL.MASK_ON is False, so Detectron2 '
                'loads no masks; set MODEL.MASK_ON True, or TARGETS "boxes"'
            )
        return {
            **super().from_config(cfg, input_shape),
            "segmentation_head": SegmentationHead(
                input_shape[name].channels,
                cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                conv_dims=[keys.CONV_DIM] * keys.NUM_CONV,
                norm=keys.NORM,
            ),
            "segmentation_in_feature": name,
            "segmentation_stride": input_shape[name].stride,
            "segmentation_targets": keys.TARGETS,
            "segmentation_loss_weight": keys.LOSS_WEIGHT,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Runs ``StandardROIHeads.forward``, and in training adds ``loss_segmentation``."""
        results, losses = super().forward(images, features, proposals, targets)
        if self.training:
            assert targets is not None, "targets are required in training"
            logits = self.segmentation_head(features[self.segmentation_in_feature])
            labels = semantic_labels(
                targets,
                logits.shape[-2:],
                self.segmentation_stride,
                self.num_classes,
                masks=self.segmentation_targets == "masks",
            )
            loss = segmentation_loss(logits, labels)
            losses["loss_segmentation"] = self.segmentation_loss_weight * loss
        return results, losses


class SegmentationHead(nn.Sequential):
    """A head of 3×3 convolutions with norm and ReLU, then a 1×1: (N, C, h, w) to (N, K + 1, h, w).

    Args:
        in_channels, num_classes: C and K.
        conv_dims: channels of each 3×3 convolution.
        norm: the norm of the 3×3 convolutions, as in ``get_norm``.
    """

    def __init__(
        self, in_channels: int, num_classes: int, conv_dims: Sequence[int], norm: str = ""
    ):
        super().__init__()
        for i, channels in enumerate(conv_dims):
            conv = Conv2d(
                in_channels,
                channels,
                kernel_size=3,
                padding=1,
                bias=not norm,
                norm=get_norm(norm, channels),
                activation=nn.ReLU(),
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{i + 1}", conv)
            in_channels = channels
        self.predictor = Conv2d(in_channels, num_classes + 1, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)


def semantic_labels(
    targets: Sequence[Instances],
    grid: tuple[int, int],
    stride: int,
    num_classes: int,
    masks: bool = False,
) -> Tensor:
    """Returns the labels y: the class of the smallest object that covers a cell's centre.

    The area of the box decides which object is the smallest.

    Args:
        targets: with gt_boxes and gt_classes; for ``masks`` also gt_masks, in images with objects.
        grid: (h, w) of the feature map. The centre of cell (i, j) is at ((j + ½) stride, (i + ½)
            stride) pixels.
        stride: pixels between two cells.
        num_classes: K, the label of background.
        masks: an object covers its mask; otherwise it covers its whole box.

    Returns:
        (N, h, w), int64: a class, ``num_classes`` for background, ``IGNORED`` outside of the image.

    Raises:
        ValueError: ``masks`` is True, and there are objects without masks.
    """
    return torch.stack([_labels_of(image, grid, stride, num_classes, masks) for image in targets])


def _labels_of(
    target: Instances, grid: tuple[int, int], stride: int, num_classes: int, masks: bool
) -> Tensor:
    boxes, classes = target.gt_boxes.tensor, target.gt_classes
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) * stride for n in grid)
    height, width = target.image_size
    if masks and len(target):
        covers = _mask_at(target, y.long().clamp(max=height - 1), x.long().clamp(max=width - 1))
    else:
        left, top, right, bottom = boxes[..., None, None].unbind(1)
        covers = (left <= x) & (x < right) & (top <= y[:, None]) & (y[:, None] < bottom)
    # Background is an object that covers everything and is larger than any other.
    area = F.pad(target.gt_boxes.area(), (0, 1), value=torch.finfo(boxes.dtype).max)
    classes = F.pad(classes, (0, 1), value=num_classes)
    covers = torch.cat([covers, covers.new_ones(1, *grid)])
    smallest = torch.where(covers, area[:, None, None], torch.inf).argmin(dim=0)
    inside = (y < height)[:, None] & (x < width)
    return torch.where(inside, classes[smallest], IGNORED)


def _mask_at(target: Instances, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the masks of the objects at these pixels: bool, (M, h, w)."""
    if not target.has("gt_masks"):
        raise ValueError(
            'MODEL.SEGMENTATION.TARGETS is "masks", but an image has objects without masks; use '
            'annotations with "segmentation", or TARGETS "boxes"'
        )
    masks = target.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *target.image_size)
    rows, columns = rows.to(masks.device), columns.to(masks.device)
    return masks.tensor[:, rows[:, None], columns].to(target.gt_classes.device)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross entropy over the cells that are not ``IGNORED``; 0 without such cells.

    Args:
        logits: (N, K + 1, h, w), any floating dtype.
        labels: (N, h, w), int64.

    Returns:
        a float32 scalar. It depends on the logits even if all cells are ignored, as DDP needs it.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)
