"""Tests Trainer: BN groups, checkpoints of other norms, two processes against one."""

import importlib

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import megdet_d2
from megdet_d2.engine import prepare_config
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.running_statistics import own_statistics
from tests.helpers import training
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("datasets_root")


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_other_checkpoints_load_into_cgbn(tmp_path, norm):
    other = tiny_config()
    for node in (other.MODEL.RESNETS, other.MODEL.FPN, other.MODEL.ROI_BOX_HEAD):
        node.NORM = norm
    theirs, ours = build_model(other).eval(), build_model(tiny_config()).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.rand(buffer.shape))
    DetectionCheckpointer(theirs, str(tmp_path)).save("other")
    DetectionCheckpointer(ours).load(str(tmp_path / "other.pth"))
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(ours.backbone(x).values(), theirs.backbone(x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def train_in_groups_of_one(rank, output):
    """Trains four iterations; returns this process's statistics at each checkpoint."""
    from megdet_d2.engine import Trainer
    from megdet_d2.engine.checkpoint import Checkpointer

    cfg = tiny_config(
        "MODEL.CGBN.BN_SIZE", 4, "OUTPUT_DIR", output, "SOLVER.CHECKPOINT_PERIOD", 2,
        "MEGDET.EPOCHS", 0.5, "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (),
        "MEGDET.WARMUP_EPOCHS", 0.0, "TEST.EVAL_PERIOD", 4, "MODEL.CGBN.ALGORITHM", "two_pass",
    )  # fmt: skip
    prepare_config(cfg)
    own, evaluated, stock = [], [], Checkpointer.gather

    def gather(self):
        stock(self)
        own.append(own_statistics(self.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "gather", gather)
        trainer = Trainer(cfg)
        layers = cgbn_layers(trainer.model)

        def note(layer, inputs):
            if not layer.training:
                evaluated.append(layer.running_mean.clone())

        layers[0].register_forward_pre_hook(note)
        trainer.resume_or_load(resume=False)
        trainer.train()
    assert all(layer.group_size() == 1 and layer.algorithm == "two_pass" for layer in layers)
    # neither the checkpoint nor the evaluation after it has touched them
    kept = own_statistics(trainer.checkpointer.model)
    assert all(kept[name].equal(own[-1][name]) for name in kept)
    # what was evaluated is what a checkpoint has, not a model of this process's own
    name = next(name for name in kept if kept[name].equal(layers[0].running_mean))
    return own, evaluated, name


def test_checkpoints_hold_the_mean_of_the_groups_statistics(pool2, tmp_path):
    results = pool2.run(train_in_groups_of_one, str(tmp_path), timeout=200)
    (first, evaluated, name), (second, _, _) = results
    assert len(first) == len(second) == 3  # iterations 2 and 4, and for whoever saves after it
    for mean in evaluated + results[1][1]:
        torch.testing.assert_close(mean, (first[1][name] + second[1][name]) / 2)
    assert evaluated and results[1][1]
    first, second = first[:2], second[:2]
    for name, own0, own1 in zip(
        ["model_0000001.pth", "model_final.pth"], first, second, strict=True
    ):
        state = torch.load(tmp_path / name)
        variances = {k: v for k, v in state["model"].items() if k.endswith("running_var")}
        assert variances
        for key, variance in variances.items():
            assert not own0[key].equal(own1[key])
            torch.testing.assert_close(variance, (own0[key] + own1[key]) / 2)
            for own, saved in zip((own0, own1), state["processes"]["statistics"], strict=True):
                assert own[key].equal(saved[key])


def build_over_machines(rank, output, coco):
    from megdet_d2.engine import Trainer

    overrides = ("MODEL.CGBN.BN_SIZE", 8)  # of 8 images, on four processes
    message = "BN_SIZE is 8.*Nearest valid sizes: 2 and 4.*CGBN.CROSS_MACHINE"
    with pytest.raises(ValueError, match=message):
        prepare_config(training.config(output, coco, *overrides))
    cfg = training.config(output, coco, *overrides, "MODEL.CGBN.CROSS_MACHINE", True)
    prepare_config(cfg)
    return {layer.group_size() for layer in cgbn_layers(Trainer(cfg).model)}


def test_cross_machine_lets_a_group_span_two_machines(two_machines, tmp_path):
    coco = training.write_images(tmp_path)
    assert two_machines.run(build_over_machines, str(tmp_path / "out"), coco) == [{4}] * 4


def test_a_config_without_the_plugins_keys_is_named():
    from megdet_d2.engine import Trainer

    with pytest.raises(ValueError, match=r"call megdet_d2.add_megdet_config\(cfg\) first"):
        Trainer(get_cfg())


def ten_losses(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        return _ten_losses(rank, world_size, patch)


def _ten_losses(rank, world_size, patch):
    nms = importlib.import_module("detectron2.layers.nms")  # the package has a function so named
    from detectron2.structures import Boxes, Instances
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(7)
    # Every anchor and every proposal is kept, so that no random choice depends on the process,
    # and every image gives the same number of regions: Detectron2 divides by a process's count.
    cfg = tiny_config(
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.RPN.POSITIVE_FRACTION", 1.0,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0,
        "MODEL.RPN.NMS_THRESH", 1.0,
    )  # fmt: skip
    model = build_model(cfg).double()
    # Detectron2 hands float32 boxes with the model's scores to an operator that wants one dtype.
    stock = nms.box_ops.batched_nms
    patch.setattr(nms.box_ops, "batched_nms", lambda b, s, i, t: stock(b, s.float(), i, t))
    generator = torch.Generator().manual_seed(1)
    batch = []
    for _ in range(4):
        corner = torch.randint(0, 30, (3, 2), generator=generator).double()
        size = torch.randint(12, 30, (3, 2), generator=generator).double()
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
        instances.gt_classes = torch.randint(0, 10, (3,), generator=generator)
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": 64, "width": 64})
    if world_size > 1:
        megdet_d2.set_bn_size(model, 4, 2)
        model = DistributedDataParallel(model, broadcast_buffers=False)
        batch = batch[2 * rank : 2 * rank + 2]
    # Small steps: at a rate that trains, rounding grows fifty-fold an iteration in this model.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    from detectron2.utils.events import EventStorage

    rows = []
    with EventStorage():
        for _ in range(10):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            rows.append({name: float(loss) for name, loss in losses.items()})
    return rows


def test_two_processes_of_two_images_are_one_of_four(pool2):
    whole = ten_losses(0, 1)
    halves = pool2.run(ten_losses, 2, timeout=120)
    assert whole[0] != whole[9]
    for step, losses in enumerate(whole):
        for name, loss in losses.items():
            mean = sum(half[step][name] for half in halves) / 2
            assert mean == pytest.approx(loss, rel=1e-5), f"{name} at step {step}"
