"""Tests a training whose mini-batch grows: updates, counters, and resumes bit by bit."""

import json
import logging

import pytest

from megdet_d2.config import load_config
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.gradient_noise.branch import Start
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.planner.dry_run import dry_run
from megdet_d2.planner.plan import check
from megdet_d2.report.run import Run, read_metrics
from tests.helpers import training
from tests.helpers.paths import TINY

# 16 images: 4 updates of 2, then 2 of 4, then 2 of 8; 32 images altogether.
KEYS = (
    "SOLVER.IMS_PER_BATCH", 8, "MEGDET.ACCUMULATION_STEPS", 4, "MEGDET.EPOCH_IMAGES", 8,
    "MEGDET.BATCH_WARMUP", ((0, 2), (1, 4), (2, 8)), "MEGDET.EPOCHS", 4.0,
    "MEGDET.DECAY_EPOCHS", (3,), "MEGDET.WARMUP_EPOCHS", 0.0, "MEGDET.REFERENCE_BATCH_SIZE", 8,
    "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.CROP.ENABLED", False,
)  # fmt: skip
FIXED = (*KEYS, "MEGDET.BATCH_WARMUP", ())
SIZES = [2] * 4 + [4] * 2 + [8] * 2


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return training.write_images(tmp_path_factory.mktemp("images"), images=16, shape=(32, 48))


@pytest.fixture(scope="module")
def whole(coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "output"
    return output, training.train(0, str(output), coco, KEYS)


def test_updates_grow_and_see_the_images_of_the_fixed_schedule(whole, coco, tmp_path):
    output, result = whole
    assert result["images_seen"] == sum(SIZES) == 32
    assert [len(batch) for batch in result["images"]] == [2] * 16  # micro-batches, and the BN size
    fixed = training.train(0, str(tmp_path), coco, FIXED)
    assert fixed["images"] == result["images"] and len(fixed["lr"]) == 4
    rates = [result["lr"][i] for i in range(8)]
    assert rates == pytest.approx([0.005] * 4 + [0.01] * 2 + [0.02, 0.002])
    (row,) = [json.loads(line) for line in (output / "metrics.json").open()]
    assert (row["images_seen"], row["effective_batch_size"], row["bn_size"]) == (32, 8, 2)
    epochs = [line.split(",")[0] for line in (output / "samples.csv").read_text().splitlines()]
    assert epochs[1:] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 5])  # within a phase, and at its last update
def test_a_resume_is_exact_within_and_across_phases(whole, coco, tmp_path, stopped_after):
    source, result = whole
    output = str(tmp_path / "resumed")
    training.copy_checkpoint(source, output, f"model_{stopped_after:07d}.pth")
    resumed = training.train(0, output, coco, KEYS, resume=True)
    assert resumed["start"] == stopped_after + 1
    assert not training.differing(resumed["state"], result["state"])
    assert not training.differing(resumed["momentum"], result["momentum"])
    assert resumed["loss"].items() <= result["loss"].items()
    assert resumed["lr"].items() <= result["lr"].items()
    assert resumed["images_seen"] == 32


@pytest.mark.slow
def test_two_processes_share_each_phase(coco, tmp_path, pool2):
    keys = (*KEYS, "MEGDET.ACCUMULATION_STEPS", 4, "MODEL.CGBN.BN_SIZE", 2)
    found = pool2.run(training.train, str(tmp_path / "whole"), coco, keys, timeout=120)
    sizes = [len(batch) for batch in found[0]["images"]]
    assert sizes == [1] * 16 and found[0]["images_seen"] == 32
    assert not training.differing(found[0]["state"], found[1]["state"])
    output = str(tmp_path / "resumed")
    training.copy_checkpoint(tmp_path / "whole", output, "model_0000004.pth")
    resumed = pool2.run(training.train, output, coco, keys, True, timeout=120)
    for before, after in zip(found, resumed, strict=True):
        assert not training.differing(before["state"], after["state"])
        assert not training.differing(before["momentum"], after["momentum"])


def test_running_statistics_follow_the_micro_batches(coco, tmp_path):
    steps = []

    def fault(trainer):
        layer = cgbn_layers(trainer.model)[0]
        note = layer.register_forward_pre_hook
        note(lambda module, inputs: steps.append((trainer.iter, module.accumulation_steps)))

    training.train(0, str(tmp_path), coco, KEYS, fault=fault)
    assert dict(steps) == dict(enumerate(size // 2 for size in SIZES))


@pytest.mark.parametrize(
    ("before", "after", "name", "start", "images"),
    [
        (KEYS, FIXED, "model_0000003.pth", 1, 8),  # from a phase with smaller mini-batches
        (KEYS, FIXED, "model_0000006.pth", 3, 24),  # from the last phase
        (FIXED, KEYS, "model_0000000.pth", 4, 8),
    ],
)
def test_a_run_may_leave_or_begin_the_warm_up(
    coco, tmp_path, caplog, before, after, name, start, images
):
    """The data go on at the same image, and the schedule at the same images."""
    first = training.train(0, str(tmp_path / "first"), coco, before)
    output = str(tmp_path / "second")
    training.copy_checkpoint(tmp_path / "first", output, name)
    caplog.clear()
    caplog.set_level(logging.INFO, "megdet_d2")
    second = training.train(0, output, coco, after, resume=True)
    assert second["start"] == start and second["images_seen"] == 32
    assert second["images"] == first["images"][images // 2 :]
    assert "iterations done" in caplog.text and "ahead of the data" not in caplog.text
    assert second["lr"][max(second["lr"])] == pytest.approx(0.002)


def test_a_report_counts_iterations_of_the_last_mini_batch(whole, coco):
    cfg = training.config(whole[0], coco, *KEYS)
    prepare_config(cfg)
    run = Run(whole[0], cfg, *read_metrics(whole[0]))
    iterations, _ = run.series("total_loss")
    assert list(iterations) == [4] and list(run.epochs(iterations)) == [4.0]
    run.eval_rows.append(run.train_rows[-1] | {"iteration": 8, "bbox/AP": 5.0})
    assert run.evaluations()[0].tolist() == [4] and run.final() == 5.0


def test_a_branch_starts_with_the_mini_batch_of_the_next_update(whole):
    for name, batch_size in (("model_0000002.pth", 2), ("model_0000003.pth", 4)):
        start = Start(whole[0] / name, batch_size)
        assert start.lr == pytest.approx(0.02 * batch_size / 8)
        with pytest.raises(ValueError, match=f"mini-batches of {batch_size}, and"):
            Start(whole[0] / name, 8)


def test_a_project_with_its_own_updates_is_refused(coco, tmp_path):
    class Own(Trainer):
        def __init__(self, cfg):
            super().__init__(cfg)
            self._trainer = type("Mine", (type(self._trainer).__mro__[1],), {})(
                self.model, self.data_loader, self.optimizer
            )

    cfg = training.config(tmp_path, coco, *KEYS)
    prepare_config(cfg)
    with pytest.raises(ValueError, match="BATCH_WARMUP is .*, but Mine makes the updates itself"):
        Own(cfg).train()


def test_a_plan_is_refused():
    cfg = load_config(TINY, ["MEGDET.BATCH_WARMUP", "((0, 4), (1, 8))"])
    for refuse in (check, lambda cfg: dry_run(cfg, 1, 2)):
        with pytest.raises(ValueError, match=r"add MEGDET.BATCH_WARMUP \(\) to plan the last one"):
            refuse(cfg)
