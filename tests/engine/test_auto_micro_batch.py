"""The micro-batch that the memory decides: the choice, and updates that run out of memory later."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from megdet_d2.engine.auto_micro_batch import largest_that_fits, possible_micro_batches
from megdet_d2.engine.memory_limit import MIB, LiveBytes, OutOfMemoryError
from tests.helpers.training import config, copy_checkpoint, differing, train

# Norms without batch statistics, and every image in the order of the stream.
PLAIN = (
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", "",
    "MEGDET.LR_FACTOR", 1e-6, "DATALOADER.ASPECT_RATIO_GROUPING", False,
)  # fmt: skip
SMALL = ("INPUT.MAX_SIZE_TRAIN", 64, "SOLVER.IMS_PER_BATCH", 8, "MEGDET.EPOCHS", 1.0,
         "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", ())  # fmt: skip
AUTO = ("MEGDET.AUTO_MICRO_BATCH", True, "MEGDET.MEMORY_LIMIT_MB", 4000)
SAME = ("state", "momentum", "loss", "lr", "rows")


def assert_same(a, b, keys=SAME):
    for key in keys:
        assert a[key] == b[key], key


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [1, 2, 4, 8, 16], [3, 6], list(range(1, 30))])
def test_the_search_finds_the_largest_in_few_tries(sizes):
    for limit in range(sizes[-1] + 2):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        expected = max((size for size in sizes if size <= limit), default=0)
        assert largest_that_fits(sizes, fits) == expected
        assert len(tried) == len(set(tried)) <= 2 * len(bin(len(sizes)))


def test_live_bytes_are_counted_and_freed():
    counter = LiveBytes(5 * MIB)
    weight = torch.ones(MIB // 4, requires_grad=True)
    counter.add([weight, weight.detach()])
    with counter:
        doubled = weight * 2
        view = doubled[1:]
        assert counter.live == 2 * MIB
        loss = (doubled * doubled).sum()
        del doubled, view
        loss.backward()
        assert counter.live <= 3 * MIB + 8 and counter.peak <= 5 * MIB
        with pytest.raises(OutOfMemoryError, match="LIMIT_MB is 5, and aten.cat"):
            torch.cat([weight] * 3)
    weight.grad = None
    del loss
    assert counter.live == MIB


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("MEGDET.AUTO_MICRO_BATCH", True, "MODEL.CGBN.BN_SIZE", 4), "set MEGDET.MEMORY_LIMIT_MB"),
        (("MEGDET.MEMORY_LIMIT_MB", 5), "only MEGDET.AUTO_MICRO_BATCH uses it.*LIMIT_MB 0"),
        (("MEGDET.AUTO_SUBLINEAR", True), "only MEGDET.AUTO_MICRO_BATCH uses it.*SUBLINEAR False"),
        (("MEGDET.MEMORY_LIMIT_MB", -5), "MEMORY_LIMIT_MB is -5; give MiB, or 0"),
        (AUTO, "MODEL.CGBN.BN_SIZE is -1.*give a number of images"),
        ((*AUTO, "MODEL.CGBN.BN_SIZE", 16), "no micro-batch can hold.*Valid sizes: 1, 2, 4, 8"),
        ((*AUTO, "MODEL.CGBN.BN_SIZE", 3), "no micro-batch can hold.*Valid sizes: 1, 2, 4, 8"),
    ],
)
def test_bad_values_are_errors_that_say_what_works(coco, tmp_path, overrides, message):
    from megdet_d2.engine import prepare_config

    with pytest.raises(ValueError, match=message):
        prepare_config(config(tmp_path, coco, *overrides))


def possible_task(rank, coco, folder, *overrides):
    return possible_micro_batches(config(folder, coco, *overrides))


def test_only_micro_batches_that_hold_the_bn_size_are_tried(pool2, coco, tmp_path):
    batch = ("SOLVER.IMS_PER_BATCH", 32)
    task = possible_task, coco, str(tmp_path)
    assert pool2.run(*task, *batch, "MODEL.CGBN.BN_SIZE", 8) == [[4, 8]] * 2
    assert pool2.run(*task, *batch, "MODEL.CGBN.BN_SIZE", 16) == [[8, 16]] * 2
    assert pool2.run(*task, *batch, *PLAIN) == [[1, 2, 4, 8, 16]] * 2


# --- the choice ----------------------------------------------------------------------------------


def test_a_limit_decides_and_the_training_is_that_of_the_typed_setting(coco, tmp_path, caplog):
    caplog.set_level(logging.INFO, "megdet_d2")
    limited = (*AUTO[:3], 7)
    chosen = train(0, str(tmp_path / "a"), coco, (*PLAIN, *SMALL, *limited))
    kept = json.loads((tmp_path / "a" / "micro_batch.json").read_text())
    assert (kept["images_per_gpu"], kept["sublinear"]) == (2, False)
    assert "2 images per GPU, MEGDET.ACCUMULATION_STEPS 4, SOLVER.IMS_PER_BATCH 8" in caplog.text
    assert [len(batch) for batch in chosen["images"]] == [2] * 12
    typed = train(0, str(tmp_path / "b"), coco, (*PLAIN, *SMALL, "MEGDET.ACCUMULATION_STEPS", 4))
    assert_same(chosen, typed)
    assert chosen["images"] == typed["images"]

    # A resume takes the choice from the file, and is exact.
    copy_checkpoint(tmp_path / "a", tmp_path / "c", "model_0000000.pth")
    shutil.copy(tmp_path / "a" / "micro_batch.json", tmp_path / "c")
    caplog.clear()
    resumed = train(0, str(tmp_path / "c"), coco, (*PLAIN, *SMALL, *limited), True)
    assert "as in micro_batch.json" in caplog.text and resumed["start"] == 1
    assert_same(resumed, chosen, ("state", "momentum"))

    # With another limit the file is of another machine.
    caplog.clear()
    roomy = (*PLAIN, *SMALL, *AUTO[:3], 9)
    cfg = config(tmp_path / "c", coco, *roomy)
    prepared_trainer(cfg)
    assert "of another config or other machines" in caplog.text


def prepared_trainer(cfg):
    from megdet_d2.engine import Trainer, prepare_config

    prepare_config(cfg)
    return Trainer(cfg)


RETINANET = (
    "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 1,
    "MODEL.RETINANET.IN_FEATURES", ("p3", "p4", "p5", "p6"), "MODEL.RETINANET.NORM", "CGBN",
    "MODEL.CGBN.BN_SIZE", 4,
)  # fmt: skip


def test_the_probe_leaves_random_numbers_and_weights_as_they_were(coco, tmp_path):
    typed = prepared_trainer(
        config(tmp_path, coco, *SMALL, *RETINANET, "MEGDET.ACCUMULATION_STEPS", 2)
    )
    torch.manual_seed(0)
    chosen = prepared_trainer(config(tmp_path, coco, *SMALL, *RETINANET, *AUTO))
    after = torch.rand(1)
    torch.manual_seed(0)
    again = prepared_trainer(
        config(tmp_path, coco, *SMALL, *RETINANET, "MEGDET.ACCUMULATION_STEPS", 2)
    )
    assert torch.rand(1) == after
    assert chosen.layout == typed.layout == again.layout  # BN size 4 on one process
    for name, value in again.model.state_dict().items():
        assert torch.equal(chosen.model.state_dict()[name], value), name
    assert not hasattr(chosen.model, "loss_normalizer")  # which a forward makes


@pytest.mark.slow
def test_sublinear_memory_only_if_nothing_fits_without(coco, tmp_path):
    overrides = (*SMALL, "MODEL.CGBN.BN_SIZE", 8, *AUTO[:3])
    with pytest.raises(
        ValueError, match="set MEGDET.AUTO_SUBLINEAR True.*BN_SIZE to 1 or 2 or 4; or"
    ):
        prepared_trainer(config(tmp_path / "a", coco, *overrides, 15))
    saving = ("MEGDET.AUTO_SUBLINEAR", True)
    assert not prepared_trainer(
        config(tmp_path / "b", coco, *overrides, 40, *saving)
    ).cfg.MODEL.SUBLINEAR.ENABLED
    trainer = prepared_trainer(config(tmp_path / "c", coco, *overrides, 15, *saving))
    assert trainer.cfg.MODEL.SUBLINEAR.ENABLED and trainer.layout.images_per_gpu == 8
    with pytest.raises(ValueError, match="raise MEGDET.MEMORY_LIMIT_MB"):
        prepared_trainer(config(tmp_path / "d", coco, *overrides, 2, *saving))


# --- out of memory later -------------------------------------------------------------------------


class OutOfMemoryAbove(HookBase):
    """Lets a module of some ranks raise, in forward or backward, above a number of images."""

    def __init__(self, images, at=0, ranks=(0,), backward=False):
        self.images, self.at, self.ranks, self.backward = images, at, ranks, backward

    def __call__(self, trainer):
        if comm.get_rank() not in self.ranks:
            return
        model = trainer.checkpointer.model

        def note(module, inputs):
            self.now = len(inputs[0])

        def strike(*_):
            if trainer.iter >= self.at and self.now > self.images:
                raise torch.OutOfMemoryError("the device is full")

        model.register_forward_pre_hook(note)
        if self.backward:
            model.backbone.bottom_up.res4[0].conv1.weight.register_hook(strike)
        else:
            model.roi_heads.register_forward_pre_hook(strike)


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_repeated_update_is_that_of_smaller_micro_batches(coco, tmp_path, caplog, backward):
    fault = OutOfMemoryAbove(2, backward=backward)
    halved = train(0, str(tmp_path / "a"), coco, (*PLAIN, *SMALL, *AUTO), fault=fault)
    assert caplog.text.count("The update is repeated") == 2
    assert "rank 0: the device is full" in caplog.text
    assert "with 2 images per GPU in 4 micro-batches: halving 2 of 2" in caplog.text
    typed = train(0, str(tmp_path / "b"), coco, (*PLAIN, *SMALL, "MEGDET.ACCUMULATION_STEPS", 4))
    assert_same(halved, typed)
    csv = [(tmp_path / name / "samples.csv").read_text() for name in "ab"]
    assert csv[0] == csv[1]  # no image was counted twice


def test_a_forward_that_ends_between_the_levels_of_a_head_begins_again(coco, tmp_path):
    """The levels' statistics once were those of the level before, from then on."""

    def fault(trainer):
        head, calls = trainer.model.head.cls_subnet[0], []

        def strike(*_):
            calls.append(trainer.iter)
            if trainer.iter == 0 and len(calls) == 2:
                raise torch.OutOfMemoryError("the device is full")

        head.register_forward_pre_hook(strike)
        levels.extend(layer for layer in trainer.model.modules() if hasattr(layer, "_pos"))

    levels = []
    keys = (*PLAIN, *SMALL, *RETINANET, "MODEL.RETINANET.NORM", "BN")
    keys += ("MEGDET.EPOCH_IMAGES", 8, "SOLVER.CHECKPOINT_PERIOD", 100)
    halved = train(0, str(tmp_path / "a"), coco, (*keys, *AUTO), fault=fault)
    assert levels and {layer._pos for layer in levels} == {0}
    typed = train(0, str(tmp_path / "b"), coco, (*keys, "MEGDET.ACCUMULATION_STEPS", 2))
    tracked = [name for name in typed["state"] if "subnet" in name and "running" in name]
    assert tracked and all(halved["state"][name] == typed["state"][name] for name in tracked)


def test_a_counted_limit_that_shrinks(coco, tmp_path, caplog):
    def shrink(trainer):
        trainer.register_hooks([Shrink(7)])

    result = train(0, str(tmp_path), coco, (*PLAIN, *SMALL, *AUTO), fault=shrink)
    assert result["images_seen"] == 24
    assert "MEGDET.MEMORY_LIMIT_MB is 7, and aten" in caplog.text
    assert "with 2 images per GPU in 4 micro-batches: halving 2 of 2" in caplog.text


class Shrink(HookBase):
    """Shrinks the limit after the first update, to MiB."""

    def __init__(self, limit):
        self.limit = limit

    def after_step(self):
        self.trainer._repeater.limit.counter.limit = self.limit * MIB


def test_at_most_two_halvings(coco, tmp_path, caplog):
    with pytest.raises(OutOfMemoryError, match="2 images per GPU.*halved 2 times.*--resume after"):
        train(0, str(tmp_path), coco, (*PLAIN, *SMALL, *AUTO), fault=OutOfMemoryAbove(0))
    assert caplog.text.count("The update is repeated") == 2
    assert not list(Path(tmp_path).glob("model_*.pth"))


def test_a_bn_size_that_cannot_be_held_is_refused(coco, tmp_path):
    overrides = (*SMALL, "MODEL.CGBN.BN_SIZE", 4, *AUTO)
    with pytest.raises(OutOfMemoryError, match="no smaller one holds MODEL.CGBN.BN_SIZE 4"):
        train(0, str(tmp_path), coco, overrides, fault=OutOfMemoryAbove(2))


def test_a_model_that_always_fails_is_refused_at_the_start(coco, tmp_path, monkeypatch):
    from detectron2.modeling import GeneralizedRCNN

    def forward(self, batch):
        raise torch.OutOfMemoryError("always")

    monkeypatch.setattr(GeneralizedRCNN, "forward", forward)
    with pytest.raises(ValueError, match=r"no micro-batch fits.* 1 images per GPU \(always\)"):
        prepared_trainer(config(tmp_path, coco, *PLAIN, *SMALL, *AUTO))


# --- several processes ---------------------------------------------------------------------------

TWO = (*SMALL, "SOLVER.IMS_PER_BATCH", 8, "MODEL.CGBN.BN_SIZE", 4)


@pytest.mark.slow
def test_ranks_agree_on_the_smallest_choice(pool2, coco, tmp_path):
    results = pool2.run(unequal_task, str(tmp_path), coco, timeout=120)
    assert results == [(2, 2), (2, 2)]


def unequal_task(rank, folder, coco):
    """Gives rank 1 half of the memory."""
    from megdet_d2.engine import memory_limit

    cfg = config(folder, coco, *TWO, *AUTO)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(memory_limit, "MIB", 2**20 * 9 / 4000)
        trainer = prepared_trainer(cfg)
    group = trainer.model.module.backbone.bottom_up.stem.conv1.norm.group_size()
    return trainer.layout.images_per_gpu, group


@pytest.mark.parametrize("retinanet", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_train_as_with_the_typed_setting(pool2, coco, tmp_path, retinanet):
    overrides = (*TWO, *(RETINANET if retinanet else ()))
    chosen = pool2.run(train, str(tmp_path / "a"), coco, (*overrides, *AUTO), timeout=200)
    typed = pool2.run(train, str(tmp_path / "b"), coco, overrides, timeout=200)
    for a, b in zip(chosen, typed, strict=True):
        assert_same(a, b)


MEASURED = (
    "MEGDET.OPTIMIZER", "agvm", "MEGDET.WARMUP_EPOCHS", 0.0, "MEGDET.AGVM.AFTER_WARMUP", 0,
    "MEGDET.AGVM.INTERVAL", 1,
)  # fmt: skip


@pytest.mark.parametrize("more", [(), pytest.param(MEASURED, marks=pytest.mark.slow)])
def test_one_rank_without_memory_halves_all_and_a_resume_is_exact(pool2, coco, tmp_path, more):
    fault = OutOfMemoryAbove(2, at=1, ranks=(1,), backward=True)
    overrides = (*TWO, *AUTO, *more)
    task = train, str(tmp_path / "a"), coco, overrides, False, fault
    whole = pool2.run(*task, timeout=200)
    assert whole[0]["state"] == whole[1]["state"] and whole[0]["images_seen"] == 24
    assert [len(batch) for batch in whole[0]["images"]][:2] == [4, 4]
    assert {len(batch) for batch in whole[0]["images"][3:]} == {2}  # on the rank with memory too
    for name in ("model_0000001.pth", "model_0000000.pth"):
        output = str(tmp_path / name)
        copy_checkpoint(tmp_path / "a", output, name)
        shutil.copy(tmp_path / "a" / "micro_batch.json", output)
        resumed = pool2.run(train, output, coco, overrides, True, fault, timeout=200)
        for a, b in zip(whole, resumed, strict=True):
            assert not differing(a["state"], b["state"]) and a["momentum"] == b["momentum"]
            assert a["groups"] == b["groups"]


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_group_stops_with_its_member_and_a_larger_one_takes_its_place(
    pool4, coco, tmp_path, backward
):
    overrides = (*SMALL, "SOLVER.IMS_PER_BATCH", 8, "MODEL.CGBN.BN_SIZE", 4, *AUTO)
    fault = OutOfMemoryAbove(1, at=1, ranks=(2,), backward=backward)
    results = pool4.run(train, str(tmp_path), coco, overrides, False, fault, timeout=300)
    assert all(result["state"] == results[0]["state"] for result in results)
    assert {len(batch) for batch in results[0]["images"][2:]} == {1}  # of the other group too
    assert results[0]["rows"][-1]["bn_size"] == 4


def test_all_ranks_raise_where_nothing_can_be_halved(pool2, coco, tmp_path):
    overrides = (*SMALL, "MODEL.CGBN.BN_SIZE", 8, *AUTO)
    said = pool2.run(raising_task, str(tmp_path), coco, overrides, OutOfMemoryAbove(1), timeout=120)
    assert said[0] == said[1] and "rank 0: the device is full" in said[0]
    assert "no smaller one holds MODEL.CGBN.BN_SIZE 8" in said[0]


def raising_task(rank, output, coco, overrides, fault):
    with pytest.raises(OutOfMemoryError) as error:
        train(rank, output, coco, overrides, fault=fault)
    return str(error.value)
