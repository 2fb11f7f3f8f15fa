"""Subclasses of Trainer that override a builder without a call of its parent."""

import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image

from megdet_d2.data.stream import find_stream
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.checkpoint import Checkpointer
from megdet_d2.engine.hooks import insert_before_savers
from megdet_d2.engine.signals import REQUEUE
from megdet_d2.norm.batch_norm import cgbn_layers
from tests.helpers.training import config, settle

RESULTS = "coco_instances_results.json"
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
        "ours": isinstance(trainer.checkpointer, Checkpointer),
        "results": getattr(trainer, "_last_eval_results", None),
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


class Adelai(Trainer):
    """As AdelaiDet does: a checkpointer without the trainer, and an own loop."""

    def build_hooks(self):
        built = super().build_hooks()
        for i, hook in enumerate(built):
            if isinstance(hook, hooks.PeriodicCheckpointer):
                self.checkpointer = ForeignCheckpointer(
                    self.model, self.cfg.OUTPUT_DIR, optimizer=self.optimizer,
                    scheduler=self.scheduler,
                )  # fmt: skip
                period = self.cfg.SOLVER.CHECKPOINT_PERIOD
                built[i] = hooks.PeriodicCheckpointer(self.checkpointer, period)
        return built

    def train(self):
        start_iter, max_iter = self.start_iter, self.max_iter
        self.iter = start_iter
        with EventStorage(start_iter) as self.storage:
            self.before_train()
            for self.iter in range(start_iter, max_iter):
                self.before_step()
                self.run_step()
                self.after_step()
            self.after_train()
        return self._last_eval_results


class Later(Trainer):
    """Sets its checkpointer after the constructor, in every process."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.checkpointer = ForeignCheckpointer(self.model, cfg.OUTPUT_DIR)
        self._hooks = []
        self._register_built_hooks()


@pytest.mark.parametrize("kind", [Replaced, Adelai, Later])
def test_a_replaced_checkpointer_saves_every_group_and_resumes(pool2, coco, tmp_path, kind):
    whole = pool2.run(run, kind, str(tmp_path / "whole"), coco, PAIR, timeout=120)
    output = tmp_path / "stopped"
    stopped = pool2.run(run, kind, str(output), coco, PAIR, False, 2, timeout=120)
    assert [r["status"] for r in stopped] == [REQUEUE] * 2
    assert whole[0]["checkpointer"] == "ForeignCheckpointer"
    assert {r["ours"] for r in whole} == {True}

    saved = torch.load(output / "model_0000002.pth")
    name = next(name for name in saved["model"] if name.endswith("running_mean"))
    groups = [group[name] for group in saved["processes"]["statistics"]]
    assert len(groups) == 2 and not torch.equal(*groups)
    torch.testing.assert_close(saved["model"][name], (groups[0] + groups[1]) / 2)

    resumed = pool2.run(run, kind, str(output), coco, PAIR, True, timeout=120)
    assert [(r["start"], r["images_seen"]) for r in resumed] == [(3, 48)] * 2
    assert [r["mean"] for r in resumed] == [r["mean"] for r in whole]


def test_a_replaced_checkpointer_rolls_back(coco, tmp_path):
    run(0, Replaced, str(tmp_path), coco, ("MEGDET.ON_DIVERGENCE", "half_lr"))
    assert (tmp_path / "model_start.pth").exists()


def test_what_is_no_checkpointer_is_refused(coco, tmp_path):
    class Odd(Trainer):
        def build_hooks(self):
            self.checkpointer = object()

    with pytest.raises(TypeError, match="Odd sets a object as its checkpointer.*use a subclass"):
        run(0, Odd, str(tmp_path), coco)


@pytest.mark.parametrize("removed", [("progress",), ("progress", "trainer")])
def test_a_checkpoint_without_progress(coco, tmp_path, caplog, removed):
    """Of stock Detectron2, or of a project's checkpointer that saved its parts under other keys."""
    run(0, Replaced, str(tmp_path), coco)
    path = tmp_path / "model_0000003.pth"
    state = torch.load(path)
    for key in removed:
        del state[key]
    torch.save(state, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    again = run(0, Replaced, str(tmp_path), coco, (), True)
    assert (again["start"], again["images_seen"]) == (4, 48)
    assert "taking its 4 iterations for 32 images" in caplog.text


def test_a_loop_without_a_last_step_of_the_counter_is_evaluated(coco, tmp_path):
    overrides = ("DATASETS.TEST", ("mixed",))
    result = run(0, Adelai, str(tmp_path), coco, overrides)
    assert result["results"]["bbox"]
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()


def test_a_loop_that_cannot_roll_back_is_refused(coco, tmp_path):
    with pytest.raises(ValueError, match="ON_DIVERGENCE is 'half_lr', but Adelai trains without"):
        run(0, Adelai, str(tmp_path), coco, ("MEGDET.ON_DIVERGENCE", "half_lr"))


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


# --- schedules -----------------------------------------------------------------------------------


class Poly(Trainer):
    """As DeepLab and MaskFormer do."""

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, cfg.SOLVER.MAX_ITER, 0.9)


class Parent(Trainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return super().build_lr_scheduler(cfg, optimizer)


def rates(kind, output, coco, overrides=()):
    cfg = config(output, coco, *overrides)
    prepare_config(cfg)
    trainer = kind(cfg)
    trainer.resume_or_load(False)
    used = []
    trainer._trainer.register_hooks([Watch(used)])
    trainer.train()
    return used


class Watch(HookBase):
    def __init__(self, used):
        self.used = used

    def after_backward(self):
        self.used.append(self.trainer.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [Poly, Parent])
def test_a_policy_decides_the_learning_rate(coco, tmp_path, caplog, kind):
    expected = rates(Trainer, tmp_path / "ours", coco)
    caplog.clear()
    assert rates(kind, tmp_path / "theirs", coco) == expected
    said = [r.getMessage() for r in caplog.records if "build_lr_scheduler" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("MEGDET.POLICY 'custom' decides the learning rate")
    assert f"{kind.__name__}.build_lr_scheduler is not called" in said[0]


def test_without_a_policy_a_scheduler_of_the_users_own_is_used(coco, tmp_path, caplog):
    plain = ("MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "MEGDET.DECAY_EPOCHS", (),
             "MEGDET.DECAY_FACTORS", (), "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ())  # fmt: skip
    base = 0.001
    found = rates(Poly, tmp_path, coco, (*plain, "SOLVER.BASE_LR", base))
    assert found == pytest.approx([base * (1 - i / 4) ** 0.9 for i in range(4)])
    assert "build_lr_scheduler" not in caplog.text


class Constant(Trainer):
    """Has forgotten the hook that steps the scheduler."""

    def build_hooks(self):
        return [hooks.IterationTimer()]


class Twice(Trainer):
    """Steps the scheduler in the step too, as loops of earlier versions of Detectron2 did."""

    def run_step(self):
        super().run_step()
        self.scheduler.step()


class Warmer(Trainer):
    def before_train(self):
        super().before_train()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5


class Swapped(Trainer):
    def before_train(self):
        super().before_train()
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)


class HardCoded(Trainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), lr=0.3)


@pytest.mark.parametrize(("kind", "words"), [
    (Constant, "has been stepped 0 times; have one hooks.LRScheduler"),
    (Twice, "has been stepped 1 times"), (Warmer, "had the learning rate 0.5, but"),
    (Swapped, "trainer.scheduler is a ConstantLR"),
    (HardCoded, "HardCoded.build_optimizer has the learning rates 0.3"),
])  # fmt: skip
def test_another_learning_rate_than_the_policys_is_refused(coco, tmp_path, kind, words):
    with pytest.raises(ValueError, match="MEGDET.POLICY") as error:
        rates(kind, tmp_path, coco)
    assert words in str(error.value) and kind.__name__ in str(error.value)


class Multiples(Trainer):
    """Backbone and heads with different learning rates, as in Mask2Former."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        backbone = list(model.backbone.parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("backbone")]
        lr = cfg.SOLVER.BASE_LR
        return torch.optim.SGD([{"params": backbone, "lr": 0.1 * lr}, {"params": rest}], lr=lr)


def test_multiples_of_the_policys_learning_rate_are_welcome(coco, tmp_path):
    whole = rates(Trainer, tmp_path / "ours", coco)
    assert rates(Multiples, tmp_path / "theirs", coco) == pytest.approx([lr / 10 for lr in whole])


class Chained(Trainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])


@pytest.mark.parametrize("kind", [Poly, Chained])
def test_a_learning_rate_that_a_roll_back_cannot_halve_is_refused(coco, tmp_path, kind):
    plain = ("MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "MEGDET.DECAY_EPOCHS", (),
             "MEGDET.DECAY_FACTORS", (), "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ())  # fmt: skip
    with pytest.raises(ValueError, match="ON_DIVERGENCE is 'half_lr', but the learning rates of"):
        rates(kind, tmp_path, coco, (*plain, "MEGDET.ON_DIVERGENCE", "half_lr"))


class Unguarded(Trainer):
    def run_step(self):
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()


def test_a_step_without_the_guard_is_named(coco, tmp_path, caplog):
    rates(Unguarded, tmp_path / "a", coco)
    said = [r.getMessage() for r in caplog.records if "after_backward" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("Unguarded.run_step does not call")
    with pytest.raises(ValueError, match="which is 'longer_warmup'"):
        rates(Unguarded, tmp_path / "b", coco, ("MEGDET.ON_DIVERGENCE", "longer_warmup"))


class OtherInner(Trainer):
    """As projects that need another optimizer step: a new inner trainer after the constructor."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self._trainer = SimpleTrainer(self.model, self.data_loader, self.optimizer)


def test_a_new_inner_trainer_gets_the_accumulation_and_the_guard(coco, tmp_path, caplog):
    cfg = config(tmp_path, coco, "MEGDET.ACCUMULATION_STEPS", 2)
    prepare_config(cfg)
    trainer = OtherInner(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.images_seen == 48 and trainer._trainer.steps == 2
    assert "after_backward" not in caplog.text


# --- evaluation and memory -----------------------------------------------------------------------


class OwnTest(Trainer):
    """As DensePose does: test without a call of its parent."""

    means: list = []

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.means.append(cgbn_layers(model)[0].running_mean.clone())
        return {}


def evaluate_groups(rank, output, coco):
    OwnTest.means.clear()
    run(rank, OwnTest, output, coco, (*PAIR, "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 2))
    return [mean.tolist() for mean in OwnTest.means]


def test_an_overridden_test_evaluates_the_mean_of_the_groups(pool2, coco, tmp_path):
    first, second = pool2.run(evaluate_groups, str(tmp_path), coco, timeout=120)
    assert len(first) == 3 and first == second


def test_sublinear_memory_of_an_overridden_model(coco, tmp_path):
    keys = ("MODEL.SUBLINEAR.ENABLED", True, "MODEL.SUBLINEAR.STAGES", ("res3", "fpn"))
    cfg = config(tmp_path, coco, *keys)
    prepare_config(cfg)
    ours, theirs = Trainer(cfg).model, OwnModel(cfg).model
    for model in (ours, theirs):
        assert {name for name, m in model.named_modules() if "forward" in vars(m)} == {
            "backbone.bottom_up.res3", *(f"backbone.fpn_{k}{i}" for i in (3, 4, 5)
                                         for k in ("lateral", "output")),
        }  # fmt: skip


# --- evaluation ----------------------------------------------------------------------------------


class PlainEvaluator(Trainer):
    """Has ``DefaultTrainer``'s own arguments."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "mine"))


class PlainTest(Trainer):
    @classmethod
    def test(cls, cfg, model):
        return super().test(cfg, model)


class OwnFile(Trainer):
    """Writes a file into the folder of the config, and returns nothing."""

    @classmethod
    def test(cls, cfg, model):
        Path(cfg.OUTPUT_DIR, "seen.txt").write_text("1")


def evaluated(coco, output, *keys):
    cfg = config(
        output, coco, "DATASETS.TEST", ("mixed",), "MEGDET.EMA_DECAY", 0.5,
        "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (40, 48), *keys,
    )  # fmt: skip
    prepare_config(cfg)
    cfg.freeze()
    return cfg, settle(Trainer.build_model(cfg))


@pytest.mark.parametrize(
    ("kind", "folder"), [(Trainer, ""), (PlainEvaluator, "mine"), (PlainTest, "inference")]
)
def test_evaluations_aside_take_methods_with_detectron2s_arguments(coco, tmp_path, kind, folder):
    cfg, model = evaluated(coco, tmp_path)
    kind.check_evaluators(cfg)
    expected = Trainer.test(cfg, model)["bbox"]
    in_test = (tmp_path / "inference" / RESULTS).read_text()
    assert kind.test_ema(cfg, model) == {"bbox_EMA": pytest.approx(expected, nan_ok=True)}
    assert kind.test_with_tta(cfg, model).keys() == {"bbox_TTA"}
    assert kind.test_with_tta(cfg, model, "_EMA").keys() == {"bbox_EMA_TTA"}
    # Each has its own files: none of them replaces those of the plain evaluation.
    assert (tmp_path / "inference" / RESULTS).read_text() == in_test
    for suffix in ("_EMA", "_TTA", "_EMA_TTA"):
        assert (tmp_path / f"inference{suffix}" / folder / RESULTS).is_file()


def test_an_own_test_writes_into_a_folder_of_each_evaluation(coco, tmp_path):
    cfg, model = evaluated(coco, tmp_path)
    assert OwnFile.test_ema(cfg, model) == OwnFile.test_with_tta(cfg, model) == {}
    found = {path.parent.name for path in tmp_path.rglob("seen.txt")}
    assert found == {"inference_EMA", "inference_TTA"}


@pytest.mark.parametrize("sets", [("odd",), ("mixed", "odd")])
def test_a_set_without_an_evaluator_is_left_out_by_every_evaluation(coco, tmp_path, sets):
    records = [{"file_name": f"{coco[0][2]}/0.png", "image_id": 0, "height": 48, "width": 64}]
    with Image.open(records[0]["file_name"]) as image:
        records[0]["width"], records[0]["height"] = image.size
    DatasetCatalog.register("odd", lambda: [{**record, "annotations": []} for record in records])
    MetadataCatalog.get("odd").set(thing_classes=["a"], evaluator_type="odd_kind")
    try:
        cfg, model = evaluated(coco, tmp_path, "DATASETS.TEST", sets)
        plain = Trainer.test(cfg, model)
        assert Trainer.test_ema(cfg, model).keys() == {f"{name}_EMA" for name in plain}
        assert Trainer.test_with_tta(cfg, model).keys() == {f"{name}_TTA" for name in plain}
    finally:
        DatasetCatalog.pop("odd")
        MetadataCatalog.pop("odd")
