"""The online hard example mining of Shrivastava et al. (OHEM; CVPR 2016, Figure 2 and §4.2).

The detector trains on the proposals with the largest losses. For the R proposals of an image, each
labelled by the matcher:

1. A forward without gradients computes the loss of each, ℓ_i = L_cls + [foreground] L_box.
2. NMS with ℓ_i as score removes a proposal that overlaps one of a larger loss, since the two would
   count the same mistake twice.
3. The B hardest of the rest go forward and backward.

There is no fixed fraction of foreground: the losses of a class that gets too few proposals grow.
"""

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms, cat
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn
from torch.nn import functional as F

SCOPES = ("image", "batch")


@ROI_HEADS_REGISTRY.register()
class OHEMROIHeads(StandardROIHeads):
    """``StandardROIHeads`` that trains on the hardest proposals in place of a random sample.

    Mask and keypoint heads train on the same proposals. Inference is that of ``StandardROIHeads``.

    Args:
        batch_size_per_image: B, the proposals to keep per image.
        ohem_scope: "image" keeps the B hardest of each image. "batch" keeps the B N hardest of all
            N images of the process, however they are distributed over the images.
        ohem_nms_thresh: IoU above which NMS removes the proposal with the smaller loss.
        ohem_nms_per_class: restricts NMS to proposals with the same label.

    Raises:
        ValueError: the scope is unknown, or the predictor has a loss that OHEM cannot rank by.
    """

    @configurable
    def __init__(
        self,
        *,
        batch_size_per_image: int,
        ohem_scope: str = "image",
        ohem_nms_thresh: float = 0.7,
        ohem_nms_per_class: bool = False,
        **kwargs: Any,
    ):
        # A random sample of unlimited size is every proposal that the matcher has labelled.
        super().__init__(batch_size_per_image=sys.maxsize, positive_fraction=1.0, **kwargs)
        if ohem_scope not in SCOPES:
            raise ValueError(f"MODEL.OHEM.SCOPE is {ohem_scope!r}; use one of {', '.join(SCOPES)}")
        _check_losses(self.box_predictor)
        self.ohem_batch_size_per_image = batch_size_per_image
        self.ohem_scope = ohem_scope
        self.ohem_nms_thresh = ohem_nms_thresh
        self.ohem_nms_per_class = ohem_nms_per_class
        self._features: list[Tensor] = []

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Returns the constructor's arguments."""
        keys = cfg.MODEL.OHEM
        ret = super().from_config(cfg, input_shape)
        del ret["positive_fraction"]  # the losses determine the number of foreground proposals
        return {
            **ret,
            "ohem_scope": keys.SCOPE,
            "ohem_nms_thresh": keys.NMS_THRESH,
            "ohem_nms_per_class": keys.NMS_PER_CLASS,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Runs ``StandardROIHeads.forward`` on the hardest proposals."""
        # For _losses_of: Detectron2 does not pass features to label_and_sample_proposals.
        self._features = [features[name] for name in self.box_in_features]
        try:
            return super().forward(images, features, proposals, targets)
        finally:
            self._features = []

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Returns the hardest proposals of each image, the hardest first; see ``ROIHeads``."""
        # Fields such as masks are added to the hardest only: a copy for every proposal is large.
        known = [boxes_of(image) for image in targets]
        with EventStorage():  # drops the counts of all proposals, which do not all train
            labelled = super().label_and_sample_proposals(proposals, known)
        losses = self._losses_of(labelled)
        kept = hardest(
            losses,
            labelled,
            self.ohem_batch_size_per_image,
            self.ohem_scope,
            self.ohem_nms_thresh,
            self.ohem_nms_per_class,
        )
        hard = [image[indices] for image, indices in zip(labelled, kept, strict=True)]
        for image, objects in zip(hard, targets, strict=True):
            add_fields(image, objects)
        foreground = [(image.gt_classes != self.num_classes).sum().item() for image in hard]
        background = [len(image) - number for image, number in zip(hard, foreground, strict=True)]
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", np.mean(foreground))
        storage.put_scalar("roi_head/num_bg_samples", np.mean(background))
        return hard

    def _losses_of(self, proposals: list[Instances]) -> Tensor:
        # Layers are in evaluation mode. A norm then uses its running statistics, does not update
        # them, and makes no collective, so processes with different numbers of proposals stay in
        # step. Also, the batch statistics of all proposals, nearly all of them easy background,
        # differ from those of the B that train.
        with evaluation(self.box_pooler, self.box_head, self.box_predictor):
            x = self.box_pooler(self._features, [image.proposal_boxes for image in proposals])
            losses = proposal_losses(self.box_predictor, self.box_head(x), proposals)
        # Under autocast older torch would use this forward's copies of the weights in the next
        # forward, and these copies have no gradient.
        torch.clear_autocast_cache()
        return losses


def proposal_losses(
    predictor: FastRCNNOutputLayers, x: Tensor, proposals: Sequence[Instances]
) -> Tensor:
    """Returns the loss of each proposal; the sum of ``predictor.losses`` is their mean.

    ℓ = w_cls (−log p_u) + w_box [u is foreground] Σ smooth_L1(t_u − v), Fast R-CNN's Equation 1.

    Args:
        predictor: class scores and box deltas, with smooth L1 as the box loss.
        x: (R, ...), features of the proposals of all images, the input of ``predictor``.
        proposals: with proposal_boxes, gt_classes and, in an image with objects, gt_boxes.

    Returns:
        (R,), float32.
    """
    scores, deltas = (prediction.float() for prediction in predictor(x))
    labels = cat([image.gt_classes for image in proposals])
    losses = predictor.loss_weight.get("loss_cls", 1.0) * F.cross_entropy(
        scores, labels, reduction="none"
    )
    foreground = (labels < predictor.num_classes).nonzero().squeeze(1)
    boxes = cat([image.proposal_boxes.tensor for image in proposals])[foreground]
    truth = cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    )[foreground]
    deltas = deltas.unflatten(1, (-1, 4))[foreground]
    shared = deltas.shape[1] == 1  # CLS_AGNOSTIC_BBOX_REG
    column = torch.zeros_like(foreground) if shared else labels[foreground]
    box_losses = smooth_l1_loss(
        deltas[torch.arange(len(deltas), device=deltas.device), column],
        predictor.box2box_transform.get_deltas(boxes, truth),
        beta=predictor.smooth_l1_beta,
    ).sum(dim=1)
    weight = predictor.loss_weight.get("loss_box_reg", 1.0)
    return losses.index_add(0, foreground, weight * box_losses)


def hardest(
    losses: Tensor,
    proposals: Sequence[Instances],
    number: int,
    scope: str,
    nms_thresh: float,
    nms_per_class: bool,
) -> list[Tensor]:
    """Selects the proposals to train on: steps 2 and 3 of the module's algorithm.

    Args:
        losses: (R,), losses of the proposals of all images.
        proposals: with proposal_boxes and gt_classes.
        number: B, proposals to keep per image; with the scope "batch" on average.
        scope, nms_thresh, nms_per_class: as in ``OHEMROIHeads``.

    Returns:
        for each image the int64 indices of its kept proposals, the hardest first.
    """
    sizes = torch.tensor([len(image) for image in proposals], device=losses.device)
    image_of = torch.repeat_interleave(sizes)
    labels = cat([image.gt_classes for image in proposals])
    # NMS compares boxes of one group only.
    group = torch.stack([image_of, labels]).unique(dim=1, return_inverse=True)[1]
    boxes = cat([image.proposal_boxes.tensor for image in proposals])
    kept = batched_nms(boxes, losses, group if nms_per_class else image_of, nms_thresh)
    if scope == "batch":
        kept = kept[: number * len(proposals)]
    first = sizes.cumsum(0) - sizes
    by_image = [kept[image_of[kept] == i] - first[i] for i in range(len(proposals))]
    return by_image if scope == "batch" else [indices[:number] for indices in by_image]


def boxes_of(objects: Instances) -> Instances:
    """Returns the objects with gt_boxes, gt_classes and, as gt_object, the index of each."""
    index = torch.arange(len(objects), device=objects.gt_classes.device)
    return Instances(
        objects.image_size,
        gt_boxes=objects.gt_boxes,
        gt_classes=objects.gt_classes,
        gt_object=index,
    )


def add_fields(proposals: Instances, objects: Instances) -> None:
    """Adds to each proposal the other fields of its matched object, in place."""
    if proposals.has("gt_object"):  # missing in an image without objects
        matched = proposals.gt_object
        proposals.remove("gt_object")
        for name, value in objects.get_fields().items():
            if name.startswith("gt_") and not proposals.has(name):
                proposals.set(name, value[matched])


@contextlib.contextmanager
def evaluation(*modules: nn.Module) -> Iterator[None]:
    """Puts all layers of ``modules`` in evaluation mode for a ``with`` block, and restores them.

    It also removes their forward pre-hooks for this time. TEST.PRECISE_BN adds one to every batch
    norm, and a second call in an iteration would be an error.
    """
    layers = [layer for module in modules for layer in module.modules()]
    before = [(layer, layer.training, layer._forward_pre_hooks) for layer in layers]
    for layer in layers:
        layer.training, layer._forward_pre_hooks = False, OrderedDict()
    try:
        yield
    finally:
        for layer, training, hooks in before:
            layer.training, layer._forward_pre_hooks = training, hooks


def _check_losses(predictor: nn.Module) -> None:
    kind = getattr(predictor, "box_reg_loss_type", None)
    if kind != "smooth_l1":
        raise ValueError(
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is {kind!r}, but OHEM cannot rank by it; "
            'use "smooth_l1", or a MODEL.ROI_HEADS.NAME without OHEM'
        )
    if predictor.use_sigmoid_ce:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True, but OHEM cannot rank by it; set it and "
            "USE_FED_LOSS False, or use a MODEL.ROI_HEADS.NAME without OHEM"
        )
