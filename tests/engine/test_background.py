"""Evaluations beside the training: equal to those in it, and neither lost nor made twice."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import hooks

from megdet_d2 import Trainer, prepare_config
from megdet_d2.engine.background_worker import EvaluationProcess, WorkerError, _evaluate
from megdet_d2.engine.ema import WeightAverage
from megdet_d2.engine.metrics import cut_metrics, has_results
from megdet_d2.report.run import read_metrics
from tests.helpers.background import KEYS, Computing, Diverging, Dying, Failing, Summing, run
from tests.helpers.paths import TINY, TRAIN_NET
from tests.helpers.processes import all_gone, finish, session, start, wait_for
from tests.helpers.training import config, copy_checkpoint, differing, digests, read_rows

TASKS = ("bbox", "sums")
ALL = ("MEGDET.EMA_DECAY", 0.9, "MEGDET.BEST_METRIC", "sums/AP-scores")


def results(output):
    """Returns the rows of evaluations, by iteration; fails if an iteration has two."""
    found = {}
    for row in read_rows(output):
        numbers = {name: value for name, value in row.items() if name.startswith(TASKS)}
        if numbers:
            assert row["iteration"] not in found
            found[row["iteration"]] = numbers
    return found


def snapshots(output):
    return sorted(path.name for path in Path(output, "background").glob("*.pth"))


def in_training(trainer):
    """Returns the results of a training that evaluates by itself, by iteration."""
    found = {}
    for name, history in trainer.storage.histories().items():
        for value, iteration in history.values() if name.startswith(TASKS) else ():
            found.setdefault(iteration, {})[name] = value
    return found


@pytest.fixture(scope="module")
def beside(coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("beside")
    return run(Summing, output, coco, *ALL)


def test_equal_to_evaluations_in_the_training(coco, tmp_path, beside):
    trainer = run(Summing, tmp_path, coco, *ALL, "TEST.BACKGROUND", False)
    output = Path(beside.cfg.OUTPUT_DIR)
    found, expected = results(output), in_training(trainer)
    assert list(found) == [1, 3, 6] and found.keys() == expected.keys()
    for iteration in found:
        assert str(found[iteration]) == str(dict(sorted(expected[iteration].items())))  # NaN too
    assert {"bbox/AP", "bbox_EMA/AP", "sums/AP-scores", "sums_EMA/boxes"} <= found[3].keys()
    for part in (beside.checkpointer.model, beside.ema.model):
        other = trainer.ema.model if part is beside.ema.model else trainer.checkpointer.model
        assert differing(digests(part.state_dict()), digests(other.state_dict())) == []
    best, other = (torch.load(path / "model_best.pth") for path in (output, tmp_path))
    assert best["best"] == other["best"] and best.keys() == other.keys()
    assert best["iteration"] == best["trainer"]["iteration"]
    assert differing(digests(best["model"]), digests(other["model"])) == []
    name = "ema/model_best.pth"
    best, other = (torch.load(path / name)["model"] for path in (output, tmp_path))
    assert differing(digests(best), digests(other)) == []


def test_the_last_is_waited_for_and_nothing_is_left(beside):
    output = Path(beside.cfg.OUTPUT_DIR)
    assert snapshots(output) == [] and (output / "background" / "log.txt").stat().st_size
    assert torch.load(output / "model_final.pth")["iteration"] == 5
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    late = {row["iteration"]: row["images_seen"] for row in rows if row["iteration"] in (1, 3)}
    assert (late[1], late[3]) == (16, 32)
    _, evaluated = read_metrics(output)  # as megdet report does
    assert [row["iteration"] for row in evaluated] == [1, 3, 6]


@pytest.mark.slow
def test_an_error_stops_the_training_and_a_resume_repeats_the_evaluation(
    coco, tmp_path, beside, caplog
):
    each = (*ALL, "TEST.EVAL_PERIOD", 1)
    with pytest.raises(
        RuntimeError, match=r"evaluation of iteration 0 failed: ValueError: no such"
    ):
        run(Failing, tmp_path, coco, *each)
    assert "in build_evaluator" in caplog.text  # of the other process's traceback
    assert snapshots(tmp_path) == ["0000000_8.pth", "0000001_16.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not (tmp_path / "model_final.pth").exists()
    run(Summing, tmp_path, coco, *each, resume=True)  # that of iteration 2 too, which was due
    found, whole = results(tmp_path), results(beside.cfg.OUTPUT_DIR)
    assert list(found) == [0, 1, 2, 3, 4, 6] and snapshots(tmp_path) == []
    assert all(str(found[iteration]) == str(whole[iteration]) for iteration in whole)


def test_a_snapshot_without_the_average_has_the_results_of_its_model(tmp_path, caplog):
    """It is from before MEGDET.EMA_DECAY was set."""

    class Stub:
        @staticmethod
        def test(cfg, model):
            return {"bbox": {"AP": 7.0}}

        @staticmethod
        def test_ema(cfg, model):
            return {"bbox_EMA": {"AP": 8.0}}

    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    snapshot, expected = {"model": model.state_dict()}, {"bbox/AP": 7.0}
    torch.save(snapshot, tmp_path / "before.pth")
    torch.save({**snapshot, "ema": average.state_dict()}, tmp_path / "after.pth")
    assert _evaluate(Stub, None, model, average, tmp_path / "before.pth") == expected
    assert "the checkpoint has no average to evaluate" in caplog.text
    expected["bbox_EMA/AP"] = 8.0
    assert _evaluate(Stub, None, model, average, tmp_path / "after.pth") == expected


@pytest.mark.slow
def test_a_process_that_ends_is_named_at_the_end_of_the_training(coco, tmp_path):
    with pytest.raises(RuntimeError, match=r"iteration 3 failed: its process ended with status 3"):
        run(Dying, tmp_path, coco, "TEST.EVAL_PERIOD", 4)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert list(results(tmp_path)) == [6]


@pytest.mark.slow
def test_work_without_layers_is_no_hang_and_waiting_is_one(coco, tmp_path):
    cfg = config(tmp_path, coco, *KEYS)
    prepare_config(cfg)
    model = Trainer.build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "snapshot.pth")
    process = EvaluationProcess(Computing, cfg, timeout=250)
    try:
        process.send(str(tmp_path / "snapshot.pth"))
        deadline = time.monotonic() + 240
        while not Path(tmp_path, "computes").exists():  # it has started, which may take long
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process._timeout = 6
        found = None
        while found is None:
            found = process.receive(wait=0.2)
        assert found == {"times/AP": 1.0}
        process.send(str(tmp_path / "snapshot.pth"))
        with pytest.raises(WorkerError, match="no layer ran for .* s, and no processor .*TIMEOUT"):
            while process.receive(wait=0.2) is None:
                pass
    finally:
        process.end()


@pytest.mark.slow
def test_snapshots_of_another_run_and_of_updates_that_come_again_are_removed(
    coco, tmp_path, beside
):
    copy_checkpoint(beside.cfg.OUTPUT_DIR, tmp_path / "rest", "model_0000002.pth")
    (tmp_path / "rest" / "background").mkdir()
    for name in ("0000001_16.pth", "0000003_32.pth"):  # in metrics.json; comes again
        (tmp_path / "rest" / "background" / name).write_bytes(b"not read")
    run(Summing, tmp_path / "rest", coco, *ALL, resume=True)
    assert str(results(tmp_path / "rest")) == str(results(beside.cfg.OUTPUT_DIR))
    assert snapshots(tmp_path / "rest") == []


@pytest.mark.slow
def test_no_result_is_lost_or_repeated_by_a_roll_back(coco, tmp_path):
    keys = ("MEGDET.ON_DIVERGENCE", "half_lr", "SOLVER.CHECKPOINT_PERIOD", 2)
    trainer = run(Diverging, tmp_path, coco, *keys)
    assert trainer.spoilt and trainer.progress.backoff.rollbacks == 1
    assert list(results(tmp_path)) == [1, 3, 6] and snapshots(tmp_path) == []


@pytest.mark.slow
def test_killed_and_resumed(coco, tmp_path, beside):
    process = start("-m", "tests.helpers.background", tmp_path, json.dumps(coco))
    wait_for(tmp_path / "background" / "waits", process)
    wait_for(tmp_path / "background" / "0000001_16.pth", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    all_gone(process.pid, 30)
    assert snapshots(tmp_path) == ["0000000_8.pth", "0000001_16.pth"]
    run(Summing, tmp_path, coco, "TEST.EVAL_PERIOD", 1, resume=True)
    found = results(tmp_path)
    assert list(found) == [0, 1, 2, 3, 4, 6] and snapshots(tmp_path) == []
    for name in ("sums/AP-scores", "sums/boxes"):
        assert found[3][name] == results(beside.cfg.OUTPUT_DIR)[3][name]


@pytest.mark.slow
def test_told_to_stop(coco, tmp_path):
    process = start("-m", "tests.helpers.background", tmp_path, json.dumps(coco))
    wait_for(tmp_path / "background" / "waits", process)
    for pid in session(process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == 75
    all_gone(process.pid, 30)
    assert snapshots(tmp_path)[0] == "0000000_8.pth"
    assert (tmp_path / "last_checkpoint").exists()


@pytest.mark.slow
def test_two_bn_groups(coco, tmp_path):
    """Two processes, each a group, by train_net.py; the other process has the groups' mean."""
    rows = {}
    for background in (True, False):
        output = tmp_path / str(background)
        keys = (*KEYS, "TEST.BACKGROUND", background, "MEGDET.EMA_DECAY", 0.9, "OUTPUT_DIR", output,
                "MODEL.CGBN.BN_SIZE", 4, "DATASETS.COCO", coco, "DATASETS.TRAIN", ("mixed",),
                "MODEL.ROI_HEADS.NUM_CLASSES", 1, "MEGDET.EPOCHS", 2.0)  # fmt: skip
        flags = ("--config-file", TINY, "--num-gpus", 2, "--dist-url", "auto")
        status, said = finish(start(TRAIN_NET, *flags, *keys), 800)
        assert status == 0, said[-4000:]
        rows[background] = results(output)
    # In the training Detectron2 writes the last evaluation before each of its writers' periods.
    assert list(rows[True]) == [1, 3, 6] and list(rows[False]) == [3, 6]
    for iteration, numbers in rows[False].items():
        assert str(rows[True][iteration]) == str(numbers)
    models = [
        torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("True", "False")
    ]
    assert differing(*map(digests, models)) == []


@pytest.mark.parametrize(
    "keys, said",
    [
        (("TEST.BACKGROUND_DEVICE", "gpu"), 'give "cpu", or one GPU such as "cuda:7"'),
        (("TEST.BACKGROUND_DEVICE", "cuda:99"), "this machine has 0 GPUs"),
        (("TEST.BACKGROUND_THREADS", 0), "give 1 or more"),
    ],
)
def test_keys_are_checked(coco, tmp_path, monkeypatch, keys, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=said):
        prepare_config(config(tmp_path, coco, *KEYS, *keys))


class OwnHooks(Trainer):
    def build_hooks(self):
        return [hooks.LRScheduler()]


def test_trainers_that_another_process_cannot_follow_are_refused(coco, tmp_path):
    class Local(Trainer):
        pass

    cfg = config(tmp_path, coco, *KEYS)
    prepare_config(cfg)
    with pytest.raises(ValueError, match=r"cannot import .*Local; define the class"):
        Local(cfg)
    with pytest.raises(ValueError, match=r"OwnHooks\.build_hooks does not return"):
        OwnHooks(cfg)
    trainer = Trainer(cfg)
    trainer.test = lambda cfg, model: {}
    with pytest.raises(ValueError, match="test is set on this Trainer alone"):
        trainer.train()
    trainer = Trainer(cfg)
    trainer.register_hooks([hooks.BestCheckpointer(2, trainer.checkpointer, "bbox/AP")])
    with pytest.raises(ValueError, match=r"use MEGDET\.BEST_METRIC"):
        trainer.train()


def test_rows_of_late_results_stay_where_later_rows_are_cut(tmp_path):
    def row(iteration, **values):
        return json.dumps({"iteration": iteration, "images_seen": 8 * iteration, **values}) + "\n"

    lines = [
        row(9, total_loss=1.0), row(19, total_loss=1.0), row(9, ap=1), row(29, total_loss=1.0),
        row(14, ap=2), row(24, ap=3), '{"iter',
    ]  # fmt: skip
    path = tmp_path / "metrics.json"
    path.write_text("".join(lines))
    assert has_results(str(path), 14) and not has_results(str(path), 19)
    cut_metrics(str(path), 19, 8 * 19)
    assert path.read_text() == "".join([*lines[:3], lines[4]])
