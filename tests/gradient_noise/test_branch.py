"""Tests the critical batch by branches: its arithmetic, a branch by hand, and the command."""

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage

import megdet_cli.variance
from megdet_cli import main
from megdet_d2.data.stream import seed_cpu, step_seed
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.gradient_noise.branch import (
    BranchTrainer,
    Start,
    loss_points,
    train_branch,
)
from megdet_d2.gradient_noise.branch_command import make_constant
from megdet_d2.gradient_noise.branch_tables import describe_critical, to_branch_table
from megdet_d2.gradient_noise.critical_batch import Branch, compare_branches, find_critical
from megdet_d2.gradient_noise.fixed_loss import FixedLoss
from megdet_d2.schedule.scaling import SCALING_RULES
from tests.helpers import training
from tests.helpers.paths import TINY

BATCH = 4


def branches_of(losses, rule="linear"):
    """Returns a branch for each factor and each of its losses, whose seeds count from 0."""
    return [
        Branch(
            factor, "" if factor == 1 else rule, seed, 8 * factor, 0.1 * factor, 16 // factor,
            () if loss is None else (loss - 0.25, loss + 0.25), "nan" if loss is None else "",
        )
        for factor, of_factor in losses.items()
        for seed, loss in enumerate(of_factor)
    ]  # fmt: skip


def test_differences_are_paired_by_seed_with_a_t_interval():
    compared = compare_branches(branches_of({1: [1.0, 2.0], 4: [1.01, 2.06]}), "linear")
    assert [c.factor for c in compared] == [1, 4]
    assert (compared[0].difference, compared[0].low) == (0, 0)
    assert compared[1].loss == pytest.approx(1.535)
    assert compared[1].difference == pytest.approx(0.02)
    # t of one degree of freedom is 12.706; the deviation is 0.01 √2.
    assert compared[1].high - compared[1].difference == pytest.approx(12.706 * 0.01, rel=1e-4)


def test_critical_is_the_largest_up_to_which_none_is_worse():
    losses = {1: [1.0], 2: [0.9], 4: [1.01], 8: [1.03], 16: [1.0]}
    compared = compare_branches(branches_of(losses), "linear")
    assert find_critical(compared, 0.02) == (32, True)  # 16 is not worse, above 8 which is
    assert find_critical(compared, 0.0) == (16, True)
    assert describe_critical(compared, 0.02) == "32"
    assert describe_critical(compared, 0.03 + 1e-9) == "at least 128"


def test_other_rules_share_the_branch_of_factor_one():
    both = branches_of({1: [1.0], 2: [1.5]}) + branches_of({2: [1.0]}, "sqrt")
    assert compare_branches(both, "linear")[1].difference == pytest.approx(0.5)
    assert compare_branches(both, "sqrt")[1].difference == pytest.approx(0)


def test_a_diverged_branch_is_worse_and_says_so():
    compared = compare_branches(branches_of({1: [1.0, 1.0], 2: [1.0, None]}), "linear")
    assert find_critical(compared, 0.5) == (8, True)
    row = to_branch_table(compared, 0.5).splitlines()[-1]
    assert "diverged" in row and "| yes" in row
    with pytest.raises(ValueError, match="factor 1 and seed 0 .* nan; give an earlier"):
        compare_branches(branches_of({1: [None], 2: [1.0]}), "linear")


def test_the_table_says_what_chance_could_change():
    losses = {1: [1.0, 1.0, 1.0], 2: [1.05, 1.0, 0.98], 4: [1.2, 1.21, 1.19]}
    rows = to_branch_table(compare_branches(branches_of(losses), "linear"), 0.02).splitlines()
    assert "no, within chance" in rows[3] and "yes" in rows[4] and "chance" not in rows[4]


def test_points_are_in_the_second_half_and_at_the_end():
    assert loss_points(16, 4) == [10, 12, 14, 16]
    assert loss_points(2, 1) == [2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains 3 updates of two micro-batches; returns the data sets and the folder."""
    folder = tmp_path_factory.mktemp("run")
    images = folder / "images"
    images.mkdir()
    coco = training.write_images(images, images=16, shape=(32, 48))
    training.train(0, folder / "output", coco, overrides())
    return coco, folder / "output"


def overrides():
    return (
        "SOLVER.IMS_PER_BATCH", BATCH, "MEGDET.ACCUMULATION_STEPS", 2, "MEGDET.EPOCHS", 0.75,
        "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (), "MEGDET.WARMUP_EPOCHS", 0.0,
        "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 32,
    )  # fmt: skip


def branch_config(run, output):
    coco, _ = run
    cfg = training.config(output, coco, *overrides())
    make_constant(cfg, micro_batch=2)
    prepare_config(cfg)
    return cfg


def train_by_hand(cfg, start, factor, seed, updates):
    """Returns the weights after updates of plain torch, from the checkpoint's file."""
    state = torch.load(start.path, weights_only=True)
    cfg = cfg.clone()
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = seed, factor * BATCH
    cfg.MEGDET.ACCUMULATION_STEPS *= factor
    model = Trainer.build_model(cfg)
    model.load_state_dict(state["model"])
    model.train()
    optimizer = Trainer.build_optimizer(cfg, model)
    optimizer.load_state_dict(state["trainer"]["_trainer"]["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] *= factor
    batches = iter(Trainer.build_train_loader(cfg))
    micro_batches = factor * BATCH // 2
    for update in range(updates):
        images = [next(batches) for _ in range(micro_batches)]
        seed_cpu(step_seed(seed, update * factor * BATCH, 0))
        optimizer.zero_grad()
        with EventStorage():
            for batch in images:
                (sum(model(batch).values()) / micro_batches).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("factor", [1, 2])
def test_a_branch_is_what_torch_makes_of_the_checkpoint(run, tmp_path, factor):
    cfg = branch_config(run, tmp_path)
    start, weights = Start(run[1] / "model_0000001.pth", BATCH), []

    def look(model):
        weights.append(copy.deepcopy(model.state_dict()))
        return 1.0

    for name in ("a", "b"):  # the second shows that the first has not changed the start
        branch = train_branch(
            cfg, start, factor, "linear", 5, 2 * factor * BATCH, 1, look, tmp_path / name
        )
    assert branch.iterations == 2 and branch.losses == (1.0,)
    assert branch.batch_size == factor * BATCH
    assert branch.lr == pytest.approx(factor * start.lr) and start.lr > 0
    expected = train_by_hand(cfg, start, factor, 5, 2)
    for found in weights:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert not list(tmp_path.glob("*/*.pth"))


def test_branches_of_a_seed_see_the_same_images_in_micro_batches_of_one_size(
    run, tmp_path, monkeypatch
):
    cfg, seen = branch_config(run, tmp_path), []
    stock = GeneralizedRCNN.forward

    def forward(self, images):
        seen.append([(i["image_id"], i["image"].sum().item()) for i in images])
        return stock(self, images)

    monkeypatch.setattr(GeneralizedRCNN, "forward", forward)
    start, by_factor = Start(run[1] / "model_0000001.pth", BATCH), {}
    for factor in (1, 2):
        seen.clear()
        train_branch(cfg, start, factor, "sqrt", 3, 16, 1, lambda _: 1.0, tmp_path / str(factor))
        by_factor[factor] = list(seen)
    assert by_factor[1] == by_factor[2] and {len(batch) for batch in by_factor[1]} == {2}


def test_the_fixed_loss_changes_nothing_and_does_not_depend_on_random_numbers(run, tmp_path):
    cfg = branch_config(run, tmp_path)
    model = Trainer.build_model(cfg).train()
    before, loss = copy.deepcopy(model.state_dict()), FixedLoss(cfg, 7, 2)
    assert loss.images == 6 and "not held out" in loss.source
    torch.manual_seed(1)
    first, drawn = loss(model), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    np.random.seed(9)
    assert loss(model) == first > 0
    assert not training.differing(training.digests(before), training.digests(model.state_dict()))
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert FixedLoss(cfg, 4, 4).source == "4 images of mixed (held out)"
    with pytest.raises(ValueError, match=r"DATASETS.TEST .*--loss-images is 1.* smaller --images"):
        FixedLoss(cfg, 1, 2)
    with torch.no_grad():
        model.proposal_generator.rpn_head.conv.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        loss(model)


def line(run, output, *words):
    coco, folder = run
    checkpoint = str(folder / "model_0000000.pth")
    keys = ["DATASETS.COCO", repr(coco), "DATASETS.TRAIN", "('mixed',)", "DATASETS.TEST", "()"]
    keys += ["MODEL.ROI_HEADS.NUM_CLASSES", "1", *map(str, overrides())]
    flags = ["--branch", "--checkpoints", checkpoint, "--factors", "1,2"]
    flags += ["--images", "16", "--points", "1", "--seeds", "1", "--rules", "linear,sqrt"]
    flags += ["--sizes", "1,2", "--pairs", "2", "--loss-images", "4", "--output", str(output)]
    return ["variance", TINY, *flags, *words, *keys]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_command_measures_and_does_not_repeat(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the other measurement of the command has a plot")
    trained, stock, before = [], BranchTrainer.train, files(run[1])

    def train(self):
        trained.append(Path(self.cfg.OUTPUT_DIR).name)
        return stock(self)

    monkeypatch.setattr(BranchTrainer, "train", train)
    main(line(run, tmp_path))
    assert files(run[1]) == before and not list(tmp_path.rglob("*.pth"))
    assert trained == ["k1_seed1", "k2_linear_seed1", "k2_sqrt_seed1"]
    out = capsys.readouterr().out
    assert "Conv2d(" not in out and "Conv2d(" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "branches.md").read_text().strip() in out
    for part in (
        "noise scale",
        "critical batch, linear",
        "critical batch, sqrt",
        "| model_0000000",
    ):
        assert part in out
    with open(tmp_path / "branches.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {row["batch_size"] for row in rows} == {"4", "8"}
    assert {row["checkpoint"] for row in rows} == {"model_0000000.pth"}
    (first,) = json.loads((tmp_path / "branches.json").read_text())
    assert first["images_seen"] == BATCH and first["critical_batch"].keys() == {"linear", "sqrt"}
    ratios = {b["rule"]: b["lr"] / first["lr"] for b in first["branches"]}
    assert ratios == pytest.approx({"": 1, "linear": 2, "sqrt": 2**0.5})

    # A branch that was stopped has metrics and no result.
    trained.clear()
    (tmp_path / "branches/model_0000000/k2_sqrt_seed1/branch.json").unlink()
    main(line(run, tmp_path))
    assert trained == ["k2_sqrt_seed1"]
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit, match=r"another setting: images was 16 and is 32; give another"):
        main(line(run, tmp_path, "--images", "32"))


def test_branches_of_agvm_go_on_from_its_factors_and_measure(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    coco = training.write_images(images, images=16, shape=(32, 48))
    keys = ("MEGDET.OPTIMIZER", "agvm", "MEGDET.AGVM.INTERVAL", 1, "MEGDET.AGVM.SMOOTHING", 0.5)
    output = tmp_path / "trained"
    training.train(0, output, coco, (*overrides(), *keys, "MEGDET.AGVM.AFTER_WARMUP", 0))
    loaded = torch.load(output / "model_0000000.pth", weights_only=True)["trainer"]["_trainer"]
    before = {g["module"]: g["lr_factor"] for g in loaded["optimizer"]["param_groups"]}
    argv = [*line((coco, output), tmp_path / "out", "--rules", "linear"), *map(str, keys)]
    main(argv)
    for name in ("k1_seed1", "k2_linear_seed1"):
        rows = (tmp_path / f"out/branches/model_0000000/{name}/metrics.json").read_text()
        assert json.loads(rows.splitlines()[-1])["agvm/fpn"] not in (1.0, before["fpn"])
    with pytest.raises(SystemExit, match="has its 4 images in one forward pass; give --images-per"):
        main([*argv[:2], "--images-per-forward", "4", *argv[2:]])


def test_a_diverged_branch_is_a_result(run, tmp_path):
    cfg = branch_config(run, tmp_path)
    start = Start(run[1] / "model_0000001.pth", BATCH)
    start._inner["optimizer"]["param_groups"][0]["lr"] = 1e30
    branch = train_branch(cfg, start, 1, "none", 1, 8, 1, FixedLoss(cfg, 4, 2), tmp_path / "b")
    assert branch.reason and branch.loss == math.inf


def test_the_rules_are_those_of_the_schedule():
    assert megdet_cli.variance.RULES == SCALING_RULES


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--factors", "2,4"], r"--factors is \[2, 4\]; give 1"),
        (["--factors", "1,2,2"], r"--factors is \[1, 2, 2\]; give each value once"),
        (["--rules", "cubic"], "--rules has cubic; use any of linear, sqrt, none"),
        (["--images", "24"], "--images is 24; give a multiple of 16 such as 32"),
        (["--tolerance", "-1"], "--tolerance is -1.0; give 0 or more"),
        (["--points", "0"], "--points is 0; give 1 or more"),
        (["--seeds", "-1"], r"--seeds is \[-1\]; give 0 or more"),
        (["--images-per-forward", "3"], "IMS_PER_BATCH is 4, which forward passes of 3"),
        (["--checkpoints", "none.pth"], "there is no file none.pth; correct the path"),
        (["--checkpoints", "a/m.pth,b/m.pth"], "names have to differ"),
    ],
)
def test_flags_are_refused(run, tmp_path, words, match):
    with pytest.raises(SystemExit, match=match):
        main(line(run, tmp_path / "new", *words))
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_no_branch_can_go_on_from_is_refused(run, tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth has no optimizer .* model_0000999.pth"):
        Start(tmp_path / "weights.pth", BATCH)
    with pytest.raises(ValueError, match=r"mini-batches of 4, and SOLVER.IMS_PER_BATCH is 8"):
        Start(run[1] / "model_0000001.pth", 8)
    start, cfg = Start(run[1] / "model_0000001.pth", BATCH), branch_config(run, tmp_path)
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.3  # another group of parameters
    with pytest.raises(ValueError, match="model_0000001.pth: its optimizer does not fit"):
        train_branch(cfg, start, 1, "none", 1, 8, 1, lambda _: 1.0, tmp_path / "b")


def test_flags_of_branches_alone_are_refused():
    with pytest.raises(SystemExit, match="only --branch uses --images, --loss-images; give"):
        main(["variance", TINY, "--images", "8", "--loss-images", "2"])
