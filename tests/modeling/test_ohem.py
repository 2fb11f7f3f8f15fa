"""Compares OHEM with Detectron2's losses, brute force, and stock heads on the same proposals."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats

from megdet_d2.modeling.ohem import hardest, proposal_losses
from tests.helpers.bitwise import images
from tests.helpers.models import build, tiny_config, with_norm

CLASSES = 3


def random_boxes(number, size=64):
    corner = torch.rand(number, 2) * size / 2
    return Boxes(torch.cat([corner, corner + 4 + torch.rand(number, 2) * size / 3], dim=1))


def labelled(number, objects=True):
    image = Instances((64, 64), proposal_boxes=random_boxes(number))
    image.gt_classes = torch.randint(CLASSES + 1, (number,))
    if objects:
        image.gt_boxes = random_boxes(number)
    else:
        image.gt_classes[:] = CLASSES
    return image


@pytest.mark.parametrize("agnostic", [False, True])
def test_the_mean_of_the_losses_is_detectron2s(agnostic):
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=5), num_classes=CLASSES, cls_agnostic_bbox_reg=agnostic,
        box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        smooth_l1_beta=0.5, loss_weight={"loss_box_reg": 2.0},
    )  # fmt: skip
    proposals = [labelled(7), labelled(4, objects=False), labelled(0), labelled(9)]
    x = torch.randn(20, 5)
    with EventStorage():
        expected = sum(predictor.losses(predictor(x), proposals).values())
    losses = proposal_losses(predictor, x, proposals)
    assert losses.shape == (20,)
    torch.testing.assert_close(losses.mean(), expected)


def brute_force(losses, proposals, number, scope, thresh, per_class):
    """Selects greedily, one proposal after the other; returns pairs (image, index in it)."""
    where = [(i, j) for i, image in enumerate(proposals) for j in range(len(image))]
    chosen = []
    for k in sorted(range(len(where)), key=lambda k: -losses[k].item()):
        i, j = where[k]
        image = proposals[i]

        def drops(other, i=i, j=j, image=image):
            if other[0] != i:
                return False
            same = image.gt_classes[other[1]] == image.gt_classes[j]
            iou = pairwise_iou(image.proposal_boxes[other[1]], image.proposal_boxes[j])
            return iou.item() > thresh and (same or not per_class)

        if not any(drops(other) for other in chosen):
            chosen.append((i, j))
    if scope == "batch":
        chosen = chosen[: number * len(proposals)]
    by_image = [[j for i, j in chosen if i == image] for image in range(len(proposals))]
    return by_image if scope == "batch" else [indices[:number] for indices in by_image]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_hardest_equal_brute_force(scope, per_class):
    proposals = [labelled(30), labelled(0), labelled(5), labelled(40)]
    losses = torch.rand(75)
    losses[:30] += 0.5  # so that the batch's hardest are spread unevenly
    arguments = losses, proposals, 8, scope, 0.3, per_class
    got = [indices.tolist() for indices in hardest(*arguments)]
    assert got == brute_force(*arguments)
    everything = [len(image) for image in proposals]
    assert [len(indices) for indices in got] != everything
    unlimited = hardest(losses, proposals, 75, scope, 1.0, per_class)
    assert [len(indices) for indices in unlimited] == everything


def heads(name, *overrides):
    cfg = tiny_config(
        "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES, "MODEL.ROI_HEADS.NAME", name, *overrides
    )
    cfg.MODEL.ROI_BOX_HEAD.NORM = "CGBN"
    shapes = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in (3, 4, 5)}
    return build_roi_heads(cfg, shapes).train()


def inputs(sizes):
    features = {
        f"p{i}": torch.randn(len(sizes), 16, 64 >> i, 64 >> i, requires_grad=True)
        for i in (3, 4, 5)
    }
    proposals, targets = [], []
    for number in sizes:
        image = Instances((64, 64), proposal_boxes=random_boxes(number))
        image.objectness_logits = torch.zeros(number)
        proposals.append(image)
        objects = Instances((64, 64), gt_boxes=random_boxes(2), gt_classes=torch.tensor([0, 2]))
        targets.append(objects if number else objects[:0])
    images = ImageList(torch.zeros(len(sizes), 3, 64, 64), [(64, 64)] * len(sizes))
    return images, features, proposals, targets


@pytest.mark.parametrize(
    ("scope", "thresh", "per_class"),
    [("image", 0.7, False), ("batch", 0.7, False), ("image", 0.2, False), ("image", 0.2, True)],
)
def test_only_the_hardest_go_forward_and_backward(scope, thresh, per_class):
    nms = ["MODEL.OHEM.NMS_THRESH", thresh, "MODEL.OHEM.NMS_PER_CLASS", per_class]
    ours = heads("OHEMROIHeads", "MODEL.OHEM.SCOPE", scope, *nms)
    stock = heads("StandardROIHeads")
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    images, features, proposals, targets = inputs([40, 0, 30])
    with EventStorage() as storage:
        hard, losses = ours(images, features, proposals, targets)
        logged = [storage.history(f"roi_head/num_{kind}_samples").values() for kind in ("fg", "bg")]
        with EventStorage():
            expected = stock._forward_box(features, hard)
    sizes = [len(image) for image in hard]
    assert sizes[1] == 0 and sum(sizes) <= 32 + 16 * (scope == "batch")
    assert sum(sizes) == 32 + 16 * (scope == "batch") or thresh < 0.7
    labels = torch.cat([image.gt_classes for image in hard])
    counts = [(labels < CLASSES).sum().item(), (labels == CLASSES).sum().item()]
    # Logged once, as a mean over images, and not of all proposals.
    assert [[3 * value for value, _ in values] for values in logged] == [
        [pytest.approx(count)] for count in counts
    ]

    # The same losses and gradients, and running statistics of these proposals alone.
    assert losses == expected
    got = torch.autograd.grad(sum(losses.values()), [*features.values(), *ours.parameters()])
    want = torch.autograd.grad(sum(expected.values()), [*features.values(), *stock.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), stock.buffers(), strict=True))
    assert ours.box_head.conv1.norm.num_batches_tracked == 1

    # And these proposals are those of the largest losses.
    with torch.no_grad(), EventStorage():
        for module in (stock, ours):
            module.load_state_dict(ours.state_dict())
        stock.batch_size_per_image, stock.positive_fraction = 1000, 1.0
        everything = stock.label_and_sample_proposals(proposals, targets)
        stock.box_head.eval()
        maps = list(features.values())
        x = stock.box_head(stock.box_pooler(maps, [i.proposal_boxes for i in everything]))
        values = proposal_losses(stock.box_predictor, x, everything)
        again, _ = ours(images, features, proposals, targets)
    chosen = brute_force(values, everything, 16, scope, thresh, per_class)
    for image, whole, indices in zip(again, everything, chosen, strict=True):
        assert torch.equal(image.proposal_boxes.tensor, whole.proposal_boxes.tensor[indices])


class Counted(BitMasks):
    """The masks of an image, which count their copies."""

    copied = 0

    def __getitem__(self, item):
        masks = super().__getitem__(item)
        Counted.copied += len(masks)
        return masks


def test_masks_are_of_the_matched_objects_and_copied_for_the_hardest_alone():
    ours = heads("OHEMROIHeads")
    _, features, proposals, targets = inputs([40, 0])
    masks = torch.rand(2, 64, 64) > 0.5
    targets[0].gt_masks, targets[1].gt_masks = Counted(masks), Counted(masks[:0])
    ours._features = [features[name] for name in ours.box_in_features]
    with EventStorage():
        first, second = ours.label_and_sample_proposals(proposals, targets)
    object_of = [
        targets[0].gt_boxes.tensor.tolist().index(b) for b in first.gt_boxes.tensor.tolist()
    ]
    assert len(set(object_of)) == 2
    assert torch.equal(first.gt_masks.tensor, masks[object_of])
    assert Counted.copied == len(first) == 16
    assert not first.has("gt_object") and not second.has("gt_masks") and not len(second)


def test_precise_statistics_know_every_norm_once():
    """Trains with TEST.PRECISE_BN, which refuses two calls of a norm in an iteration."""
    model = build(tiny_config("MODEL.ROI_HEADS.NAME", "ChallengeROIHeads", *with_norm("CGBN")))
    norm = model.roi_heads.box_head.conv1.norm
    seen = []
    norm.register_forward_hook(lambda _, args, __: seen.append(args[0]) if norm.training else None)
    with EventStorage():
        update_bn_stats(model, [images(0), images(1)], 2)
    pooled = torch.cat(seen).transpose(0, 1).flatten(1)
    assert len(seen) == 2
    torch.testing.assert_close(norm.running_mean, pooled.mean(1))


def test_autocast_leaves_the_layers_their_gradients():
    ours = heads("OHEMROIHeads")
    images, features, proposals, targets = inputs([20, 20])
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        _, losses = ours(images, features, proposals, targets)
    sum(losses.values()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert ours.box_head.conv1.weight.grad.abs().sum() > 0


def test_frozen_layers_stay_frozen():
    ours = heads("OHEMROIHeads")
    ours.box_head.conv1.norm.eval()
    images, features, proposals, targets = inputs([20])
    with EventStorage():
        ours(images, features, proposals, targets)
    assert ours.box_head.training and not ours.box_head.conv1.norm.training


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.OHEM.SCOPE", "world"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
    ],
)
def test_errors_name_the_key(key, value):
    with pytest.raises(ValueError, match=f"{key} is .*{value}.*; .*use"):
        heads("OHEMROIHeads", key, value)
