"""Trackers by their real clients, without a network: one run over a resume, clear refusals."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from megdet_d2.engine.trackers import TrackRun, check_trackers
from tests.helpers.training import config, train
from tests.helpers.wandb_files import read_items, read_records

EVALUATED = ("DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 3, "SOLVER.CHECKPOINT_PERIOD", 3)


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}")


def put_images(trainer):
    """Puts an image into the storage in every other step, as VIS_PERIOD does."""

    def put(module, inputs):
        if module.training and trainer.iter % 2:
            image = torch.full((3, 4, 6), 50 + trainer.iter, dtype=torch.uint8)
            image[0, 0, 0] = 255
            trainer.storage.put_image("GT / predictions", image)

    trainer.model.register_forward_pre_hook(put)


def train_twice(tmp_path, coco, *keys):
    """Trains, and resumes from the middle as after a kill."""
    train(0, str(tmp_path), coco, (*EVALUATED, *keys), fault=put_images)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    rows = train(0, str(tmp_path), coco, (*EVALUATED, *keys), True, fault=put_images)["rows"]
    return rows, json.loads((tmp_path / "trackers.json").read_text())


def last_values(rows, *names):
    """Yields each name with its last value in metrics.json and the iteration of that."""
    for name in names:
        yield name, next((row[name], row["iteration"]) for row in rows[::-1] if name in row)


@needs("mlflow")
def test_mlflow_has_the_config_the_metrics_the_images_and_the_model(coco, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows, runs = train_twice(
        tmp_path, coco, "MEGDET.TRACKERS", ("mlflow",), "MEGDET.EMA_DECAY", 0.9
    )
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    assert len(client.search_runs(["0"])) == 1  # the resumed training is the same run
    run = client.get_run(runs["mlflow"])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params["MODEL.RESNETS.NORM"] == "CGBN"
    for name, (value, iteration) in last_values(rows, "total_loss", "bbox/AP", "bbox_EMA/AP50"):
        last = client.get_metric_history(runs["mlflow"], name)[-1]
        np.testing.assert_equal(last.value, value)
        assert last.step == iteration
    files = {f.path for folder in ("", "images", "model", "model/ema")
             for f in client.list_artifacts(runs["mlflow"], folder)}  # fmt: skip
    assert {"config.yaml", "model/model_final.pth", "model/ema/model_final.pth"} <= files
    assert {f"images/GT_predictions_{i:07d}.png" for i in (1, 3, 5)} <= files


@needs("wandb")
def test_wandb_has_the_config_the_metrics_the_images_and_the_model(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, runs = train_twice(tmp_path, coco, "MEGDET.TRACKERS", ("wandb",))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    records = [list(read_records(file)) for file in files]
    started = [r.run for part in records for r in part if r.HasField("run")]
    assert len(files) == 2 and {run.run_id for run in started} == {runs["wandb"]}
    assert read_items(started[0].config.update)["MODEL"]["RESNETS"]["NORM"] == "CGBN"
    sent = [read_items(r.history.item) for r in records[-1] if r.HasField("history")]
    for name, (value, iteration) in last_values(rows, "total_loss", "bbox/AP"):
        last = [row for row in sent if name in row][-1]
        np.testing.assert_equal(float(last[name]), value)
        assert last["iteration"] == iteration
    images = [row["iteration"] for row in sent if "GT / predictions/path" in row]
    assert images == [3, 5]
    names = [entry.path for r in records[-1] if r.HasField("artifact")
             for entry in r.artifact.manifest.contents]  # fmt: skip
    assert "model_final.pth" in str(names) or b"model_final.pth" in files[-1].read_bytes()


def test_a_missing_package_and_an_unknown_name_are_refused(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = config(tmp_path, coco, "MEGDET.TRACKERS", ("mlflow",))
    with pytest.raises(ValueError, match=r'pip install -e "\.\[mlflow\]"'):
        check_trackers(cfg)
    cfg.MEGDET.TRACKERS = ("comet",)
    with pytest.raises(ValueError, match="'comet'; use some of wandb, mlflow"):
        check_trackers(cfg)


class Failing:
    """A tracker whose server is gone."""

    name = "gone"
    opened = 0

    def start(self, cfg, run, iteration):
        return "1"

    def write(self):
        raise OSError("no route")

    def close(self):
        raise OSError("no route")


def test_a_tracker_that_fails_later_does_not_end_the_training(coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gone", sys)
    monkeypatch.setattr("megdet_d2.engine.trackers.TRACKERS", {"gone": Failing})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    train(0, str(tmp_path), coco, ("MEGDET.TRACKERS", ("gone",)))
    assert "gone: not sent, and the training goes on: no route" in caplog.text


def refuse_to_start(rank, output, coco):
    class Refusing(Failing):
        def start(self, cfg, run, iteration):
            raise OSError("wrong key")

    import megdet_d2.engine.trackers as trackers

    trackers.TRACKERS["gone"] = Refusing
    try:
        cfg = config(output, coco, "MEGDET.TRACKERS", ("gone",))
        hook = TrackRun(cfg)
        hook.trainer = type("Trainer", (), {"progress": type("P", (), {"loaded_iteration": None})})
        hook.trainer.start_iter = 0
        with pytest.raises(RuntimeError, match="wrong key; correct the tracker's settings"):
            hook.before_train()
        return len(hook._trackers)
    finally:
        del trackers.TRACKERS["gone"]


def test_a_tracker_that_cannot_start_is_an_error_in_every_process(pool2, coco, tmp_path):
    assert pool2.run(refuse_to_start, str(tmp_path), coco) == [1, 0]
