"""Tests the hints about a schedule that does not fit the training images, or itself."""

import json
import re

import pytest
from detectron2.data import get_detection_dataset_dicts

from megdet_d2.data import inspect_datasets, register_datasets
from megdet_d2.engine import prepare_config
from megdet_d2.engine.advice import count_images, find_schedule_faults
from megdet_d2.engine.ema import effective_decay
from megdet_d2.schedule.build import scale_config
from tests.helpers.coco_data import assert_says
from tests.helpers.training import config, write_images


@pytest.fixture
def coco(tmp_path):
    return write_images(tmp_path, images=16)


def test_few_iterations_are_a_hint_with_the_epochs_that_would_do(tmp_path, coco, caplog):
    policy = ("MEGDET.POLICY", "normal", "MEGDET.EPOCHS", None)
    decay = ("MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", ())
    cfg = config(tmp_path, coco, *policy, *decay, "SOLVER.IMS_PER_BATCH", 16)
    prepare_config(cfg)
    assert cfg.SOLVER.MAX_ITER == 11
    assert_says(caplog.text, "MEGDET.POLICY is 'normal'", "11 epochs are 11 iterations of 16")
    assert_says(caplog.text, "SOLVER.IMS_PER_BATCH", "MEGDET.EPOCHS 300 or more")


@pytest.mark.parametrize("policy, epochs", [("", 2.0), ("custom", 200.0)])
def test_stock_schedules_and_long_ones_need_no_hint(tmp_path, coco, policy, epochs, caplog):
    cfg = config(tmp_path, coco, "MEGDET.POLICY", policy, "MEGDET.EPOCHS", epochs)
    prepare_config(cfg)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("epoch, said", [(118000, True), (33, True), (7, True), (17, False)])
def test_epoch_images_of_another_data_set_are_named(tmp_path, coco, epoch, said, caplog):
    epochs = ("MEGDET.EPOCHS", 30.0, "MEGDET.DECAY_EPOCHS", (20,))
    prepare_config(config(tmp_path, coco, *epochs, "MEGDET.EPOCH_IMAGES", epoch))
    assert (f"MEGDET.EPOCH_IMAGES is {epoch}" in caplog.text) == said
    if said:
        assert_says(caplog.text, "16 images to train on", "set MEGDET.EPOCH_IMAGES 0")


def test_a_batch_larger_than_the_training_set_is_named(tmp_path, coco, caplog):
    epochs = ("MEGDET.EPOCHS", 30.0, "MEGDET.DECAY_EPOCHS", (20,))
    prepare_config(config(tmp_path, coco, *epochs, "SOLVER.IMS_PER_BATCH", 24))
    assert_says(caplog.text, "SOLVER.IMS_PER_BATCH is 24", "16 images", "several times")


@pytest.mark.parametrize("filtered", [True, False])
def test_images_are_counted_as_detectron2_filters_them(tmp_path, coco, filtered):
    file = coco[0][1]
    with open(file) as stream:
        content = json.load(stream)
    rows = content["annotations"]
    rows[0]["iscrowd"] = rows[1]["iscrowd"] = rows[2]["iscrowd"] = 1
    rows[6]["iscrowd"] = None
    del rows[4:6]
    with open(file, "w") as stream:
        json.dump(content, stream)
    cfg = config(tmp_path, coco, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
    count = count_images(cfg, register_datasets(cfg))
    assert count == len(get_detection_dataset_dicts("mixed", filter_empty=filtered))
    assert count == (14 if filtered else 16)


def test_a_set_of_unknown_size_gets_no_hint_about_it(tmp_path):
    cfg = config(tmp_path, [], "DATASETS.TRAIN", ("megdet_digits_train",), "MEGDET.EPOCHS", 400.0)
    register_datasets(cfg, ())
    scale_config(cfg, num_images=8)
    assert count_images(cfg, inspect_datasets(cfg)) is None
    assert find_schedule_faults(cfg, None) == []


@pytest.mark.parametrize(
    ("factor", "warmup_epochs", "said"),
    [(16, 1.0, True), (16, 2.0, False), (1, 1.0, False)],
)
def test_a_short_warmup_to_a_raised_learning_rate_is_named(
    tmp_path, coco, factor, warmup_epochs, said, caplog
):
    """At 16 times the learning rate, 34 iterations of 374 left one training of two at 11 AP."""
    keys = (
        "MEGDET.POLICY", "normal", "MEGDET.EPOCHS", None, "MEGDET.DECAY_EPOCHS", (),
        "MEGDET.DECAY_FACTORS", (), "MEGDET.EPOCH_IMAGES", 16 * 34, "SOLVER.IMS_PER_BATCH", 16,
        "MEGDET.REFERENCE_BATCH_SIZE", 16 // factor, "MEGDET.WARMUP_EPOCHS", warmup_epochs,
    )  # fmt: skip
    cfg = config(tmp_path, coco, *keys)
    prepare_config(cfg)
    assert cfg.SOLVER.MAX_ITER == 374
    assert ("a warm-up of 34 iterations is short" in caplog.text) == said
    if said:
        assert_says(caplog.text, f"{factor} times REFERENCE_LR", "150 iterations, or 10% of 374")


STOCK = ("MEGDET.POLICY", "", "SOLVER.MAX_ITER", 300)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("SOLVER.WARMUP_ITERS", 1000), "SOLVER.WARMUP_ITERS is 1000, training ends after 300"),
        (("SOLVER.WARMUP_ITERS", 300), "SOLVER.WARMUP_ITERS below 300, such as 30"),
        (("SOLVER.WARMUP_ITERS", 299), ""),
        (
            ("SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", (200, 900), "SOLVER.GAMMA", 10.0),
            "SOLVER.GAMMA is 10, iterations [200] of SOLVER.STEPS, set SOLVER.GAMMA 0.1",
        ),
        (("SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", (900,), "SOLVER.GAMMA", 10.0), ""),
    ],
)
def test_keys_of_a_stock_schedule_that_contradict_one_another(tmp_path, coco, keys, said, caplog):
    cfg = config(tmp_path, coco, *STOCK, *keys)
    prepare_config(cfg)
    if said:
        assert_says(caplog.text, *said.split(", "))
    else:
        assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_scheduler_without_gamma_needs_no_hint(tmp_path, coco, caplog):
    cosine = ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", (200,))
    gamma = ("SOLVER.GAMMA", 10.0, "SOLVER.WARMUP_ITERS", 0)
    prepare_config(config(tmp_path, coco, *STOCK, *cosine, *gamma))
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize(
    ("decay", "batch_size", "share"),
    [(0.9998, 16, "94%"), (0.9998, 64, "79%"), (0.99, 16, "5%"), (0.98, 16, ""), (0.0, 16, "")],
)
def test_an_average_that_is_slower_than_the_training_is_named(
    tmp_path, coco, decay, batch_size, share, caplog
):
    """With 0.9998 for 16 images an average spans 80,000 of them."""
    sizes = ("MEGDET.REFERENCE_BATCH_SIZE", 16, "SOLVER.IMS_PER_BATCH", batch_size)
    cfg = config(
        tmp_path, coco, *STOCK, "SOLVER.WARMUP_ITERS", 0, "MEGDET.EMA_DECAY", decay, *sizes
    )
    prepare_config(cfg)
    assert ("of the average are the weights after the first" in caplog.text) == bool(share)
    if share:
        assert_says(caplog.text, f"300 iterations of {batch_size} images {share}")
        said = re.search(r"set MEGDET.EMA_DECAY (\S+) or less", caplog.text)
        cfg.MEGDET.EMA_DECAY = float(said[1])
        assert not [f for f in find_schedule_faults(cfg, None) if f.kind == "slow-average"]
        assert effective_decay(cfg) ** 299 == pytest.approx(0.001, rel=0.1)
