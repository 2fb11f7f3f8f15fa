"""Losses and gradients that are not finite, on real processes."""

import functools
import re

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from megdet_d2.engine.accumulation import accumulate
from megdet_d2.engine.divergence import DivergenceError, DivergenceGuard
from megdet_d2.engine.exchange import StepExchange
from megdet_d2.engine.rollback import ScheduleBackoff
from tests.helpers.training import config, differing, train

# --- faults: each breaks a trainer on ``rank`` from ``iteration`` on ------------------------------


def spoil_loss(value, rank, iterations, trainer):
    """A loss of the box head becomes ``value``."""

    def spoil(module, inputs, output):
        if comm.get_rank() == rank and trainer.iter in iterations:
            output[1]["loss_cls"] = output[1]["loss_cls"] * value
        return output

    trainer.checkpointer.model.roi_heads.register_forward_hook(spoil)


def spoil_gradient(rank, iteration, trainer, value=float("inf")):
    weight = trainer.checkpointer.model.roi_heads.box_predictor.cls_score.weight

    def spoil(gradient):
        if comm.get_rank() == rank and trainer.iter == iteration:
            gradient = gradient.clone()
            gradient.view(-1)[5] = value
        return gradient

    weight.register_hook(spoil)


def blow_up(iteration, trainer):
    """Weights as a much too large step leaves them: finite, and the next forward is not."""

    iterations = [iteration]

    def scale(module, inputs):
        if trainer.iter in iterations:
            iterations.clear()
            with torch.no_grad():
                trainer.checkpointer.model.proposal_generator.rpn_head.conv.weight.mul_(1e30)

    trainer.checkpointer.model.register_forward_pre_hook(scale)


def caught(rank, *args, **kwargs):
    """The ``DivergenceError`` of ``train``, and the weights it leaves, by rank."""
    left = {}
    inner = kwargs.pop("fault")

    def fault(trainer):
        left["trainer"] = trainer
        inner(trainer)

    try:
        train(rank, *args, fault=fault, **kwargs)
    except DivergenceError as error:
        weights = left["trainer"].checkpointer.model.parameters()
        return str(error), left["trainer"].iter, all(bool(w.isfinite().all()) for w in weights)
    return "no error"


# --- stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(pool2, coco, tmp_path, value):
    fault = functools.partial(spoil_loss, value, 1, [2])
    run = functools.partial(caught, fault=fault)
    results = pool2.run(run, str(tmp_path), coco)
    assert results[0] == results[1]  # the same words everywhere, in the same step
    message, iteration, finite = results[0]
    assert iteration == 2 and finite
    assert f"diverged in iteration 2. rank 1: loss_cls is {value}" in message
    assert len(re.findall(r"\d+\.png", message)) == 4  # rank 1's images, and nobody else's
    assert "rank 0" not in message and "MEGDET.ON_DIVERGENCE" in message
    # what is on the disk is from before
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def weights_and_momentum(trainer):
    """Copies of all parameters and of the optimizer's state."""
    state = trainer.optimizer.state_dict()["state"]
    momentum = [s["momentum_buffer"].clone() for s in state.values()]
    return [p.detach().clone() for p in trainer.model.parameters()] + momentum


def changed_by_the_last_step(rank, output, coco, fault):
    """The number of tensors that the step with a fault has changed, and the error's first words."""
    seen = {}

    class Copy(HookBase):
        def before_step(self):
            seen["before"] = weights_and_momentum(seen["trainer"])

    def prepare(trainer):
        seen["trainer"] = trainer
        trainer.register_hooks([Copy()])
        fault(trainer)

    with pytest.raises(DivergenceError) as error:
        train(rank, output, coco, fault=prepare)
    after = weights_and_momentum(seen["trainer"])
    assert len(after) == len(seen["before"]) > 200
    differ = sum(not torch.equal(a, b) for a, b in zip(after, seen["before"], strict=True))
    return differ, str(error.value)[:36]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_on_one_rank_changes_no_weight_and_no_momentum_of_any(pool2, coco, tmp_path, where):
    """The optimizer waits for the exchange: nothing has to be undone."""
    nan = float("nan")
    fault = (
        functools.partial(spoil_loss, nan, 1, [2])
        if where == "loss"
        else functools.partial(spoil_gradient, 1, 2, value=nan)
    )
    results = pool2.run(changed_by_the_last_step, str(tmp_path), coco, fault)
    assert results == [(0, "Training has diverged in iteration 2")] * 2


def test_a_gradient_that_is_not_finite_stops_all(pool2, coco, tmp_path):
    run = functools.partial(caught, fault=functools.partial(spoil_gradient, 1, 1))
    results = pool2.run(run, str(tmp_path), coco)
    assert results[0] == results[1]
    message, iteration, finite = results[0]
    assert iteration == 1 and finite
    # averaged over the processes it is everyone's
    assert "the gradient of" in message and "cls_score.weight is not finite" in message
    assert "rank 0" in message and "rank 1" in message


class Overflowing(nn.Module):
    """Its loss is finite, and its gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.weight.register_hook(lambda gradient: gradient * float("inf"))

    def forward(self, batch):
        return {"loss": self.weight.sum()}


@pytest.mark.parametrize("scaled", [True, False])
def test_an_overflow_that_a_scaler_skips_is_no_divergence(scaled):
    model = Overflowing()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    stock = AMPTrainer(
        model, [[{}]] * 4, torch.optim.SGD(model.parameters(), 0.1), grad_scaler=scaler,
        precision=torch.bfloat16,
    )  # fmt: skip
    trainer = accumulate(stock, 2)
    guard = DivergenceGuard(model, StepExchange())
    trainer.register_hooks([guard])
    with EventStorage(), guard.observe():
        if scaled:
            trainer.run_step()
            assert scaler.get_scale() == 512
            scaler.update(2.0**-17)  # after 33 such steps
            with pytest.raises(DivergenceError, match="not finite at any scale"):
                trainer.run_step()
        else:
            with pytest.raises(DivergenceError, match="the gradient of weight is not finite"):
                trainer.run_step()
    assert model.weight.eq(1).all()


def test_a_gradient_whose_norm_alone_overflows_is_finite(coco, tmp_path):
    spoil = functools.partial(spoil_gradient, 0, 1, value=1e30)
    overrides = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value")
    result = train(0, str(tmp_path), coco, overrides, fault=spoil)
    assert result["images_seen"] == 48


def test_weights_blown_up_so_that_the_rpn_raises_in_forward(pool2, coco, tmp_path):
    run = functools.partial(caught, fault=functools.partial(blow_up, 1))
    results = pool2.run(run, str(tmp_path), coco)
    assert results[0][:2] == results[1][:2]
    assert "contain Inf/NaN" in results[0][0] or "is nan" in results[0][0]
    assert results[0][1] == 2


def test_a_checkpoint_of_spoilt_weights_is_left_for_the_one_before(coco, tmp_path, caplog):
    """A loss of 1e30 is finite: the step, and the checkpoint after it, are made."""
    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr")
    with caplog.at_level("WARNING", "megdet_d2"):
        result = train(0, str(tmp_path), coco, overrides, fault=functools.partial(blow_up, 1))
    moves = re.findall(r"roll-back \d of 2, (from iteration \d to \d)", caplog.text)
    assert moves == ["from iteration 2 to 2", "from iteration 2 to 1"]
    assert result["images_seen"] == 48


def test_one_process_and_micro_batches(coco, tmp_path):
    overrides = ("MEGDET.ACCUMULATION_STEPS", 2)
    fault = functools.partial(spoil_loss, float("nan"), 0, [1])
    message, iteration, finite = caught(0, str(tmp_path), coco, overrides, fault=fault)
    assert iteration == 1 and finite
    assert "rank 0: loss_cls is nan; images:" in message
    assert len(re.findall(r"\d+\.png", message)) == 8  # of both micro-batches


def test_in_the_last_step_nothing_is_evaluated(coco, tmp_path):
    """As Detectron2's trainer would, in what may be one process alone."""
    overrides = ("DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 100)
    fault = functools.partial(spoil_loss, float("nan"), 0, [5])
    message, iteration, _ = caught(0, str(tmp_path), coco, overrides, fault=fault)
    assert iteration == 5 and "iteration 5" in message
    assert not (tmp_path / "inference").exists()


# --- roll back -----------------------------------------------------------------------------------


def rolled_back(rank, output, coco, overrides, iterations, resume=False, spoiled=1):
    """A run whose loss ``spoiled`` spoils in the n-th iteration it makes, n in ``iterations``."""
    made = []

    def fault(trainer):
        model = trainer.checkpointer.model

        def spoil(module, inputs, output):
            made.append(trainer.iter)
            if rank == spoiled and len(made) - 1 in iterations:
                output[1]["loss_cls"] = output[1]["loss_cls"] * float("nan")
            return output

        model.roi_heads.register_forward_hook(spoil)

    return made, train(rank, output, coco, overrides, resume, fault=fault)


def half(rank, output, coco):
    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr", "SOLVER.CHECKPOINT_PERIOD", 2)
    return rolled_back(rank, output, coco, overrides, [3])


def test_half_lr_goes_on_from_the_last_good_checkpoint(pool2, coco, tmp_path):
    results = pool2.run(half, str(tmp_path), coco, timeout=120)
    for made, result in results:
        assert made == [0, 1, 2, 3, 2, 3, 4, 5]
        assert result["images"][2:4] == result["images"][4:6]  # to the pixel the same again
        assert result["images_seen"] == 48
    # 8 images: LR 0.01; warm-up of one epoch, 3 updates, from min(r, r^) = r^; decayed at 3
    lr = {0: 0.01, 1: 0.01, 2: 0.005, 3: 0.0005, 4: 0.0005, 5: 0.0005}
    assert results[0][1]["lr"] == pytest.approx(lr)
    iterations = [row["images_seen"] for row in results[0][1]["rows"] if "images_seen" in row]
    assert iterations == sorted(set(iterations))
    saved = torch.load(tmp_path / "model_final.pth")["progress"]["backoff"]
    assert saved == {"rollbacks": 1, "lr_factor": 0.5, "warmup_images": 0}


def test_relief_outlives_a_resume(coco, tmp_path):
    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr", "MEGDET.EPOCHS", 1.0,
                 "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (),
                 "MEGDET.WARMUP_EPOCHS", 0.0)  # fmt: skip
    fault = functools.partial(spoil_once, 1)
    train(0, str(tmp_path), coco, overrides, fault=fault)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    result = train(0, str(tmp_path), coco, overrides, True)
    assert result["start"] == 2
    assert result["lr"] == pytest.approx({0: 0.01, 1: 0.005, 2: 0.005})


def spoil_once(iteration, trainer):
    iterations = [iteration]

    def spoil(module, inputs, output):
        if trainer.iter in iterations:
            iterations.clear()
            output[1]["loss_cls"] = output[1]["loss_cls"] * float("nan")
        return output

    trainer.checkpointer.model.roi_heads.register_forward_hook(spoil)


def test_longer_warmup_before_any_checkpoint(coco, tmp_path, caplog):
    """Training goes back to where it began, the weights it began with included."""
    overrides = ("MEGDET.ON_DIVERGENCE", "longer_warmup", "SOLVER.CHECKPOINT_PERIOD", 100,
                 "MEGDET.EPOCHS", 3.0, "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (),
                 "MEGDET.WARMUP_EPOCHS", 0.5)  # fmt: skip
    with caplog.at_level("WARNING", "megdet_d2"):
        result = train(0, str(tmp_path), coco, overrides, fault=functools.partial(spoil_once, 2))
    # it was 1 update, 8 images; diverged at 2, after 16 images: now 32 images, 4 updates, from
    # a thousandth
    first = {0: 1e-5, 1: 0.25 * 0.01 + 0.75e-5, 2: 0.5 * 0.01 + 0.5e-5, 4: 0.01, 8: 0.01}
    assert {i: result["lr"][i] for i in first} == pytest.approx(first, rel=1e-3)
    assert result["images"][0] == result["images"][3] and result["images_seen"] == 72
    assert "roll-back 1 of 2, from iteration 2 to 0" in caplog.text
    assert "at least 32 images" in caplog.text

    # the weights it began with: training from model_start alone, with the relief, is the same
    start = torch.load(tmp_path / "model_start.pth")
    assert start["trainer"]["iteration"] == -1 and start["progress"]["images_seen"] == 0
    other = train(0, str(tmp_path / "other"), coco, (*overrides[:1], "stop", *overrides[2:]))
    assert result["loss"][0] == other["loss"][0]
    assert differing(result["state"], other["state"])


def test_a_longer_warmup_ends_before_the_first_decay(coco, tmp_path):
    """Diverged after 32 of 48 images: a warm-up of 64 would be longer than the training."""
    overrides = ("MEGDET.ON_DIVERGENCE", "longer_warmup", "SOLVER.CHECKPOINT_PERIOD", 100)
    result = train(0, str(tmp_path), coco, overrides, fault=functools.partial(spoil_once, 4))
    lr = {0: 1e-5, 2: 0.01, 3: 0.001, 5: 0.001}  # decayed at 3
    assert {i: result["lr"][i] for i in lr} == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_a_longer_warmup_without_a_decay_ends_at_half_of_the_training(coco, tmp_path, name):
    """It once was longer than the training, which then ended with hardly any learning rate."""
    overrides = ("MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "SOLVER.BASE_LR", 0.01,
                 "SOLVER.MAX_ITER", 6, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1,
                 "SOLVER.LR_SCHEDULER_NAME", name,
                 "MEGDET.ON_DIVERGENCE", "longer_warmup")  # fmt: skip
    result = train(0, str(tmp_path), coco, overrides, fault=functools.partial(spoil_once, 4))
    left = {"WarmupMultiStepLR": 0.01, "WarmupCosineLR": 0.0025}[name]  # (1 + cos 2π/3) / 2 of it
    assert result["lr"][4] == pytest.approx(left)


def test_half_lr_without_a_policy(coco, tmp_path):
    overrides = ("MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "SOLVER.BASE_LR", 0.01,
                 "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0,
                 "MEGDET.ON_DIVERGENCE", "half_lr")  # fmt: skip
    result = train(0, str(tmp_path), coco, overrides, fault=functools.partial(spoil_once, 2))
    assert result["lr"] == pytest.approx({0: 0.01, 1: 0.01, 2: 0.005, 3: 0.005})


def test_a_roll_back_stays_within_its_run(coco, tmp_path):
    """Twice before any checkpoint, in a folder with those of an older run."""
    train(0, str(tmp_path), coco)
    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr", "SOLVER.CHECKPOINT_PERIOD", 100)
    made, _ = rolled_back(0, str(tmp_path), coco, overrides, [1, 3], spoiled=0)
    assert made == [0, 1, 0, 1, 0, 1, 2, 3, 4, 5]


class Counter(HookBase):
    """One that a user adds."""

    steps = 0

    def after_step(self):
        self.steps += 1


def test_hooks_that_a_user_has_added_outlive_a_roll_back(coco, tmp_path, caplog):
    counter = Counter()

    def fault(trainer):
        trainer.register_hooks([counter, CallbackHook(after_step=lambda trainer: None)])
        spoil_once(3, trainer)

    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr", "SOLVER.CHECKPOINT_PERIOD", 2)
    train(0, str(tmp_path), coco, overrides, fault=fault)
    assert counter.steps == 3 + 4  # from the checkpoint of 2 again
    assert "A CallbackHook that was added to the trainer ends with the roll-back" in caplog.text


@pytest.mark.parametrize("most", [0, 1])
def test_so_many_roll_backs_and_no_more(coco, tmp_path, caplog, most):
    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr", "MEGDET.MAX_ROLLBACKS", most)
    fault = functools.partial(spoil_loss, float("nan"), 0, [1])
    assert (
        f"MAX_ROLLBACKS, {most}, are used up"
        in caught(0, tmp_path, coco, overrides, fault=fault)[0]
    )
    assert re.findall(r"roll-back \d of \d", caplog.text) == ["roll-back 1 of 1"] * most


def test_roll_backs_are_bounded(pool2, coco, tmp_path):
    overrides = ("MEGDET.ON_DIVERGENCE", "half_lr", "MEGDET.MAX_ROLLBACKS", 2)
    fault = functools.partial(spoil_loss, float("nan"), 0, [2])
    run = functools.partial(caught, fault=fault)
    results = pool2.run(run, str(tmp_path), coco, overrides, timeout=120)
    assert results[0] == results[1]
    assert "MEGDET.MAX_ROLLBACKS, 2, are used up" in results[0][0]


def feed_inf(trainer):
    """To one CGBN layer beside its work: what does not reach the loss is not a divergence."""

    def feed(module, inputs):
        if module.training and trainer.iter in (1, 3):
            module.stem.conv1.norm(torch.full((2, 64, 4, 4), float("inf")))

    trainer.checkpointer.model.backbone.bottom_up.register_forward_pre_hook(feed)


def test_statistics_that_cgbn_did_not_take_are_logged(coco, tmp_path, caplog):
    with caplog.at_level("WARNING", "megdet_d2"):
        result = train(0, str(tmp_path), coco, fault=feed_inf)
    said = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert len(said) == 1
    assert "until iteration 5" in said[0] and "backbone.bottom_up.stem.conv1.norm 2" in said[0]
    assert result["rows"][-1]["cgbn_skipped_batches"] == 2


def test_relief_by_itself():
    relief = ScheduleBackoff().next("half_lr", 80, 24).next("half_lr", 80, 24)
    assert relief == ScheduleBackoff(2, 0.25, 0)
    assert relief.next("longer_warmup", 80, 24) == ScheduleBackoff(3, 0.25, 160)
    assert relief.next("longer_warmup", 0, 24) == ScheduleBackoff(3, 0.25, 48)
    again = ScheduleBackoff().next("longer_warmup", 80, 16).next("longer_warmup", 80, 16)
    assert again == ScheduleBackoff(2, 1.0, 320)  # twice as long as the one that did not help


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("ON_DIVERGENCE", "explode", "use one of stop, half_lr, longer_warmup"),
        ("MAX_ROLLBACKS", -1, "give 0 or more"),
        ("TIMEOUT", 0, "give seconds, from 1"),
    ],
)
def test_a_bad_key_is_named(coco, tmp_path, key, value, said):
    from megdet_d2.engine import prepare_config

    with pytest.raises(ValueError, match=f"MEGDET.{key} is .*{said}"):
        prepare_config(config(tmp_path, coco, f"MEGDET.{key}", value))


class NotFinite(HookBase):
    """A validation loss that is NaN."""

    def after_step(self):
        batch = next(iter(self.trainer.data_loader))
        weights = self.trainer.model.roi_heads.box_predictor.loss_weight
        with torch.no_grad():
            weights["loss_cls"] = float("nan")
            assert self.trainer.model(batch)["loss_cls"].isnan()
            weights["loss_cls"] = 1.0


def test_a_validation_loss_that_is_not_finite_is_not_the_trainings(coco, tmp_path):
    def validate(trainer):
        trainer.register_hooks([NotFinite()])

    result = train(0, str(tmp_path), coco, ("TEST.EVAL_PERIOD", 0), fault=validate)
    assert result["images_seen"] == 48 and max(result["loss"]) == 5
