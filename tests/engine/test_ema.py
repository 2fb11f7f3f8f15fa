"""The moving average of the weights: arithmetic, evaluation, resumes and roll-backs."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

import megdet_d2
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.command import evaluate
from megdet_d2.engine.ema import WeightAverage, effective_decay
from tests.helpers.training import config, copy_checkpoint, differing, train

EMA = ("MEGDET.EMA_DECAY", 0.5)
# Three updates in place of six.
SHORT = ("MEGDET.EPOCHS", 1.0, "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", ())


def test_each_update_is_the_published_rule_for_weights_and_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), megdet_d2.CrossGPUBatchNorm(4)).double().train()
    average, expected = WeightAverage(model, 0.9), None
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(torch.randn(2, 3, 5, 5).double() + 1)
        average.update()
        now = copy.deepcopy(model.state_dict())
        expected = expected or now
        expected = {
            name: 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value
            for name, value in now.items()
        }
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    assert not average.model.training and average.updates == 4
    x = torch.randn(2, 3, 5, 5).double()
    model.load_state_dict(expected)
    torch.testing.assert_close(average.model(x), model.eval()(x))


@pytest.mark.parametrize("batch, power", [(16, 1), (256, 16), (8, 0.5)])
def test_k_times_the_images_take_the_kth_power(batch, power):
    cfg = megdet_d2.load_config(
        opts=["MEGDET.EMA_DECAY", "0.9998", "SOLVER.IMS_PER_BATCH", str(batch)]
    )
    assert effective_decay(cfg) == pytest.approx(0.9998**power, rel=1e-12)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_is_none_is_refused(coco, tmp_path, decay):
    with pytest.raises(ValueError, match="MEGDET.EMA_DECAY"):
        prepare_config(config(tmp_path, coco, "MEGDET.EMA_DECAY", decay))


def test_a_resumed_average_is_equal_to_the_bit_in_every_group(pool2, coco, tmp_path):
    groups = ("MODEL.CGBN.BN_SIZE", 4, *EMA, *SHORT)  # of one process each
    whole = pool2.run(train, str(tmp_path / "whole"), coco, groups, timeout=240)
    assert differing(whole[0]["ema"], whole[1]["ema"])  # running statistics
    assert differing(whole[0]["ema"], whole[0]["state"])
    copy_checkpoint(tmp_path / "whole", tmp_path / "rest", "model_0000001.pth")
    resumed = pool2.run(train, str(tmp_path / "rest"), coco, groups, True, timeout=240)
    for a, b in zip(whole, resumed, strict=True):
        assert b["start"] == 2 and differing(a["ema"], b["ema"]) == []
        assert differing(a["state"], b["state"]) == []
    # The files have the mean over the groups, for other programs.
    files = [torch.load(tmp_path / run / "model_final.pth") for run in ("whole", "rest")]
    means = [file["ema"]["model"] for file in files]
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
    own = [group["backbone.bottom_up.stem.conv1.norm.running_mean"]
           for group in files[0]["ema"]["groups"]]  # fmt: skip
    mean = means[0]["backbone.bottom_up.stem.conv1.norm.running_mean"]
    torch.testing.assert_close(mean, (own[0] + own[1]) / 2)


def test_a_roll_back_takes_the_average_back_too(coco, tmp_path):
    trainers = []

    def fault(trainer):
        trainers.append(trainer)

        def break_once(module, inputs):
            if trainer.iter == 1 and not trainer.progress.backoff.rollbacks:
                raise FloatingPointError("once")

        trainer.model.register_forward_pre_hook(break_once)

    keys = ("SOLVER.CHECKPOINT_PERIOD", 100, "MEGDET.ON_DIVERGENCE", "half_lr", *EMA, *SHORT)
    train(0, str(tmp_path), coco, keys, fault=fault)
    assert trainers[0].progress.backoff.rollbacks == 1
    assert trainers[0].ema.updates == trainers[0].max_iter


def test_the_average_is_evaluated_and_saved(coco, tmp_path):
    evaluated = (*SHORT, "DATASETS.TEST", ("mixed",), "SOLVER.CHECKPOINT_PERIOD", 100)
    evaluated += ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (40, 48))
    rows = train(0, str(tmp_path), coco, (*evaluated, *EMA))["rows"]
    names = ("bbox", "bbox_EMA", "bbox_TTA", "bbox_EMA_TTA")
    assert {f"{name}/AP" for name in names} <= rows[-1].keys()
    assert (tmp_path / "inference_EMA_TTA" / "coco_instances_results.json").is_file()
    cfg = config(tmp_path, coco, *evaluated, *EMA, "MODEL.WEIGHTS", f"{tmp_path}/model_final.pth")
    prepare_config(cfg, eval_only=True)
    results = evaluate(cfg)
    for name in names:
        assert results[name]["AP"] == pytest.approx(rows[-1][f"{name}/AP"], nan_ok=True), name
    # Stock Detectron2 loads the averaged model alone.
    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model).load(f"{tmp_path}/ema/model_final.pth")
    saved = torch.load(tmp_path / "model_final.pth")["ema"]["model"]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())


def test_an_average_that_a_finished_training_lacks_is_its_last_model(coco, tmp_path, caplog):
    train(0, str(tmp_path), coco, SHORT)
    evaluated = (*SHORT, *EMA, "DATASETS.TEST", ("mixed",))
    again = train(0, str(tmp_path), coco, evaluated, True)
    assert again["start"] == 3 and differing(again["ema"], again["state"]) == []
    assert "no average: it begins with the weights of iteration 2" in caplog.text
    last, average = (torch.load(tmp_path / f) for f in ("model_final.pth", "ema/model_final.pth"))
    assert all(torch.equal(average["model"][n], value) for n, value in last["model"].items())
    row = again["rows"][-1]
    assert row["bbox_EMA/AP"] == pytest.approx(row["bbox/AP"], nan_ok=True)


@pytest.mark.parametrize("name", ["weights.pth", ""])
def test_an_average_without_updates_is_the_model_that_was_loaded(coco, tmp_path, name, caplog):
    cfg = config(tmp_path, coco, *SHORT, *EMA)
    prepare_config(cfg)
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = name and f"{tmp_path}/{name}"
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    state = trainer.ema.model.state_dict()
    assert all(torch.equal(state[n], value) for n, value in trainer.model.state_dict().items())
    assert trainer.ema.updates == 0 and "has no average" not in caplog.text


class WithoutSuffix(Trainer):
    """Evaluates with augmentation as a project does that knows no average."""

    @classmethod
    def test_with_tta(cls, cfg, model):
        return {}


def test_an_average_needs_a_suffix_for_augmentation(tmp_path, coco):
    said = r"WithoutSuffix.test_with_tta takes no suffix.*\(cls, cfg, model, suffix=\"\"\)"
    keys = (*SHORT, *EMA, "TEST.AUG.ENABLED", True)
    with pytest.raises(ValueError, match=said):
        train(0, str(tmp_path), coco, keys, kind=WithoutSuffix)
