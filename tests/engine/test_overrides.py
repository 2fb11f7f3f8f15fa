"""Subclasses of Trainer that override a builder without a call of its parent."""

import os
import signal

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper
from detectron2.engine import HookBase, hooks
from detectron2.modeling import build_model
from detectron2.utils import comm

from megdet_d2.data.stream import find_stream
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.checkpoint import Checkpointer
from megdet_d2.engine.hooks import insert_before_savers
from megdet_d2.engine.signals import REQUEUE
from megdet_d2.norm.batch_norm import cgbn_layers
from tests.helpers.training import config

PAIR = ("MODEL.CGBN.BN_SIZE", 4)  # of 8 images on two processes: a group each


class Collective(HookBase):
    """A user's hook with a collective, after the one that saves."""

    def after_step(self):
        assert comm.all_gather("user") == ["user"] * comm.get_world_size()


class OwnHooks(Trainer):
    """As Detectron2's documentation suggests: only the hooks that are wanted, savers on rank 0."""

    def build_hooks(self):
        saver = hooks.PeriodicCheckpointer(self.checkpointer, 2)
        return [
            hooks.IterationTimer(), hooks.LRScheduler(),
            saver if comm.is_main_process() else None, Collective(),
        ]  # fmt: skip


def run(rank, kind, output, coco, overrides=(), resume=False, stop_at=None):
    cfg = config(output, coco, *overrides)
    prepare_config(cfg)
    os.makedirs(output, exist_ok=True)
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    if stop_at is not None:

        def stop(model, inputs):
            if trainer.iter == stop_at and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.model.register_forward_pre_hook(stop)
    status = 0
    try:
        trainer.train()
    except SystemExit as error:
        status = error.code
    return {
        "start": trainer.start_iter,
        "status": status,
        "images_seen": trainer.images_seen,
        "checkpointer": type(trainer.checkpointer).__name__,
        "mean": cgbn_layers(trainer.model)[0].running_mean.tolist(),
    }


def test_own_hooks_keep_what_protects_a_run(pool2, coco, tmp_path):
    whole = pool2.run(run, OwnHooks, str(tmp_path / "whole"), coco, PAIR, timeout=120)
    output = str(tmp_path / "stopped")
    stopped = pool2.run(run, OwnHooks, output, coco, PAIR, False, 2, timeout=120)
    assert [r["status"] for r in stopped] == [REQUEUE] * 2
    assert [r["checkpointer"] for r in whole] == ["Checkpointer"] * 2
    saved = torch.load(os.path.join(output, "model_0000002.pth"))
    assert len(saved["processes"]["statistics"]) == 2 and saved["progress"]["images_seen"] == 24

    resumed = pool2.run(run, OwnHooks, output, coco, PAIR, True, timeout=120)
    assert [r["start"] for r in resumed] == [3, 3]
    assert [r["mean"] for r in resumed] == [r["mean"] for r in whole]
    assert resumed[0]["mean"] != resumed[1]["mean"]
    assert not [name for name in os.listdir(output) if name.endswith(".tmp")]


class First(HookBase):
    pass


class RankZeros(HookBase):
    pass


class Ours(HookBase):
    pass


def order(rank):
    saver, writer = hooks.EvalHook(1, dict), hooks.PeriodicWriter([])
    lists = [
        ([First(), RankZeros(), Collective(), saver, Collective(), writer],
         [First(), Collective(), Collective()]),
        ([saver, First()], [First()]),
        ([First(), Collective()], [First(), Collective()]),
        ([], []),
    ]  # fmt: skip
    merged = [insert_before_savers(pair[rank], [Ours()]) for pair in lists]
    return [[type(hook).__name__ for hook in hooks] for hooks in merged]


def test_hooks_with_collectives_have_one_order_in_all_processes(pool2):
    first, second = pool2.run(order)
    assert first == [
        ["First", "RankZeros", "Collective", "Ours", "EvalHook", "Collective", "PeriodicWriter"],
        ["Ours", "EvalHook", "First"],
        ["First", "Collective", "Ours"],
        ["Ours"],
    ]  # fmt: skip
    assert second == [
        ["First", "Collective", "Ours", "Collective"], ["Ours", "First"],
        ["First", "Collective", "Ours"], ["Ours"],
    ]  # fmt: skip


class ForeignCheckpointer(DetectionCheckpointer):
    """As other projects have."""


class Replaced(Trainer):
    """As AdelaiDet does: in the list of hooks, and so on rank 0 alone."""

    def build_hooks(self):
        built = super().build_hooks()
        for i, hook in enumerate(built):
            if isinstance(hook, hooks.PeriodicCheckpointer):
                folder = self.cfg.OUTPUT_DIR
                self.checkpointer = ForeignCheckpointer(self.model, folder, trainer=self)
                built[i] = hooks.PeriodicCheckpointer(self.checkpointer, 2)
        return built


def test_a_replaced_checkpointer_is_named_and_resumes(pool2, coco, tmp_path):
    first = pool2.run(run, Replaced, str(tmp_path), coco, PAIR, timeout=120)
    assert [r["checkpointer"] for r in first] == ["ForeignCheckpointer", "WeightsOnlyCheckpointer"]
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    again = pool2.run(run, Replaced, str(tmp_path), coco, PAIR, True, timeout=120)
    assert [(r["start"], r["images_seen"]) for r in again] == [(4, 48)] * 2


def test_the_warning_names_the_checkpointer_and_the_fix(coco, tmp_path, caplog):
    run(0, Replaced, str(tmp_path), coco)
    said = [r.getMessage() for r in caplog.records if "ForeignCheckpointer" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("Replaced uses ForeignCheckpointer")
    assert "of rank 0's BN group alone" in said[0]
    assert "override Trainer.build_checkpointer" in said[0]
    with pytest.raises(ValueError, match="ON_DIVERGENCE is 'half_lr'.*ForeignCheckpointer.*roll"):
        run(0, Replaced, str(tmp_path), coco, ("MEGDET.ON_DIVERGENCE", "half_lr"))


def test_a_checkpoint_without_progress_in_another_checkpointer(coco, tmp_path, caplog):
    """Of an earlier version, say, whose progress this one would not find."""
    run(0, Replaced, str(tmp_path), coco)
    path = tmp_path / "model_0000003.pth"
    state = torch.load(path)
    del state["progress"]
    torch.save(state, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    again = run(0, Replaced, str(tmp_path), coco, (), True)
    assert (again["start"], again["images_seen"]) == (4, 48)
    assert "taking its 4 iterations for 32 images" in caplog.text


class Mine(Checkpointer):
    pass


class OwnCheckpointer(Trainer):
    @classmethod
    def build_checkpointer(cls, cfg, model, **checkpointables):
        return Mine(model, cfg.OUTPUT_DIR, **checkpointables)


def test_a_checkpointer_of_the_users_own(coco, tmp_path, caplog):
    result = run(0, OwnCheckpointer, str(tmp_path), coco)
    assert result["checkpointer"] == "Mine" and "as its checkpointer" not in caplog.text
    assert "progress" in torch.load(tmp_path / "model_final.pth")


# --- models --------------------------------------------------------------------------------------

KEYS = ("MODEL.CGBN.ALGORITHM", "two_pass", "MODEL.CGBN.IGNORE_PADDING", True,
        "MODEL.CGBN.FUSE_ACTIVATION", True, "MEGDET.ACCUMULATION_STEPS", 2)  # fmt: skip


def look(model):
    layer = getattr(model, "module", model).backbone.bottom_up.stem.conv1.norm
    return (
        layer.algorithm, layer.valid_region is not None, layer.accumulation_steps, layer.name,
        type(model.backbone.bottom_up.stem).__name__,
    )  # fmt: skip


class OwnModel(Trainer):
    @classmethod
    def build_model(cls, cfg):
        return build_model(cfg)


@pytest.mark.parametrize("kind", [Trainer, OwnModel])
def test_every_key_of_cgbn_takes_effect(coco, tmp_path, kind):
    cfg = config(tmp_path, coco, *KEYS)
    prepare_config(cfg)
    expected = ("two_pass", True, 2, "backbone.bottom_up.stem.conv1.norm", "FusedBasicStem")
    if kind is Trainer:
        assert look(kind.build_model(cfg)) == expected
    assert look(kind(cfg).model) == expected


def group_sizes(rank, output, coco):
    cfg = config(output, coco, *PAIR)
    prepare_config(cfg)
    return {layer.group_size() for layer in cgbn_layers(Trainer.build_model(cfg))}


def test_build_model_makes_the_groups(pool2, coco, tmp_path):
    assert pool2.run(group_sizes, str(tmp_path), coco) == [{1}, {1}]


@pytest.mark.parametrize(
    "overrides", [("MODEL.CGBN.BN_SIZE", 64), ("SOLVER.IMS_PER_BATCH", 7, *KEYS)]
)
def test_an_evaluation_on_other_gpus_needs_no_groups(coco, tmp_path, caplog, overrides):
    cfg = config(tmp_path, coco, *overrides, "MEGDET.POLICY", "")
    assert prepare_config(cfg, eval_only=True) == ""
    model = Trainer.build_model(cfg)
    assert cgbn_layers(model)[0].group_size() == 1
    key = overrides[0]
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Evaluation only")]
    assert len(said) == 1 and f"{key} is {overrides[1]}" in said[0]
    with pytest.raises(ValueError, match=f"{key} is {overrides[1]}"):
        Trainer(cfg)


def test_the_former_name_of_backoff(coco, tmp_path):
    cfg = config(tmp_path, coco)
    prepare_config(cfg)
    trainer = Trainer(cfg)
    with pytest.warns(DeprecationWarning, match="relief is now Trainer.progress.backoff"):
        assert trainer.relief is trainer.progress.backoff


class Darker(DatasetMapper):
    """A mapper of a user: half as bright, and marked."""

    def __call__(self, entry):
        mapped = super().__call__(entry)
        return mapped | {"image": mapped["image"] // 2, "darker": self.is_train}


class OwnMapper(Trainer):
    @classmethod
    def build_mapper(cls, cfg, is_train):
        return Darker(cfg, is_train)


def test_a_mapper_of_the_users_own_is_in_both_loaders(coco, tmp_path):
    cfg = config(tmp_path, coco, "DATASETS.TEST", ("mixed",))
    prepare_config(cfg)
    stock = next(iter(Trainer.build_train_loader(cfg)))
    own = next(iter(OwnMapper.build_train_loader(cfg)))
    given = next(iter(Trainer.build_train_loader(cfg, mapper=Darker(cfg, True))))
    for a, b, c in zip(stock, own, given, strict=True):
        assert a["image_id"] == b["image_id"] == c["image_id"] and b["darker"] and c["darker"]
        assert torch.equal(a["image"] // 2, b["image"]) and torch.equal(b["image"], c["image"])
    assert find_stream(OwnMapper.build_train_loader(cfg)) is not None
    assert next(iter(OwnMapper.build_test_loader(cfg, "mixed")))[0]["darker"] is False
    assert "darker" not in next(iter(Trainer.build_test_loader(cfg, "mixed")))[0]
