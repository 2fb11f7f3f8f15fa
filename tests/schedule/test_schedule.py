"""Learning rate, warm-up and epochs against closed forms, at every iteration."""

import json
import shlex

import pytest
from detectron2 import model_zoo as d2_model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler

import megdet_d2
from megdet_d2 import load_config
from megdet_d2.engine import prepare_config
from megdet_d2.schedule.build import images_per_epoch, refuse_solver_overrides
from megdet_d2.schedule.scaling import (
    POLICIES,
    EpochPolicy,
    epochs_to_iterations,
    make_schedule,
    scale_lr,
)
from tests.helpers import training
from tests.helpers.schedules import learning_rates


def make_config(*overrides):
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_list(list(overrides))
    return cfg


def closed_form(t, base, start, warmup, milestones, values):
    rate = base * values[sum(t >= m for m in milestones)]
    return start + (rate - start) * t / warmup if t < warmup else rate


@pytest.mark.parametrize("start", ["reference", "zero"])
@pytest.mark.parametrize("policy", ["normal", "long"])
@pytest.mark.parametrize("batch", [8, 16, 64, 256])
def test_every_iteration_of_the_papers_policies(batch, policy, start):
    images = 2360  # 118,000 / 50, so that every iteration can be looked at
    cfg = make_config(
        "SOLVER.IMS_PER_BATCH", batch, "MEGDET.POLICY", policy, "MEGDET.WARMUP_START", start
    )  # fmt: skip
    megdet_d2.scale_config(cfg, num_images=images, world_size=8)
    rates = learning_rates(cfg)

    base = 0.02 * batch / 16
    first = {"reference": min(0.02, base), "zero": base / 1000}[start]
    decays = {
        "normal": [(8, 0.1), (10, 0.01)],
        "long": [(11, 0.1), (14, 0.01), (17, 0.005)],
    }[policy]
    assert len(rates) == {"normal": 11, "long": 18}[policy] * images // batch
    expected = [
        closed_form(
            t, base, first, images // batch,
            [epoch * images // batch for epoch, _ in decays], [1.0] + [v for _, v in decays],
        )
        for t in range(len(rates))
    ]  # fmt: skip
    assert rates == pytest.approx(expected, rel=1e-9)


def test_the_papers_numbers_at_256():
    cfg = make_config("SOLVER.IMS_PER_BATCH", 256, "MEGDET.POLICY", "normal")
    megdet_d2.scale_config(cfg, num_images=118000, world_size=128)
    assert cfg.SOLVER.BASE_LR == 0.32
    assert cfg.SOLVER.MAX_ITER == 5070
    assert cfg.SOLVER.STEPS == (3687, 4609)
    assert cfg.SOLVER.WARMUP_ITERS == 460
    assert cfg.SOLVER.WARMUP_FACTOR * cfg.SOLVER.BASE_LR == pytest.approx(0.02)


def test_scaling_rules():
    assert scale_lr(0.02, 16, 256) == 0.32
    assert scale_lr(0.02, 16, 2) == 0.0025
    assert scale_lr(0.02, 16, 256, "sqrt") == 0.08
    assert scale_lr(0.02, 16, 256, "none") == 0.02
    with pytest.raises(ValueError, match="SCALING_RULE is 'cubic'; use one of linear, sqrt, none"):
        scale_lr(0.02, 16, 256, "cubic")


def test_rule_and_factor_reach_the_solver():
    cfg = make_config(
        "SOLVER.IMS_PER_BATCH", 64, "MEGDET.POLICY", "normal", "MEGDET.SCALING_RULE", "sqrt",
        "MEGDET.LR_FACTOR", 0.5, "MEGDET.REFERENCE_LR", 0.01, "MEGDET.REFERENCE_BATCH_SIZE", 4,
    )  # fmt: skip
    megdet_d2.scale_config(cfg, num_images=6400, world_size=1)
    assert cfg.SOLVER.BASE_LR == 0.01 * 4 * 0.5


def test_the_variance_of_an_update_is_kept():
    """Eq. 4: r² · k · Var_N = r̂² · Var_N̂ with Var_N = σ²/N (Eq. 2 and 3)."""
    for k in (2, 4, 16):
        r, r_hat, n = 0.02, scale_lr(0.02, 16, 16 * k), 16
        assert r**2 * k * (1 / n) == pytest.approx(r_hat**2 * (1 / (k * n)))


def test_custom_policy_in_fractions_of_epochs():
    cfg = make_config(
        "SOLVER.IMS_PER_BATCH", 10, "MEGDET.POLICY", "custom", "MEGDET.EPOCHS", 2.5,
        "MEGDET.DECAY_EPOCHS", (0.5, 2), "MEGDET.DECAY_FACTORS", (0.5, 0.2),
        "MEGDET.WARMUP_EPOCHS", 0.1, "MEGDET.EPOCH_IMAGES", 1000,
    )  # fmt: skip
    megdet_d2.scale_config(cfg, num_images=77, world_size=2)  # EPOCH_IMAGES wins
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (250, (50, 200), 10)
    rates = learning_rates(cfg)
    base = 0.02 * 10 / 16
    assert rates[0] == pytest.approx(base)  # below the reference batch: min(r, r̂) is r̂
    assert rates[49:51] == pytest.approx([base, base / 2])
    assert rates[199:201] == pytest.approx([base / 2, base / 10])


def test_epochs_to_iterations_is_exact():
    assert epochs_to_iterations(0.1, 1000, 10) == 10  # 0.1 * 1000 / 10 in floats, floored, also
    assert epochs_to_iterations(0.29, 100, 1) == 29  # ... but 0.29 * 100 is 28.999999999999996
    assert epochs_to_iterations(11, 118000, 256) == 5070


@pytest.fixture
def sparse(tmp_path):
    """Of 24 images 8 have no object, and 8 no keypoint that is labelled; also as "points"."""
    coco = training.write_images(tmp_path)
    ((_, path, root),) = coco
    with open(path) as file:
        content = json.load(file)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 8]
    for annotation in content["annotations"]:
        labelled = annotation["image_id"] > 16
        annotation |= {"keypoints": [8, 9, 2] if labelled else [0] * 3, "num_keypoints": labelled}
    with open(path, "w") as file:
        json.dump(content, file)
    metadata = {"keypoint_names": ["tip"], "keypoint_flip_map": []}
    register_coco_instances("points", metadata, path, root)
    yield coco
    DatasetCatalog.pop("points")
    MetadataCatalog.pop("points")


@pytest.mark.parametrize(
    "overrides, images",
    [
        ((), 16),
        (("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False), 24),
        (("DATASETS.TRAIN", ("points",), "MODEL.KEYPOINT_ON", True), 8),
        (("DATASETS.TRAIN", ("points",)), 16),
    ],
)
def test_an_epoch_is_of_the_images_that_detectron2_trains_on(sparse, tmp_path, overrides, images):
    coco = [] if "DATASETS.TRAIN" in overrides else sparse
    cfg = training.config(tmp_path / "out", coco, *overrides)
    prepare_config(cfg)
    assert cfg.SOLVER.MAX_ITER == 2 * images // 8  # MEGDET.EPOCHS, SOLVER.IMS_PER_BATCH


def test_no_warmup():
    cfg = make_config("MEGDET.POLICY", "normal", "MEGDET.WARMUP_EPOCHS", 0.0)
    megdet_d2.scale_config(cfg, num_images=160, world_size=1)
    assert learning_rates(cfg)[0] == pytest.approx(0.02)


def test_without_a_policy_it_is_detectron2s_own():
    cfg = make_config("SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (40,), "SOLVER.WARMUP_ITERS", 20)
    before = cfg.dump()
    assert megdet_d2.scale_config(cfg, num_images=5, world_size=4) == ""
    assert cfg.dump() == before
    assert learning_rates(cfg) == learning_rates(cfg, d2_build_lr_scheduler)
    stock = get_cfg()  # never met the plugin
    stock.merge_from_list(["SOLVER.MAX_ITER", 60, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    assert learning_rates(stock) == learning_rates(stock, d2_build_lr_scheduler)


def test_scaling_again_and_loading_the_dump_change_nothing(tmp_path):
    cfg = make_config("SOLVER.IMS_PER_BATCH", 48, "MEGDET.POLICY", "long")
    megdet_d2.scale_config(cfg, num_images=5000, world_size=2)
    dump = cfg.dump()
    megdet_d2.scale_config(cfg, num_images=5000, world_size=2)
    assert cfg.dump() == dump

    path = tmp_path / "config.yaml"
    path.write_text(dump)
    again = make_config()
    again.merge_from_file(str(path))
    loaded = again.dump()
    megdet_d2.scale_config(again, num_images=5000, world_size=2)
    assert again.dump() == loaded
    assert again.SOLVER == cfg.SOLVER and again.MEGDET == cfg.MEGDET

    # an edit of the dump is an override like any other
    path.write_text(
        dump.replace("SOLVER:", "SOLVER:\n  STEPS: [1, 2]").replace(
            "\n  STEPS:\n  - 1145\n  - 1458\n  - 1770", ""
        )
    )
    edited = make_config()
    edited.merge_from_file(str(path))
    with pytest.raises(ValueError, match="SOLVER.STEPS"):
        megdet_d2.scale_config(edited, num_images=5000, world_size=2)

    defaulted = make_config()
    path.write_text(dump)
    defaulted.merge_from_file(str(path))
    defaulted.SOLVER.MAX_ITER = 40000
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER is 40000"):
        megdet_d2.scale_config(defaulted, num_images=5000, world_size=2)

    # and the dump with another batch is resolved anew, not mistaken for an override
    again.merge_from_list(["SOLVER.IMS_PER_BATCH", 96])
    megdet_d2.scale_config(again, num_images=5000, world_size=2)
    assert again.SOLVER.BASE_LR == pytest.approx(2 * cfg.SOLVER.BASE_LR)


def test_the_table_says_what_changed_and_why():
    cfg = make_config("SOLVER.IMS_PER_BATCH", 256, "MEGDET.POLICY", "normal")
    table = megdet_d2.scale_config(cfg, num_images=118000, world_size=128)
    rows = {
        cells[0].strip(): [c.strip() for c in cells[1:]]
        for cells in (line.strip("|").split("|") for line in table.splitlines())
    }
    assert rows["SOLVER.BASE_LR"][:2] == ["0.001", "0.32"] and "0.02 x 16" in table
    assert rows["SOLVER.MAX_ITER"][:2] == ["40000", "5070"]
    assert "11 epochs x 118000 images / 256" in table


@pytest.mark.parametrize(
    "override, instead",
    [
        (("SOLVER.BASE_LR", 0.1), "MEGDET.REFERENCE_LR"),
        (("SOLVER.MAX_ITER", 90000), "MEGDET.EPOCHS"),
        (("SOLVER.STEPS", (1, 2)), "MEGDET.DECAY_EPOCHS"),
        (("SOLVER.WARMUP_ITERS", 5), "MEGDET.WARMUP_EPOCHS"),
        (("SOLVER.WARMUP_FACTOR", 0.1), "MEGDET.WARMUP_START"),
        (("SOLVER.WARMUP_METHOD", "constant"), "the warm-up is linear"),
        (("SOLVER.GAMMA", 0.5), "MEGDET.DECAY_FACTORS"),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"), 'MEGDET.POLICY ""'),
        (("SOLVER.REFERENCE_WORLD_SIZE", 8), "scales by images"),
    ],
)
def test_an_override_that_the_policy_would_lose_is_refused(override, instead):
    cfg = make_config("MEGDET.POLICY", "normal", *override)
    with pytest.raises(ValueError) as error:
        megdet_d2.scale_config(cfg, num_images=1000, world_size=1)
    for part in (override[0], str(override[1]), instead):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("SOLVER.IMS_PER_BATCH", 30), "IMS_PER_BATCH is 30, .* 8 processes .* work: 24 and 32"),
        (("SOLVER.IMS_PER_BATCH", 6), "IMS_PER_BATCH is 6, .* nearest that work: 8"),
        (("MEGDET.POLICY", "short"), "POLICY is 'short'; use normal, long, custom"),
        (("MEGDET.POLICY", "custom"), "set MEGDET.EPOCHS"),
        (("MEGDET.EPOCHS", 5), "MEGDET.EPOCHS is 5, but MEGDET.POLICY 'normal' has its own"),
        (
            ("MEGDET.WARMUP_EPOCHS", 9.0),
            "WARMUP_EPOCHS is 9.0, 562 iterations; .* less than the 500",
        ),
        (
            ("MEGDET.WARMUP_EPOCHS", 8.0),
            "WARMUP_EPOCHS is 8.0, 500 iterations; .* less than the 500",
        ),
        (("MEGDET.WARMUP_EPOCHS", -1.0), "WARMUP_EPOCHS is -1.0"),
        (("MEGDET.WARMUP_START", "half"), "WARMUP_START is 'half'; use one of reference, zero"),
        (("MEGDET.LR_FACTOR", 0.0), "LR_FACTOR is 0.0; it has to be above 0"),
        (("MEGDET.SCALING_RULE", "cubic"), "SCALING_RULE is 'cubic'"),
        (("SOLVER.IMS_PER_BATCH", 4096), "come down to iterations .* lower SOLVER.IMS_PER_BATCH"),
    ],
)
def test_bad_values_are_errors_that_say_what_works(overrides, message):
    cfg = make_config("MEGDET.POLICY", "normal")
    cfg.merge_from_list(list(overrides))
    with pytest.raises(ValueError, match=message):
        megdet_d2.scale_config(cfg, num_images=1000, world_size=8)


@pytest.mark.parametrize(
    "policy, message",
    [
        ((10, (8, 6), (0.1, 0.1)), r"DECAY_EPOCHS is \(8, 6\).*\(6, 8\) would do"),
        ((10, (8, 12), (0.1, 0.1)), r"\(8,\) would do"),
        ((10, (5,), (0.1, 0.1)), "DECAY_EPOCHS has 1 entries, MEGDET.DECAY_FACTORS 2"),
        ((0, (), ()), "EPOCHS is 0"),
        (("ten", (), ()), "EPOCHS is 'ten'; give a number"),
        ((10, (5,), (-0.1,)), "factors are above 0"),
        ((10, (5, 8), (0.1, 10)), r"DECAY_FACTORS is \(0.1, 10\).* 0.1 divides it by 10"),
    ],
)
def test_policies_that_make_no_schedule(policy, message):
    with pytest.raises(ValueError, match=message):
        EpochPolicy(*policy)


def test_a_policy_on_an_existing_config():
    """All keys in one error, whose words make the config valid when they are typed."""
    stock = d2_model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")
    opts = ["MEGDET.POLICY", "normal", "SOLVER.GAMMA", "0.2"]
    refuse_solver_overrides(load_config(stock, opts[2:]))  # no policy: none of our business
    with pytest.raises(ValueError, match="POLICY 'normal' decides the schedule") as error:
        refuse_solver_overrides(load_config(stock, opts))
    for words in (
        "SOLVER.BASE_LR is 0.02", "SOLVER.MAX_ITER is 270000", "SOLVER.STEPS is (210000, 250000)",
        "SOLVER.GAMMA is 0.2", "in place of BASE_LR, MEGDET.REFERENCE_LR",
    ):  # fmt: skip
        assert words in str(error.value)
    typed = shlex.split(str(error.value).partition("on the command line: ")[2])
    assert len(typed) == 8
    cfg = load_config(stock, [*opts, *typed])
    table = megdet_d2.scale_config(cfg, num_images=118000, world_size=1)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.02, 81125) and "0.001" in table
    # The dumped config too, with the values that the policy has written, or the defaults again.
    again = load_config(stock, [*opts, *typed])
    again.merge_from_other_cfg(cfg)
    for overrides in ([], typed, ["SOLVER.MAX_ITER", "81125"]):
        again.merge_from_list(overrides)
        megdet_d2.scale_config(again, num_images=118000, world_size=1)
        assert again.SOLVER.MAX_ITER == 81125
    again.SOLVER.MAX_ITER = 90000
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER is 90000, but"):
        refuse_solver_overrides(again)


def test_stock_scaling_by_workers_is_left_to_detectron2():
    cfg = make_config("SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8)
    assert megdet_d2.scale_config(cfg, num_images=100, world_size=3) == ""


def test_building_before_scaling_is_an_error():
    cfg = make_config("MEGDET.POLICY", "normal")
    with pytest.raises(ValueError, match=r"call megdet_d2.scale_config\(cfg\)"):
        learning_rates(cfg)


def test_pure_arithmetic_agrees_with_the_config_path():
    schedule = make_schedule(POLICIES["long"], 128, 118000)
    assert schedule.base_lr == 0.16
    assert schedule.values == pytest.approx((1, 0.1, 0.01, 0.005))
    assert schedule.max_iter == 18 * 118000 // 128


def test_add_config_twice_and_defaults():
    cfg = make_config("MEGDET.POLICY", "long")
    megdet_d2.add_megdet_config(cfg)
    assert cfg.MEGDET.POLICY == "long"
    assert isinstance(make_config().MODEL.CGBN, CfgNode)


def test_epochs_of_a_policy_without_a_count_of_images():
    cfg = make_config()
    assert images_per_epoch(cfg) is None
    cfg.MEGDET.POLICY = "normal"
    megdet_d2.scale_config(cfg, num_images=1600, world_size=1)
    assert images_per_epoch(cfg) == 1600
