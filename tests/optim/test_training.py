"""Whole trainings with each optimizer: resumes, roll-backs, own trainers, and what is refused."""

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer

from megdet_d2.engine import Trainer
from tests.helpers.training import SHORT, copy_checkpoint, differing, train

pytestmark = pytest.mark.timeout(200)  # the first import of timm reads a thousand files

# Five updates of 4 images; AGVM measures in updates 0, 2 and 4.
FIVE = (*SHORT, "MEGDET.EPOCHS", 5.0, "MEGDET.WARMUP_EPOCHS", 0.0, "SOLVER.CHECKPOINT_PERIOD", 1)
AGVM = (
    "MEGDET.OPTIMIZER", "agvm", "MEGDET.AGVM.AFTER_WARMUP", 0, "MEGDET.AGVM.INTERVAL", 2,
    "MEGDET.AGVM.SMOOTHING", 0.5,
)  # fmt: skip
TWO = ("MEGDET.ACCUMULATION_STEPS", 2)
OPTIMIZERS = {
    "lars": ("MEGDET.OPTIMIZER", "lars", "MEGDET.REFERENCE_LR", 4.0),
    "lamb": ("MEGDET.OPTIMIZER", "lamb", "MEGDET.REFERENCE_LR", 0.002),
    "muon": ("MEGDET.OPTIMIZER", "muon", "MEGDET.REFERENCE_LR", 0.002),
    "agvm": (*AGVM, *TWO),
}
CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
PLAIN = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", "")
FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", "")
BFLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")


def check_resume(whole, resumed, start):
    for rank, (a, b) in enumerate(zip(whole, resumed, strict=True)):
        assert b["start"] == start and b["images"] == a["images"][-len(b["images"]) :]
        assert differing(a["state"], b["state"]) == [], f"rank {rank}"
        assert differing(a["momentum"], b["momentum"]) == [], f"rank {rank}"
        assert differing(a["ema"], b["ema"]) == [], f"rank {rank}"
        assert a["groups"] == b["groups"]
    assert resumed[0]["loss"] == whole[0]["loss"]
    assert resumed[0]["rows"] == whole[0]["rows"]


@pytest.mark.parametrize(
    "name, more",
    [
        ("lars", (*CLIP, *BFLOAT16)),
        ("lamb", (*PLAIN, "MEGDET.EMA_DECAY", 0.9)),
        ("muon", FROZEN),
        ("agvm", (*CLIP, "MEGDET.EMA_DECAY", 0.9)),
        ("agvm", (*PLAIN, *BFLOAT16, "SOLVER.SGD_IMPLEMENTATION", "fused")),
    ],
)
def test_a_resume_is_exact(coco, tmp_path, name, more):
    keys = (*FIVE, *OPTIMIZERS[name], *more)
    whole = train(0, str(tmp_path / "whole"), coco, keys)
    assert all(map(math.isfinite, whole["loss"].values())) and len(whole["loss"]) == 5
    copy_checkpoint(str(tmp_path / "whole"), str(tmp_path / "resumed"), "model_0000002.pth")
    check_resume([whole], [train(0, str(tmp_path / "resumed"), coco, keys, True)], 3)
    if name == "agvm":
        factors = {group["module"]: float(group["lr_factor"]) for group in whole["groups"]}
        assert factors["backbone"] == 1.0 and factors["fpn"] != 1.0


def test_a_resume_of_agvm_on_two_processes_is_exact(pool2, coco, tmp_path):
    keys = (*FIVE, *AGVM)
    whole = pool2.run(train, str(tmp_path / "whole"), coco, keys, timeout=120)
    copy_checkpoint(str(tmp_path / "whole"), str(tmp_path / "resumed"), "model_0000001.pth")
    resumed = pool2.run(train, str(tmp_path / "resumed"), coco, keys, True, timeout=120)
    check_resume(whole, resumed, 2)
    assert whole[0]["groups"] == whole[1]["groups"]
    assert differing(whole[0]["momentum"], whole[1]["momentum"]) == []
    last = whole[0]["rows"][-1]
    factors = {group["module"]: float(group["lr_factor"]) for group in whole[0]["groups"]}
    assert {k: v for k, v in last.items() if "agvm" in k} == {
        f"agvm/{module}": pytest.approx(factor) for module, factor in factors.items()
    }


def test_a_checkpoint_of_another_optimizer_is_refused(coco, tmp_path):
    train(0, str(tmp_path / "sgd"), coco, (*SHORT, "SOLVER.CHECKPOINT_PERIOD", 1))
    copy_checkpoint(str(tmp_path / "sgd"), str(tmp_path / "lamb"), "model_0000000.pth")
    words = "The checkpoint has the optimizer 'sgd', but MEGDET.OPTIMIZER is 'lamb'"
    with pytest.raises(ValueError, match=words):
        train(0, str(tmp_path / "lamb"), coco, (*SHORT, *OPTIMIZERS["lamb"]), True)


@pytest.mark.parametrize("action", ["half_lr", "longer_warmup"])
def test_a_roll_back_takes_the_factors_back(coco, tmp_path, action):
    """Diverges in update 3, with the factors of updates 0 and 2; the last checkpoint is of 1."""
    keys = (*FIVE, *OPTIMIZERS["agvm"], "MEGDET.EPOCHS", 12.0, "SOLVER.CHECKPOINT_PERIOD", 2,
            "MEGDET.ON_DIVERGENCE", action)  # fmt: skip
    seen, spoiled = [], []

    def fault(trainer):
        def note(module, inputs):
            seen.append((trainer.iter, trainer.optimizer.factors["fpn"]))

        def spoil(module, inputs, losses):
            if trainer.iter == 3 and not spoiled:
                spoiled.append(trainer.iter)
                losses["loss_cls"] = losses["loss_cls"] * math.nan
            return losses

        trainer.model.register_forward_pre_hook(note)
        trainer.model.register_forward_hook(spoil)
        spoiled.clear()
        fault.trainer = trainer

    train(0, str(tmp_path), coco, keys, fault=fault)
    iterations = [iteration for iteration, _ in seen]
    again = iterations.index(3) + (2 if iterations.count(3) > 3 else 1)  # a NaN after one forward
    first, second = seen[:again], seen[again:]
    assert dict(second)[2] == dict(first)[2] != dict(first)[3]
    if action == "half_lr":
        assert fault.trainer.progress.warmup_iters == 0
        assert dict(second)[3] != dict(second)[2]
    else:  # twice the 3 updates; the first measurement after it is in update 6
        assert fault.trainer.progress.warmup_iters == 6
        assert dict(second)[3] == dict(second)[6] == dict(second)[2] != dict(second)[7]


class OwnOptimizer(Trainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), cfg.SOLVER.BASE_LR, momentum=0.9)


class CallsOurs(Trainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return super().build_optimizer(cfg, model)


class OwnStep(Trainer):
    def run_step(self):
        batches = [next(self._trainer._data_loader_iter) for _ in range(2)]
        self.optimizer.zero_grad()
        for batch in batches:
            (sum(self.model(batch).values()) / 2).backward()
        self._trainer.after_backward()
        self.optimizer.step()


class Inner(SimpleTrainer):
    pass


class OwnInner(Trainer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self._trainer = Inner(self.model, self.data_loader, self.optimizer)


def test_an_own_optimizer_wins_and_that_is_said(coco, tmp_path, caplog):
    keys = (*SHORT, *OPTIMIZERS["lamb"])
    train(0, str(tmp_path / "own"), coco, keys, kind=OwnOptimizer)
    words = "MEGDET.OPTIMIZER 'lamb' is not used: OwnOptimizer.build_optimizer returns a SGD"
    assert words in caplog.text
    caplog.clear()
    train(0, str(tmp_path / "ours"), coco, keys, kind=CallsOurs)
    assert "is not used" not in caplog.text


@pytest.mark.parametrize("kind, who", [(OwnStep, "OwnStep.run_step"), (OwnInner, "Inner")])
def test_updates_that_agvm_cannot_measure_are_refused(coco, tmp_path, kind, who):
    keys = (*SHORT, *AGVM, *TWO, "MEGDET.WARMUP_EPOCHS", 0.0)
    with pytest.raises(ValueError, match=f"but {who} makes its updates itself"):
        train(0, str(tmp_path), coco, keys, kind=kind)


def test_one_micro_batch_is_refused_before_the_training(coco, tmp_path):
    with pytest.raises(ValueError, match="one process with MEGDET.ACCUMULATION_STEPS 1"):
        train(0, str(tmp_path), coco, (*SHORT, *AGVM))


# Four updates of one micro-batch, two of two, two of four.
GROWING = (
    *SHORT, *AGVM, "SOLVER.IMS_PER_BATCH", 8, "MEGDET.ACCUMULATION_STEPS", 4,
    "MEGDET.EPOCH_IMAGES", 8, "MEGDET.BATCH_WARMUP", ((0, 2), (1, 4), (2, 8)),
    "MEGDET.EPOCHS", 4.0, "MEGDET.WARMUP_EPOCHS", 0.0, "MEGDET.AGVM.INTERVAL", 1,
    "MEGDET.AGVM.AFTER_WARMUP", 4, "SOLVER.CHECKPOINT_PERIOD", 1,
)  # fmt: skip


def test_agvm_measures_while_the_mini_batch_grows(coco, tmp_path, caplog):
    with caplog.at_level("INFO", "megdet_d2"):
        whole = train(0, str(tmp_path / "whole"), coco, GROWING)
    # 4 measurements with α = 0.5
    assert "AGVM measures 4 times from iteration 4 on: at the end its factors have gone 94% of" in (
        caplog.text
    )
    factors = {group["module"]: float(group["lr_factor"]) for group in whole["groups"]}
    assert factors["backbone"] == 1.0 and factors["fpn"] != 1.0
    copy_checkpoint(str(tmp_path / "whole"), str(tmp_path / "resumed"), "model_0000004.pth")
    check_resume([whole], [train(0, str(tmp_path / "resumed"), coco, GROWING, True)], 5)


def test_a_phase_of_one_micro_batch_is_refused_if_it_is_measured(coco, tmp_path):
    words = "one process with one micro-batch in iteration 3 of MEGDET.BATCH_WARMUP computes only"
    with pytest.raises(ValueError, match=words):
        train(0, str(tmp_path), coco, (*GROWING, "MEGDET.AGVM.AFTER_WARMUP", 3))
    assert not list(tmp_path.rglob("*.pth"))


def test_agvm_without_a_measurement_is_said(coco, tmp_path, caplog):
    keys = (*FIVE, *OPTIMIZERS["agvm"], "MEGDET.AGVM.AFTER_WARMUP")
    train(0, str(tmp_path / "none"), coco, (*keys, 5))
    assert "so no gradient variance is measured, and this is a training with SGD" in caplog.text
    assert "set MEGDET.AGVM.AFTER_WARMUP below 5" in caplog.text
    caplog.clear()
    train(0, str(tmp_path / "one"), coco, (*keys, 4))
    assert "is measured" not in caplog.text
    caplog.clear()
    # Policies refuse such a warm-up.
    stock = ("MEGDET.POLICY", "", "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 2)
    train(0, str(tmp_path / "warm"), coco, (*keys, 0, *stock, "SOLVER.STEPS", ()))
    assert "this is a training with SGD; shorten the warm-up" in caplog.text
