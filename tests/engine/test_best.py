"""The best checkpoint: kept over resumes, and a metric that no evaluation gives is refused."""

import shutil

import pytest
import torch

from megdet_d2.engine import Trainer, prepare_config
from tests.helpers.training import config, copy_checkpoint

EVALUATED = (
    "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 2, "MEGDET.BEST_METRIC", "bbox/AP",
    "SOLVER.CHECKPOINT_PERIOD", 2,
)  # fmt: skip


class Scripted(Trainer):
    """A trainer whose evaluations give written values, by iteration."""

    values = {1: 3.0, 3: 5.0, 5: 4.0}

    def __init__(self, cfg):
        super().__init__(cfg)
        self.test = lambda cfg, model: {"bbox": {"AP": self.values[min(self.iter, 5)]}}


def run(output, coco, *keys, resume=False):
    cfg = config(output, coco, *EVALUATED, *keys)
    prepare_config(cfg)
    trainer = Scripted(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return torch.load(f"{output}/model_best.pth")


def test_the_best_is_kept_also_by_a_resume(coco, tmp_path):
    best = run(tmp_path / "whole", coco)
    assert best["iteration"] == 3 and best["trainer"]["iteration"] == 3
    assert best["best"] == {"metric": "bbox/AP", "value": 5.0, "iteration": 3}
    # Saved before the evaluation of its iteration, so it does not know the best one.
    copy_checkpoint(tmp_path / "whole", tmp_path / "rest", "model_0000003.pth")
    shutil.copy(tmp_path / "whole" / "model_best.pth", tmp_path / "rest")
    again = run(tmp_path / "rest", coco, resume=True)
    assert again["best"] == best["best"]


def test_more_epochs_after_the_best_of_the_last_evaluation(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "values", {1: 3.0, 3: 4.0, 5: 5.0})
    best = run(tmp_path, coco)
    assert best["best"]["value"] == 5.0 and best["trainer"]["iteration"] == 5
    assert (tmp_path / "last_checkpoint").read_text() == "model_best.pth"
    cfg = config(tmp_path, coco, *EVALUATED, "MEGDET.EPOCHS", 3.0)
    prepare_config(cfg)
    trainer = Scripted(cfg)
    trainer.resume_or_load(True)
    assert (trainer.start_iter, trainer.images_seen) == (6, 48)


def test_the_best_of_another_run_in_the_folder_is_not_compared_with(coco, tmp_path):
    best = {"metric": "bbox/AP", "value": 0.0, "iteration": 3}  # lower than all
    torch.save({"best": best}, tmp_path / "model_best.pth")
    again = run(tmp_path, coco, "MEGDET.BEST_MODE", "min")
    assert again["best"] == {"metric": "bbox/AP", "value": 3.0, "iteration": 1}


@pytest.mark.parametrize(
    "keys, said",
    [
        (("MEGDET.BEST_METRIC", "bbox/ap"), "bbox/AP, bbox/AP50"),
        (("MEGDET.BEST_METRIC", "segm/AP"), "BEST_METRIC is 'segm/AP'"),
        (("MEGDET.BEST_METRIC", "bbox_EMA/AP"), "BEST_METRIC is 'bbox_EMA/AP'"),
        (("TEST.EVAL_PERIOD", 0), "TEST.EVAL_PERIOD is 0"),
        (("DATASETS.TEST", ()), "DATASETS.TEST is empty"),
        (("MEGDET.BEST_MODE", "most"), "BEST_MODE is 'most'; use one of max, min"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused(coco, tmp_path, keys, said):
    with pytest.raises(ValueError, match=said):
        prepare_config(config(tmp_path, coco, *EVALUATED, *keys))


def test_metrics_of_classes_and_of_the_average_are_accepted(coco, tmp_path):
    for keys in (
        ("MEGDET.BEST_METRIC", "bbox/AP-a"),
        ("MEGDET.BEST_METRIC", "bbox_EMA/AP50", "MEGDET.EMA_DECAY", 0.9),
    ):
        prepare_config(config(tmp_path, coco, *EVALUATED, *keys))
