"""Checks the layer in Detectron2's models over two ranks: empty ranks, PreciseBN, the loss."""

import pytest
import torch
import torch.distributed as dist
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.roi_heads import build_box_head, build_mask_head
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

import megdet_d2
from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm.batch_norm import cgbn_layers
from tests.helpers.collectives import counted_all_reduces
from tests.helpers.models import thin_config

ALL_CGBN = [
    "MODEL.RESNETS.NORM", "CGBN", "MODEL.FPN.NORM", "CGBN",
    "MODEL.ROI_BOX_HEAD.NORM", "CGBN", "MODEL.ROI_MASK_HEAD.NORM", "CGBN",
]  # fmt: skip


def in_float64(builder, *args):
    """Builds equal weights on every rank, in float64: deep models round differently in float32."""
    torch.manual_seed(0)
    return builder(*args).double().train()


# --- an empty rank -------------------------------------------------------------------------------


def make_heads():
    cfg, features = thin_config(*ALL_CGBN), ShapeSpec(channels=16, height=7, width=7)
    box, mask = (
        in_float64(build_box_head, cfg, features),
        in_float64(build_mask_head, cfg, features),
    )
    return nn.ModuleDict({"box": box, "mask": mask})


def run_heads(rank, regions):
    heads = megdet_d2.set_bn_size(make_heads(), 2, 1)
    x = regions[rank].requires_grad_()
    (heads["box"](x).square().sum() + heads["mask"].layers(x).square().sum()).backward()
    assert x.grad.shape == x.shape
    grads = {name: p.grad for name, p in heads.named_parameters()}
    if rank == 1:
        assert all(grad.eq(0).all() for grad in grads.values())
    return dict(heads.named_buffers()), grads


def test_heads_without_regions_on_one_rank(pool2):
    x = torch.randn(6, 16, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = megdet_d2.revert_cgbn(make_heads())
    (plain["box"](x).square().sum() + plain["mask"].layers(x).square().sum()).backward()
    (_, grads), _ = results = pool2.run(run_heads, [x, x[:0]], timeout=30)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-9)
    for buffers, _ in results:
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(buffers[name], buffer)


def image_with_boxes(rank, number):
    boxes = torch.tensor([[8.0, 8, 40, 48], [20, 4, 60, 30]])[:number]
    masks = torch.zeros(number, 64, 64, dtype=torch.bool)
    masks[:, 10:40, 10:40] = True
    instances = Instances(
        (64, 64),
        gt_boxes=Boxes(boxes),
        gt_classes=torch.zeros(number, dtype=torch.int64),
        gt_masks=BitMasks(masks),
    )
    generator = torch.Generator().manual_seed(rank)
    image = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 64, "width": 64}


def run_mask_rcnn(rank):
    """Runs a training step; rank 1's image has no object, so its mask head has no region."""
    cfg = thin_config(
        *ALL_CGBN, "MODEL.MASK_ON", True, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN",
        "MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = megdet_d2.set_bn_size(build_model(cfg).train(), 2, 1)
    regions = []
    head = model.roi_heads.mask_head
    head.register_forward_pre_hook(lambda module, args: regions.append(len(args[0])))
    with EventStorage():
        losses = model([image_with_boxes(rank, 2 - 2 * rank)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters())
    statistics = {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("running_var")
    }
    return regions, statistics


def test_mask_rcnn_with_an_image_without_objects_on_one_rank(pool2):
    (here, statistics), (there, others) = pool2.run(run_mask_rcnn, timeout=60)
    assert here[0] > 0 and there == [0]
    moved = 0
    for name, value in statistics.items():
        assert torch.equal(value, others[name]), name
        moved += not torch.equal(value, torch.ones_like(value))
    assert moved >= 42 + 8 + 2  # of the ResNet above FREEZE_AT, the FPN and the heads


# --- PreciseBN -----------------------------------------------------------------------------------


def make_small_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 2, 3, 12, 12, generator=generator, dtype=torch.float64)
    return x * torch.linspace(1, 3, 6).view(6, 1, 1, 1, 1, 1)  # batch, rank, image, ...


def run_precise_bn(rank):
    model = megdet_d2.convert_cgbn(in_float64(make_small_model))
    update_bn_stats(model, list(batches()[:, rank]), num_iters=6)
    assert [layer.momentum for layer in cgbn_layers(model)] == [0.1, 0.1]
    return dict(model.named_buffers())


def test_precise_bn_finds_the_layers_and_agrees_on_all_ranks(pool2):
    plain = in_float64(make_small_model)
    update_bn_stats(plain, list(batches().flatten(1, 2)), num_iters=6)
    first, second = pool2.run(run_precise_bn)
    for name, expected in plain.named_buffers():
        assert torch.equal(first[name], second[name]), name
        # PreciseBN takes the unbiased variance back to the biased one by this process's count,
        # half the group's: 2 images of 8×8 and more.
        rtol = 1 / (2 * 8 * 8) if "var" in name else 1e-9
        torch.testing.assert_close(first[name], expected, rtol=rtol, atol=1e-12)


# --- a backbone ----------------------------------------------------------------------------------


def make_backbone():
    cfg = thin_config(*ALL_CGBN[:4], "MODEL.BACKBONE.FREEZE_AT", 1)
    return in_float64(build_backbone, cfg)


def train(backbone, images, average, steps=3):
    """Returns the losses of SGD steps on images of one size, as means over the whole mini-batch."""
    optimizer = torch.optim.SGD(backbone.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = ImageList.from_tensors(list(images[step]), backbone.size_divisibility).tensor
        loss = sum(feature.square().mean() for feature in backbone(x).values())
        loss.backward()
        average([loss.detach(), *(p.grad for p in backbone.parameters() if p.requires_grad)])
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_backbone(rank, images):
    def average(tensors):
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= 2

    backbone = megdet_d2.set_bn_size(make_backbone(), 2, 1)
    losses = train(backbone, images[:, rank : rank + 1], average)
    with counted_all_reduces() as calls:
        backbone(images[0, :1])
    assert len(calls) == len(cgbn_layers(backbone)) == 52 + 8, "frozen layers do not communicate"
    return losses


def test_two_processes_of_one_image_are_one_of_two_images(pool2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 3, 64, 64, generator=generator, dtype=torch.float64)
    images[:, 1] = images[:, 1] * 3 + 1
    plain = megdet_d2.revert_cgbn(make_backbone())
    expected = train(plain, images, lambda tensors: None)
    assert expected[-1] != expected[0]
    for losses in pool2.run(run_backbone, images):
        torch.testing.assert_close(losses, expected, rtol=1e-8, atol=0)


def test_the_model_has_the_layer_where_the_config_says():
    # Otherwise the tests above would compare nothing.
    heads = make_heads()
    assert all(any(isinstance(m, CrossGPUBatchNorm) for m in h.modules()) for h in heads.values())


def test_detectron2s_synchronized_norm_is_converted():
    model = nn.Sequential(NaiveSyncBatchNorm(3), nn.SyncBatchNorm(3))
    megdet_d2.convert_cgbn(model)
    assert all(isinstance(layer, CrossGPUBatchNorm) for layer in model)


# --- export --------------------------------------------------------------------------------------

FIELDS = {
    "proposal_boxes": Boxes, "objectness_logits": torch.Tensor, "pred_boxes": Boxes,
    "scores": torch.Tensor, "pred_classes": torch.Tensor, "pred_masks": torch.Tensor,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
def test_scripted_and_traced_as_detectron2_does(fused):
    torch.manual_seed(0)
    model = build_model(thin_config(*ALL_CGBN)).eval()
    if fused:
        assert megdet_d2.fuse_activations(model)
    image = torch.rand(3, 64, 64) * 255
    (expected,) = model.inference([{"image": image}], do_postprocess=False)
    scripted = scripting_with_instances(model, FIELDS)
    (found,) = scripted.inference([{"image": image}], do_postprocess=False)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert cgbn_layers(model), "the model itself is as before"
    adapter = TracingAdapter(model, [{"image": image}])
    adapter.eval()
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    torch.testing.assert_close(traced(image)[0], adapter(image)[0])
