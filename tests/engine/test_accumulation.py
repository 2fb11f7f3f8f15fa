"""k micro-batches of b images are one mini-batch of k·b."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import megdet_d2
from megdet_d2.engine.accumulation import AMPAccumulationTrainer, accumulate
from tests.helpers.training import config, train, write_images


class Regression(nn.Module):
    """A loss that is the mean over the images, as most of a detector's are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
        self.forwards = 0

    def forward(self, batch):
        self.forwards += 1
        x = torch.stack(list(batch))
        return {"a": self.layers(x).square().mean(), "b": self.layers(x).abs().mean() / 3}


class Counting(torch.optim.SGD):
    """SGD that keeps the gradients of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
        return super().step(closure)


def images(count, seed=0):
    return list(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).double())


def run(batches, steps, updates, model=None):
    """Trains a regression; its gradients, parameters, losses and forwards."""
    from detectron2.engine import SimpleTrainer
    from detectron2.utils.events import EventStorage

    model = model or Regression()
    optimizer = Counting(model.parameters(), 0.1, momentum=0.9)
    trainer = accumulate(SimpleTrainer(model, batches, optimizer), steps)
    losses = []
    with EventStorage() as storage:
        for trainer.iter in range(updates):
            trainer.run_step()
            storage.step()
            if "total_loss" in storage.latest():
                losses.append([storage.latest()[k][0] for k in ("total_loss", "a", "b")])
    return optimizer.seen, [p.detach().clone() for p in model.parameters()], losses, model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cut", [(2, 2, 2), (1, 2, 3), (5, 1), (6,)])
def test_micro_batches_of_any_size_are_one_mini_batch(cut):
    data = [images(6, seed) for seed in range(3)]
    whole = run(data, 1, 3)
    parts = run([part for batch in data for part in torch.stack(batch).split(cut)], len(cut), 3)
    for a, b in zip(whole[0], parts[0], strict=True):
        close(a, b)
    close(whole[1], parts[1])
    close(torch.tensor(whole[2]), torch.tensor(parts[2]))  # metrics once an update, of the whole
    assert len(parts[2]) == 3


def ranks_task(rank):
    model = DistributedDataParallel(Regression())
    reductions = []

    def count(_, bucket):
        reductions.append(bucket.index())
        flat = bucket.buffer()
        return (
            torch.distributed.all_reduce(flat.div_(2), async_op=True)
            .get_future()
            .then(lambda done: done.value()[0])
        )

    model.register_comm_hook(None, count)
    data = [images(6, seed)[3 * rank : 3 * rank + 3] for seed in range(2)]
    parts = [[image] for batch in data for image in batch]
    gradients, parameters, losses, _ = run(parts, 3, 2, model)
    buckets = len(set(reductions))
    assert len(reductions) == 2 * buckets  # once an update, not once a micro-batch
    return gradients, parameters, losses


def test_processes_exchange_gradients_once_an_update(pool2):
    first, second = pool2.run(ranks_task)
    close(first[:2], second[:2])
    whole = run([images(6, seed) for seed in range(2)], 1, 2)
    for a, b in zip(whole[0], first[0], strict=True):
        close(a, b)
    close(whole[1], first[1])
    close(torch.tensor(whole[2]), torch.tensor(first[2]))


@pytest.mark.parametrize("zero_first", [False, True])
def test_one_micro_batch_is_detectron2s_step_to_the_bit(zero_first):
    from detectron2.engine import SimpleTrainer
    from detectron2.utils.events import EventStorage

    results = []
    for ours in (False, True):
        model = Regression()
        batches = [images(6, seed) for seed in range(4)]
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        trainer = SimpleTrainer(model, batches, optimizer, 2, zero_first)
        if ours:
            trainer = accumulate(trainer, 1)
        with EventStorage() as storage:
            for trainer.iter in range(4):
                trainer.run_step()
                storage.step()
        losses = {
            name: history.values()
            for name, history in storage.histories().items()
            if "time" not in name
        }
        assert [i for _, i in losses["total_loss"]] == [1, 3]  # gather_metric_period is 2
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_detectron2s_options_stay():
    from detectron2.engine import AMPTrainer, SimpleTrainer

    for kind in (SimpleTrainer, AMPTrainer):
        model = Regression()
        options = {"gather_metric_period": 5, "zero_grad_before_forward": True}
        stock = kind(model, [], torch.optim.SGD(model.parameters(), 0.1), **options)
        stock.async_write_metrics = True
        ours = accumulate(stock, 2)
        assert {name: getattr(ours, name) for name in options} == options
        assert ours.async_write_metrics


def test_metrics_are_written_by_a_thread_if_asked(monkeypatch):
    import threading

    from detectron2.engine import SimpleTrainer

    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stock = SimpleTrainer(model, [images(2)] * 2, optimizer, async_write_metrics=True)
    trainer, threads = accumulate(stock, 2), []
    trainer.iter = 0
    monkeypatch.setattr(
        trainer, "_write_metrics", lambda *_, **__: threads.append(threading.current_thread())
    )
    trainer.run_step()
    trainer.concurrent_executor.shutdown(wait=True)
    assert threads and threads[0] is not threading.main_thread()


def test_mixed_precision_scales_once_an_update():
    """On CPU, in bfloat16 with a scaler that works: one unscaling and one skip for k backwards."""
    from detectron2.engine import AMPTrainer
    from detectron2.utils.events import EventStorage

    model = Regression().float()
    before = copy.deepcopy(model.state_dict())
    stock = AMPTrainer(
        model, [[i] for i in torch.stack(images(4)).float()],
        torch.optim.SGD(model.parameters(), 0.1),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), precision=torch.bfloat16,
    )  # fmt: skip
    trainer = accumulate(stock, 2)
    assert type(trainer) is AMPAccumulationTrainer
    with EventStorage():
        trainer.run_step()
        reference = Regression().float()
        (sum(reference(torch.stack(images(4)[:2]).float().unbind()).values())).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.02)
        after = copy.deepcopy(model.state_dict())
        assert any(not torch.equal(before[k], after[k]) for k in before)

        model.layers[0].weight.register_hook(lambda g: g * float("inf"))
        trainer.run_step()
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())  # skipped
    assert trainer.grad_scaler.get_scale() == 512.0
    assert trainer.state_dict()["grad_scaler"]["scale"] == 512.0


# --- the detector --------------------------------------------------------------------------------


def detector_gradients(rank, coco, folder, steps, clip):
    """The gradients and losses of one update of four images, in ``steps`` micro-batches."""
    import importlib

    from megdet_d2.engine import Trainer, prepare_config

    nms = importlib.import_module("detectron2.layers.nms")
    with pytest.MonkeyPatch.context() as patch:
        stock = nms.box_ops.batched_nms
        patch.setattr(nms.box_ops, "batched_nms", lambda b, s, i, t: stock(b, s.float(), i, t))
        # Frozen norms; all images of one size; every anchor and every proposal kept, so that no
        # random choice depends on the micro-batch and each image gives the same number of regions.
        cfg = config(
            folder, coco, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
            "MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000,
            "MODEL.RPN.POSITIVE_FRACTION", 1.0, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10000,
            "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, "MODEL.RPN.NMS_THRESH", 1.0,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN", 10,
            "INPUT.CROP.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64,
            "SOLVER.IMS_PER_BATCH", 4, "MEGDET.ACCUMULATION_STEPS", steps,
            "DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.CLIP_GRADIENTS.ENABLED", clip,
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3,
        )  # fmt: skip
        prepare_config(cfg)
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.model.double()
        trainer.max_iter = 1
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        loss = trainer.storage.latest()["total_loss"][0]
        change = {n: p.detach() - before[n] for n, p in trainer.model.named_parameters()}
        gradients = {
            n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
        }
        return gradients, change, loss, trainer.images_seen


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
def test_a_detectors_gradients_are_those_of_the_whole_batch(tmp_path, clip):
    square = write_images(tmp_path, shape=(64, 64))
    whole = detector_gradients(0, square, str(tmp_path / "1"), 1, clip)
    parts = detector_gradients(0, square, str(tmp_path / "2"), 2, clip)
    assert whole[3] == parts[3] == 4
    assert parts[2] == pytest.approx(whole[2], rel=1e-9)
    largest = max(float(g.abs().max()) for g in whole[0].values())
    assert largest > 1e-4
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-9 * largest, msg=name)


def test_epochs_and_metrics_count_updates(coco, tmp_path):
    result = train(
        0, str(tmp_path), coco,
        ("SOLVER.IMS_PER_BATCH", 8, "MEGDET.ACCUMULATION_STEPS", 4, "MODEL.CGBN.BN_SIZE", 2),
    )  # fmt: skip
    assert sorted(result["lr"]) == list(range(6))  # 2 epochs of 24 images, 8 an update
    assert result["images_seen"] == 48 and len(result["images"]) == 24
    assert all(len(batch) == 2 for batch in result["images"])
    ids = [image for batch in result["images"][:12] for image, _ in batch]
    assert len(set(ids)) >= 22  # an epoch, but for the two that grouping holds back
    row = result["rows"][-1]
    assert (row["effective_batch_size"], row["bn_size"], row["images_seen"]) == (8, 2, 48)
    assert result["lr"][2] == pytest.approx(0.02 * 8 / 16)


def test_the_layers_know_how_many_forwards_make_an_update(coco, tmp_path):
    from megdet_d2.engine import Trainer, prepare_config
    from megdet_d2.norm.batch_norm import cgbn_layers

    cfg = config(tmp_path, coco, "MEGDET.ACCUMULATION_STEPS", 4)
    prepare_config(cfg)
    trainer = Trainer(cfg)
    assert {layer.accumulation_steps for layer in cgbn_layers(trainer.model)} == {4}
    assert trainer.layout.images_per_gpu == 2


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ("SOLVER.IMS_PER_BATCH", 6),
            "is 6, .* in 4 micro-batches each .*nearest that work: 4 and 8",
        ),
        (("MEGDET.ACCUMULATION_STEPS", 0), "ACCUMULATION_STEPS is 0; give a whole number from 1"),
        (("MODEL.CGBN.BN_SIZE", 8), "BN_SIZE is 8.*with 2 images each"),
    ],
)
def test_bad_values_are_errors_that_say_what_works(coco, tmp_path, overrides, message):
    from megdet_d2.engine import prepare_config

    cfg = config(tmp_path, coco, "MEGDET.ACCUMULATION_STEPS", 4, *overrides)
    with pytest.raises(ValueError, match=message):
        prepare_config(cfg)


def test_the_default_is_one():
    from detectron2.config import get_cfg

    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    assert cfg.MEGDET.ACCUMULATION_STEPS == 1
