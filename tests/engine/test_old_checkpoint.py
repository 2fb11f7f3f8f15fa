"""A checkpoint of an earlier version is resumed as that version would have done.

checkpoints/model_0000002.pth was saved when the progress was part of the trainer's state: two
processes, a BN group each, two micro-batches. expected.json has what that version did afterwards.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.training import config, copy_checkpoint, differing, train

OLD = Path(__file__).parent / "checkpoints"
NAME = "model_0000002.pth"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture(scope="module")
def resumed(pool2, coco, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("runs") / "old")
    copy_checkpoint(OLD, output, NAME)
    return pool2.run(train, output, coco, EXPECTED["overrides"], True, timeout=120)


def test_an_old_checkpoint_is_resumed_as_its_version_did(resumed):
    for rank, result in enumerate(resumed):
        images = [[list(image) for image in batch] for batch in result["images"]]
        assert images == EXPECTED["images"][rank]
        assert {str(i): lr for i, lr in result["lr"].items()} == EXPECTED["lr"]
        assert (result["start"], result["images_seen"]) == (3, 48)
    losses = {str(i): loss for i, loss in resumed[0]["loss"].items()}
    assert losses == pytest.approx(EXPECTED["loss"], rel=1e-4)


def save_again(rank, old, new, coco):
    """Loads the old checkpoint and saves its content at once, as this version does."""
    from detectron2.utils.events import EventStorage

    from megdet_d2.engine import Trainer, prepare_config

    cfg = config(old, coco, *EXPECTED["overrides"])
    prepare_config(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    with EventStorage(trainer.start_iter) as trainer.storage:
        trainer.progress.restore_scalars()
        trainer.checkpointer.save_dir = new
        trainer.checkpointer.gather()
        trainer.checkpointer.save("model_0000002", iteration=trainer.iter)


def test_it_equals_one_that_is_saved_today_to_the_bit(pool2, coco, resumed, tmp_path):
    old, new, run = (str(tmp_path / name) for name in ("old", "new", "run"))
    copy_checkpoint(OLD, old, NAME)
    copy_checkpoint(OLD, new, NAME)
    pool2.run(save_again, old, new, coco, timeout=120)
    saved = torch.load(Path(new, NAME))
    assert saved["progress"]["images_seen"] == 24 and "megdet" not in saved["trainer"]

    copy_checkpoint(new, run, NAME)
    again = pool2.run(train, run, coco, EXPECTED["overrides"], True, timeout=120)
    for a, b in zip(resumed, again, strict=True):
        assert differing(a["state"], b["state"]) == []
        assert differing(a["momentum"], b["momentum"]) == []
        assert (a["images"], a["lr"], a["loss"]) == (b["images"], b["lr"], b["loss"])
    assert resumed[0]["rows"][-1] == again[0]["rows"][-1]
