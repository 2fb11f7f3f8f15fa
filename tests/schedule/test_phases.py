"""Tests the phases of a batch warm-up: images, iterations and learning rates by hand."""

import json

import pytest

from megdet_d2.config import load_config
from megdet_d2.schedule.build import images_per_epoch, phases_from_config, scale_config
from megdet_d2.schedule.phases import Phases, make_phases
from tests.helpers.schedules import learning_rates

# 4 epochs of 64 images: 16 updates of 16 images alone.
KEYS = [
    "MEGDET.POLICY", "custom", "MEGDET.EPOCHS", 4.0, "MEGDET.DECAY_EPOCHS", (3,),
    "MEGDET.DECAY_FACTORS", (0.1,), "MEGDET.EPOCH_IMAGES", 64, "SOLVER.IMS_PER_BATCH", 16,
    "MEGDET.REFERENCE_BATCH_SIZE", 4, "MEGDET.REFERENCE_LR", 0.1, "MEGDET.ACCUMULATION_STEPS", 8,
    "MEGDET.WARMUP_EPOCHS", 0.0,
]  # fmt: skip
WARMUP = ("MEGDET.BATCH_WARMUP", ((0, 4), (1, 8), (2, 16)))


def resolved(*opts):
    cfg = load_config(None, [*KEYS, *opts])
    scale_config(cfg, 64, 1)
    return cfg


def test_images_and_updates_are_inverse():
    phases = Phases((0, 16, 24), (4, 8, 16))
    sizes = [phases.batch_size(i) for i in range(32)]
    assert sizes == [4] * 16 + [8] * 8 + [16] * 8
    for updates in range(33):
        assert phases.images(updates) == sum(sizes[:updates])
        assert phases.updates(phases.images(updates)) == updates
    assert phases.updates(1) == 1 and phases.updates(65) == 17 and phases.updates(129) == 25
    alone = Phases((0,), (8,))
    assert [alone.updates(n) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert alone.images(3) == 24


def test_images_and_decays_are_those_of_the_fixed_schedule():
    cfg, fixed = resolved(*WARMUP), resolved()
    assert cfg.MEGDET.RESOLVED.PHASES == [[0, 4], [16, 8], [24, 16]]
    phases = phases_from_config(cfg)
    assert phases.images(cfg.SOLVER.MAX_ITER) == 16 * fixed.SOLVER.MAX_ITER == 256
    assert [phases.images(step) for step in cfg.SOLVER.STEPS] == [192]
    counted = ("MEGDET.EPOCH_IMAGES", 0)  # then they follow from the iterations
    assert images_per_epoch(resolved(*WARMUP, *counted)) == images_per_epoch(resolved(*counted))
    assert images_per_epoch(resolved(*WARMUP, *counted)) == 64
    assert phases_from_config(fixed) == Phases((0,), (16,))


@pytest.mark.parametrize(
    ("rule", "rates"), [("linear", (0.1, 0.2, 0.4)), ("sqrt", (0.1, 0.1 * 2**0.5, 0.2))]
)
def test_each_phase_has_the_learning_rate_of_its_mini_batch(rule, rates):
    cfg = resolved(*WARMUP, "MEGDET.SCALING_RULE", rule)
    expected = [rates[0]] * 16 + [rates[1]] * 8 + [rates[2]] * 4 + [rates[2] / 10] * 4
    assert learning_rates(cfg) == pytest.approx(expected)


def test_the_warm_up_is_that_of_the_first_mini_batch():
    keys = ("MEGDET.REFERENCE_BATCH_SIZE", 2, "MEGDET.WARMUP_EPOCHS", 1.0)
    first = learning_rates(resolved(*WARMUP, *keys))[:16]
    alone = learning_rates(
        resolved(*keys, "SOLVER.IMS_PER_BATCH", 4, "MEGDET.ACCUMULATION_STEPS", 2)
    )
    assert first == pytest.approx(alone[:16]) and first[0] == pytest.approx(0.1)
    cfg = load_config(None, [*KEYS, *WARMUP, *keys])
    rows = scale_config(cfg, 64, 1).splitlines()
    assert any("WARMUP_FACTOR" in row and "from LR 0.1 (reference)" in row for row in rows)
    assert any("PHASES" in row and "[[0, 4], [16, 8], [24, 16]]" in row for row in rows)
    zero = learning_rates(resolved(*WARMUP, *keys, "MEGDET.WARMUP_START", "zero"))
    assert zero[0] == pytest.approx(0.001 * 0.2)


def test_a_dumped_config_resolves_to_itself():
    cfg = resolved(*WARMUP)
    again = load_config(None)
    again.merge_from_other_cfg(cfg.load_cfg(cfg.dump()))
    scale_config(again, 64, 1)
    for section in ("SOLVER", "MEGDET"):  # tuples are lists in a dump
        assert json.dumps(again[section]) == json.dumps(cfg[section])
    again.MEGDET.BATCH_WARMUP = ()
    scale_config(again, 64, 1)
    assert again.MEGDET.RESOLVED.PHASES == () and again.SOLVER.MAX_ITER == 16


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        (("MEGDET.BATCH_WARMUP", ((1, 4), (2, 16))), "begin with epoch 0, and end with .*, 16"),
        (("MEGDET.BATCH_WARMUP", ((0, 4), (2, 8))), "begin with epoch 0, and end with .*, 16"),
        (("MEGDET.BATCH_WARMUP", ((0, 8), (1, 4), (2, 16))), "mini-batches have to grow"),
        (("MEGDET.BATCH_WARMUP", ((0, 6), (2, 16))), "6 has to divide .* Valid .*: 2, 4, 8, 16"),
        (("MEGDET.BATCH_WARMUP", ((0, 1), (2, 16))), "1 has to divide .* of the 2 images"),
        (("MEGDET.BATCH_WARMUP", ((0, 4), (0.1, 16))), r"epochs have to grow.*iterations \[0, 0\]"),
        (("MEGDET.BATCH_WARMUP", ((0, 4), (4, 16))), "at iteration 64, and training ends at 64"),
        (("MEGDET.BATCH_WARMUP", (0, 4)), r"give pairs \(epoch, mini-batch\)"),
        (("MEGDET.BATCH_WARMUP", ((0, 2.0), (1, 4))), "whole mini-batches"),
        (("MEGDET.BATCH_WARMUP", (("0", 2), (1, 4))), r"give pairs \(epoch, mini-batch\)"),
        (("MEGDET.BATCH_WARMUP", ((0, 2), (float("nan"), 4))), "give pairs"),
        ((*WARMUP, "MEGDET.POLICY", ""), "does not work with MEGDET.POLICY ''"),
        ((*WARMUP, "MEGDET.AUTO_MICRO_BATCH", True), "with MEGDET.AUTO_MICRO_BATCH True"),
        ((*WARMUP, "MEGDET.EMA_DECAY", 0.9), "with MEGDET.EMA_DECAY 0.9"),
        ((*WARMUP, "MEGDET.ON_DIVERGENCE", "half_lr"), "with MEGDET.ON_DIVERGENCE 'half_lr'"),
    ],
)
def test_what_cannot_work_is_refused(opts, match):
    with pytest.raises(ValueError, match=f"MEGDET.BATCH_WARMUP.*{match}"):
        resolved(*opts)


def test_phases_start_at_whole_updates_of_the_last_mini_batch():
    # An epoch of 70 images is 4.375 updates of 16: the second phase starts after 4, at image 64.
    phases = make_phases(((0, 4), (1, 16)), 16, 70, 2)
    assert phases == Phases((0, 16), (4, 16))
