"""Online hard example mining (Shrivastava et al., CVPR 2016): train on the worst regions.

Figure 2 there, Algorithm in §4.2. Of all R proposals of an image, each labelled by the matcher:

1. a forward without gradients gives the loss of each, ℓ_i = L_cls + [foreground] L_box;
2. NMS with ℓ_i as score drops a proposal that overlaps one of a larger loss, since the two would
   count the same mistake twice;
3. the B hardest that are left go forward and backward.

There is no share of foreground to keep: where a class is neglected its losses grow.
"""

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms, cat
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage, get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn
from torch.nn import functional as F

SCOPES = ("image", "batch")


@ROI_HEADS_REGISTRY.register()
class OHEMROIHeads(StandardROIHeads):
    """``StandardROIHeads`` that keeps the hardest proposals in place of a random sample.

    Its mask and keypoint heads train on the same ones. Inference is stock.

    Args:
        batch_size_per_image: B, the proposals kept.
        ohem_scope: the B hardest of each "image", or of the process's "batch" of N images the
            B N hardest, however they are spread over the images.
        ohem_nms_thresh: the IoU above which the easier of two proposals is dropped.
        ohem_nms_per_class: let a proposal only drop those of its own label.

    Raises:
        ValueError: an unknown scope; a loss that the ranking does not know.
    """

    @configurable
    def __init__(
        self,
        *,
        batch_size_per_image: int,
        ohem_scope: str = "image",
        ohem_nms_thresh: float = 0.7,
        ohem_nms_per_class: bool = False,
        **kwargs,
    ):
        # A random sample of as many as there are is every proposal that the matcher has labelled.
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
    def from_config(cls, cfg, input_shape):
        keys = cfg.MODEL.OHEM
        ret = super().from_config(cfg, input_shape)
        del ret["positive_fraction"]  # losses decide how many are foreground
        return {
            **ret,
            "ohem_scope": keys.SCOPE,
            "ohem_nms_thresh": keys.NMS_THRESH,
            "ohem_nms_per_class": keys.NMS_PER_CLASS,
        }

    def forward(self, images, features, proposals, targets=None):
        """See ``ROIHeads.forward``."""
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
        """The hardest proposals, each image's hardest first; see ``ROIHeads``."""
        # Masks and the like wait until the hardest are known: a copy for every proposal is large.
        known = [boxes_of(image) for image in targets]
        with EventStorage():  # what stock logs of all proposals is not what is trained on
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
        # Layers in evaluation: a norm then uses its running statistics, does not update them, and
        # communicates with nobody, so processes stay in step however many proposals each has.
        # Besides, batch statistics of all proposals, nearly all of them easy background, would not
        # be those of the B that train.
        with evaluation(self.box_pooler, self.box_head, self.box_predictor):
            x = self.box_pooler(self._features, [image.proposal_boxes for image in proposals])
            losses = proposal_losses(self.box_predictor, self.box_head(x), proposals)
        # Under autocast older torch would use this forward's copies of the weights, which have no
        # gradient, in the next.
        torch.clear_autocast_cache()
        return losses


def proposal_losses(
    predictor: FastRCNNOutputLayers, x: Tensor, proposals: Sequence[Instances]
) -> Tensor:
    """The loss of each proposal, of which ``predictor.losses`` are the mean.

    ℓ = w_cls (−log p_u) + w_box [u is foreground] Σ smooth_L1(t_u − v), Fast R-CNN's Equation 1.

    Args:
        x: (R, ...) features of all images' proposals, as ``predictor`` takes them.
        proposals: with proposal_boxes, gt_classes and, in an image with objects, gt_boxes.

    Returns:
        (R,) float32.
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
    """Which proposals to train on, steps 2 and 3 above.

    Args:
        losses: (R,), of all images' proposals.
        proposals: with proposal_boxes and gt_classes.
        number: to keep in each image; with the scope "batch", on average.

    Returns:
        for each image the int64 indices of its own, the hardest first.
    """
    sizes = torch.tensor([len(image) for image in proposals], device=losses.device)
    image_of = torch.repeat_interleave(sizes)
    labels = cat([image.gt_classes for image in proposals])
    # NMS leaves boxes of different groups alone.
    group = torch.stack([image_of, labels]).unique(dim=1, return_inverse=True)[1]
    boxes = cat([image.proposal_boxes.tensor for image in proposals])
    kept = batched_nms(boxes, losses, group if nms_per_class else image_of, nms_thresh)
    if scope == "batch":
        kept = kept[: number * len(proposals)]
    first = sizes.cumsum(0) - sizes
    by_image = [kept[image_of[kept] == i] - first[i] for i in range(len(proposals))]
    return by_image if scope == "batch" else [indices[:number] for indices in by_image]


def boxes_of(objects: Instances) -> Instances:
    """Their gt_boxes and gt_classes, and as gt_object the index of each."""
    index = torch.arange(len(objects), device=objects.gt_classes.device)
    return Instances(
        objects.image_size,
        gt_boxes=objects.gt_boxes,
        gt_classes=objects.gt_classes,
        gt_object=index,
    )


def add_fields(proposals: Instances, objects: Instances) -> None:
    """What else is known of the object that each proposal was matched with, in place."""
    if proposals.has("gt_object"):  # not where there are no objects
        matched = proposals.gt_object
        proposals.remove("gt_object")
        for name, value in objects.get_fields().items():
            if name.startswith("gt_") and not proposals.has(name):
                proposals.set(name, value[matched])


@contextlib.contextmanager
def evaluation(*modules: nn.Module) -> Iterator[None]:
    """Within it all layers of ``modules`` are in evaluation; then each is as it was.

    Their forward pre-hooks are not called either: TEST.PRECISE_BN has one at every batch norm, for
    which a second call in an iteration is an error.
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
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is {kind!r}, by which OHEM cannot rank; "
            'use "smooth_l1", or MODEL.ROI_HEADS.NAME without OHEM'
        )
    if predictor.use_sigmoid_ce:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True, by which OHEM cannot rank; set it and "
            "USE_FED_LOSS False, or use a MODEL.ROI_HEADS.NAME without OHEM"
        )
