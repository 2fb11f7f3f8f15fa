"""A run that was stopped goes on as if it had not been."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from megdet_d2.engine.metrics import cut_metrics
from megdet_d2.engine.progress import Layout, describe_resume, updates_done
from tests.helpers.training import copy_checkpoint, differing, train


def same(whole, resumed):
    """The resumed run is the rest of the whole one, bit by bit, in every process."""
    start = resumed[0]["start"]
    for rank, (a, b) in enumerate(zip(whole, resumed, strict=True)):
        assert b["images"] == a["images"][start:], f"rank {rank} sees other images"
        assert differing(a["state"], b["state"]) == [], f"rank {rank}"
        assert differing(a["momentum"], b["momentum"]) == [], f"rank {rank}"
        assert b["images_seen"] == a["images_seen"]
        assert b["lr"] == a["lr"]
    assert resumed[0]["loss"] == whole[0]["loss"]
    assert resumed[0]["rows"] == whole[0]["rows"]


@pytest.fixture(scope="module")
def four(pool4, coco, tmp_path_factory):
    """Four processes in groups of two, never stopped: 2 epochs of 24 images, 8 an update."""
    output = str(tmp_path_factory.mktemp("four"))
    overrides = ("MODEL.CGBN.BN_SIZE", 4)
    return output, pool4.run(train, output, coco, overrides, timeout=240)


@pytest.mark.parametrize("stopped_after", [0, 3])
def test_resumed_in_groups_smaller_than_the_world(pool4, coco, four, tmp_path, stopped_after):
    whole, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, f"model_{stopped_after:07d}.pth")
    resumed = pool4.run(train, output, coco, ("MODEL.CGBN.BN_SIZE", 4), True, timeout=240)
    assert resumed[0]["start"] == stopped_after + 1
    same(result, resumed)
    # the groups have seen different images, and each has its own statistics
    assert differing(resumed[0]["state"], resumed[1]["state"]) == []
    assert differing(resumed[0]["state"], resumed[2]["state"])


def test_a_micro_batch_is_of_one_orientation(four, coco):
    images = json.loads(Path(coco[0][1]).read_text())["images"]
    wide = {image["id"]: image["width"] > image["height"] for image in images}
    batches = [[wide[i] for i, _ in batch] for rank in four[1] for batch in rank["images"]]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert {batch[0] for batch in batches} == {True, False}


def test_a_random_seed_is_one_for_all_processes(pool2, coco, tmp_path):
    """Or they would draw from streams of their own, some images twice an epoch and some not."""
    overrides = ("SEED", -1, "DATALOADER.ASPECT_RATIO_GROUPING", False, "MEGDET.EPOCHS", 1.0,
                 "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", ())  # fmt: skip
    results = pool2.run(train, str(tmp_path), coco, overrides, timeout=120)
    seen = [i for rank in results for batch in rank["images"] for i, _ in batch]
    assert sorted(seen) == list(range(1, 25))


def test_a_signal_in_the_last_step_ends_training_as_ever(coco, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]

    def fault(trainer):
        def send(module, inputs):
            if trainer.iter == trainer.max_iter - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.model.register_forward_pre_hook(send)

    train(0, str(tmp_path), coco, ("SOLVER.CHECKPOINT_PERIOD", 100), fault=fault)
    assert (tmp_path / "model_final.pth").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_resumed_from_any_iteration_with_other_workers(coco, tmp_path):
    """One process; a random seed, which the checkpoint has."""
    whole = str(tmp_path / "whole")
    result = train(0, whole, coco, ("SEED", -1))
    for stopped_after, workers in [(0, 0), (1, 3), (2, 0), (4, 2)]:
        output = str(tmp_path / str(stopped_after))
        copy_checkpoint(whole, output, f"model_{stopped_after:07d}.pth")
        overrides = ("SEED", -1, "DATALOADER.NUM_WORKERS", workers)
        same([result], [train(0, output, coco, overrides, True)])


def test_retinanets_normalizer_goes_on(coco, tmp_path):
    """A moving average that is in no state_dict."""
    overrides = (
        "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 1,
        "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
        "MODEL.RETINANET.IN_FEATURES", ("p3", "p4", "p5", "p6", "p7"),
        "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [24], [32], [48]],
        "MODEL.RETINANET.NUM_CONVS", 1, "SOLVER.IMS_PER_BATCH", 4, "MEGDET.EPOCHS", 0.5,
        "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (), "MEGDET.WARMUP_EPOCHS", 0.0,
    )  # fmt: skip
    result = train(0, str(tmp_path / "whole"), coco, overrides)
    copy_checkpoint(str(tmp_path / "whole"), str(tmp_path / "resumed"), "model_0000000.pth")
    same([result], [train(0, str(tmp_path / "resumed"), coco, overrides, True)])


def test_another_world_batch_and_accumulation(coco, four, tmp_path, caplog):
    """Four processes of two images become one of two micro-batches of three, after an update."""
    whole, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, "model_0000000.pth")
    overrides = ("SOLVER.IMS_PER_BATCH", 6, "MEGDET.ACCUMULATION_STEPS", 2)
    with caplog.at_level("INFO", "megdet_d2"):
        resumed = train(0, output, coco, overrides, True)

    assert resumed["start"] == 2  # 8 images are 1.33 updates of 6
    assert resumed["images_seen"] == 8 + 6 * (8 - 2)
    first = [image for rank in result for image, _ in rank["images"][0]]
    rest = [image for batch in resumed["images"] for image, _ in batch]
    # The order between epochs' ends depends on the grouping: nothing twice before all came once.
    assert len(first) == 8 and len(set(first)) == 8
    held = torch.load(f"{output}/model_final.pth")["progress"]["stream"]["pending"]
    counts = {i: (first + rest).count(i) + [j + 1 for _, j in held].count(i) for i in range(1, 25)}
    assert sum(counts.values()) == 44 + len(held) and set(counts.values()) <= {1, 2}

    # The rule's learning rate, warmed up over 12 images = 2 updates, decayed after an epoch = 4.
    assert resumed["lr"] == pytest.approx(
        {2: 0.0075, 3: 0.0075, 4: 0.00075, 5: 0.00075, 6: 0.00075, 7: 0.00075}
    )
    table = re.sub(r" +", " ", caplog.text)
    for row in (
        "| processes | 4 | 1 |", "| images per GPU and micro-batch | 2 | 3 |",
        "| MEGDET.ACCUMULATION_STEPS | 1 | 2 |", "| SOLVER.IMS_PER_BATCH | 8 | 6 |",
        "| SOLVER.BASE_LR | 0.01 | 0.0075 |", "| iterations done | 1 | 2 |",
        "the schedule continues 4 images ahead of the data",
    ):  # fmt: skip
        assert row in table, row
    # and back again, from the middle of that
    again = str(tmp_path / "again")
    copy_checkpoint(output, again, "model_0000003.pth")
    back = train(0, again, coco, (), True)
    assert back["start"] == 3 and back["images_seen"] == 20 + 8 * 3  # 20 images are 2.5 updates
    assert [row["images_seen"] for row in back["rows"] if "images_seen" in row][-1] == 44


def test_the_same_mini_batch_on_other_processes_keeps_the_schedule(coco, four, tmp_path):
    whole, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, "model_0000001.pth")
    resumed = train(0, output, coco, ("MEGDET.ACCUMULATION_STEPS", 4), True)
    assert resumed["start"] == 2 and resumed["images_seen"] == 48
    # The micro-batches of two are the four processes' in turn: to the pixel the same.
    expected = [rank["images"][step] for step in range(2, 6) for rank in result]
    assert resumed["images"] == expected
    assert resumed["lr"] == result[0]["lr"]


def test_without_a_policy_the_schedule_is_left_alone(coco, four, tmp_path, caplog):
    output = str(tmp_path / "resumed")
    copy_checkpoint(four[0], output, "model_0000003.pth")
    overrides = (
        "MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR",
        0.5, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (),
    )  # fmt: skip
    resumed = train(0, output, coco, overrides, True)
    assert resumed["start"] == 4 and resumed["images_seen"] == 32 + 4
    assert max(resumed["lr"].values()) < 0.02
    assert 'MEGDET.POLICY is "", so the learning rate and the iteration continue' in caplog.text


def test_a_checkpoint_of_detectron2s_own_trainer(coco, four, tmp_path, caplog):
    output = str(tmp_path / "resumed")
    os.makedirs(output)
    state = torch.load(f"{four[0]}/model_0000003.pth")
    del state["progress"], state["processes"]
    torch.save(state, f"{output}/model_0000003.pth")
    Path(output, "last_checkpoint").write_text("model_0000003.pth")
    resumed = train(0, output, coco, (), True)
    assert resumed["start"] == 4 and resumed["images_seen"] == 48
    assert "taking its 4 iterations for 32 images" in caplog.text


CHANGED = (
    "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.MOMENTUM", 0.5, "SOLVER.NESTEROV", True,
    "MEGDET.EPOCHS", 1.5,
)  # fmt: skip


def test_options_of_the_optimizer_are_those_of_the_config(coco, four, tmp_path, caplog):
    """torch puts the checkpoint's in their place, and the log and config.yaml had others."""
    output = str(tmp_path / "resumed")
    copy_checkpoint(four[0], output, "model_0000003.pth")
    with caplog.at_level("INFO", "megdet_d2"):
        resumed = train(0, output, coco, CHANGED, True)
    wanted = {"weight_decay": "0.01", "momentum": "0.5", "nesterov": "True"}
    assert wanted.items() <= resumed["groups"][0].items()
    said = "momentum of 0.9 by 0.5 (SOLVER.MOMENTUM); nesterov of False by True (SOLVER.NESTEROV)"
    assert said in caplog.text


def test_without_a_policy_options_of_the_optimizer_are_the_checkpoints(
    coco, four, tmp_path, caplog
):
    output = str(tmp_path / "resumed")
    copy_checkpoint(four[0], output, "model_0000003.pth")
    stock = ("MEGDET.POLICY", "", "MEGDET.EPOCHS", None, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", ())
    resumed = train(0, output, coco, (*CHANGED[:4], *stock), True)
    assert resumed["groups"][0]["momentum"] == "0.9"
    assert "does not replace weight_decay of 0.0001 by 0.01" in caplog.text


def test_other_groups_of_parameters_are_refused_by_their_keys(coco, four, tmp_path):
    output = str(tmp_path / "resumed")
    copy_checkpoint(four[0], output, "model_0000003.pth")
    with pytest.raises(ValueError, match="checkpoint's optimizer has groups of .*BIAS_LR_FACTOR"):
        train(0, output, coco, ("SOLVER.BIAS_LR_FACTOR", 2.0), True)


def test_nothing_changed_is_not_worth_a_table():
    layout = Layout(4, 1, 2)
    assert describe_resume(layout, layout, 16, (2, 2), (0.01, 0.01)) == ""
    other = Layout(2, 1, 4)
    table = describe_resume(layout, other, 16, (2, 2), (0.01, 0.01))
    assert "IMS_PER_BATCH" not in table and "processes" in table and "ahead" not in table
    assert [updates_done(n, 8) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [
        {"iteration": 19, "images_seen": 160}, {"iteration": 39, "images_seen": 320},
        {"iteration": 15, "images_seen": 336}, {"iteration": 17, "bbox/AP": 1.0},
        {"iteration": 19, "images_seen": 400},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"iteration": 2')
    with path.open("a") as writer:  # as Detectron2's, which opened it before
        cut_metrics(str(path), 16, 352)
        writer.write(json.dumps({"iteration": 18}) + "\n")
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left == rows[:3] + [{"iteration": 18}]
    cut_metrics(str(path), 99, 9999)
    assert [json.loads(line) for line in path.read_text().splitlines()] == left
    cut_metrics(str(tmp_path / "none.json"), 1, 1)
    # Detectron2 writes an evaluation after the losses of a later iteration.
    rows = [
        {"iteration": 19, "images_seen": 160, "total_loss": 1.0},
        {"iteration": 14, "bbox/AP": 3},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut_metrics(str(path), 15, 128)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[1:]
