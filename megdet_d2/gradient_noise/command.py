"""Runs ``megdet variance``: measures Equations 2 to 4 on a config's data, at its weights."""

import argparse
import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from megdet_d2.config import load_config
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.weights_only import WeightsOnlyCheckpointer
from megdet_d2.report.style import make_figure, save_figure, tidy

from .estimate import WHOLE, Fit, fit, measure_pairs


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.variance``.

    Raises:
        FileNotFoundError, ValueError: the config or a flag is wrong, or the gradient of the whole
            model does not vary.
    """
    check_flags(args)
    cfg = load_config(args.config, args.opts)
    bn_size = cfg.MODEL.CGBN.BN_SIZE if cfg.MODEL.CGBN.BN_SIZE > 0 else max(args.sizes)
    bn_size = args.images_per_forward or bn_size
    turn_off_switches(cfg)
    cfg.MEGDET.ACCUMULATION_STEPS = 1  # N is the mini-batch
    cfg.MEGDET.OPTIMIZER, cfg.SOLVER.SGD_IMPLEMENTATION = "sgd", ""  # no weight changes
    cfg.SOLVER.AMP.ENABLED = False  # gradients are those of the parameters' dtype
    prepare_config(cfg, opts=args.opts)
    output = args.output or Path(cfg.OUTPUT_DIR) / "variance"
    output.mkdir(parents=True, exist_ok=True)
    pairs = measure(cfg, load_model(cfg), args.sizes, args.pairs, bn_size)
    _write_csv(pairs, output / "variance.csv")
    fits = fit_modules(pairs)
    plot(fits, output / "variance.png")
    text = (
        f"# {args.config}\n\nWeights: {cfg.MODEL.WEIGHTS or 'random'}. {args.pairs} pairs of mini-"
        f"batches for each N, forward in parts of up to {bn_size} images.\n\n{to_table(fits)}\n\n"
        "The critical batch is about the noise scale: far below it, a k times larger mini-batch "
        "needs k times fewer steps; far above it, nearly as many.\n\n"
        f"{to_update_table(fits[WHOLE])}\n"
    )
    (output / "variance.md").write_text(text)
    print(text)
    print(f"Table, numbers and plot: {output}/variance.md, .csv, .png")


def turn_off_switches(cfg: CfgNode) -> None:
    """Turns off the switches that do not change a gradient, and the schedule of a policy, in place.

    These keys fit the mini-batch, processes and machines of the training. Here there is one
    process, whose norms normalise over all images of a forward pass.

    Args:
        cfg: not resolved.
    """
    solver, keys = cfg.SOLVER, cfg.MEGDET
    cfg.MODEL.CGBN.BN_SIZE = -1
    keys.POLICY, keys.ON_DIVERGENCE, keys.BATCH_WARMUP = "", "stop", ()
    solver.RESCALE_INTERVAL, solver.REFERENCE_WORLD_SIZE = False, 0
    keys.AUTO_MICRO_BATCH, keys.AUTO_SUBLINEAR, keys.MEMORY_LIMIT_MB = False, False, 0
    keys.EMA_DECAY, keys.BEST_METRIC, keys.TRACKERS = 0.0, "", ()
    cfg.TEST.EVAL_PERIOD, cfg.TEST.BACKGROUND, cfg.TEST.AUG.ENABLED = 0, False, False
    cfg.TEST.PRECISE_BN.ENABLED = False


def check_flags(args: argparse.Namespace) -> None:
    """Checks the flags of a measurement of the noise scale.

    Raises:
        ValueError: one is wrong. The message names it and its value.
    """
    if args.pairs < 2 or len(set(args.sizes)) < 2 or min(args.sizes) < 1:
        raise ValueError(
            f"--pairs is {args.pairs} and --sizes {args.sizes}: an interval needs 2 pairs, a slope "
            "needs 2 different sizes, from 1"
        )
    if args.images_per_forward is not None and args.images_per_forward < 1:
        raise ValueError(f"--images-per-forward is {args.images_per_forward}; give 1 or more")


Pairs = dict[int, list[tuple[float, float]]]
"""For each N the (½|a - b|², a·b) of its pairs."""


def load_model(cfg: CfgNode) -> nn.Module:
    """Seeds all random numbers by SEED, and returns the model with the weights of MODEL.WEIGHTS.

    Args:
        cfg: prepared. With MODEL.WEIGHTS "" the model has its random initialisation.
    """
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else 0)
    model = Trainer.build_model(cfg)
    WeightsOnlyCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def measure(
    cfg: CfgNode, model: nn.Module, sizes: Sequence[int], pairs: int, bn_size: int
) -> dict[str, Pairs]:
    """Returns the pairs of each module, see ``measure_pairs``; shows a bar of the images done.

    Args:
        cfg: prepared.
        model: from ``load_model``, which also decides the images.
        sizes: mini-batches N.
        pairs: number of pairs per size.
        bn_size: images per forward pass.
    """
    # The loader gives one image at a time, so that mini-batches of all sizes come from one stream.
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH = 1
    images = itertools.chain.from_iterable(build_detection_train_loader(cfg))
    found: dict[str, Pairs] = {}
    with tqdm(total=2 * pairs * sum(sizes), unit=" images", dynamic_ncols=True) as bar:
        for size, sums in measure_pairs(model, images, sizes, pairs, bn_size):
            for module, pair in sums.items():
                found.setdefault(module, {}).setdefault(size, []).append(pair)
            bar.update(2 * size)
    return found


def fit_modules(pairs: Mapping[str, Pairs]) -> dict[str, Fit]:
    """Returns the fit of each module, that of the whole model first.

    It prints the name of a module that it leaves out, because its gradient does not vary.

    Raises:
        ValueError: the whole model cannot be fitted.
    """
    fits = {WHOLE: fit(pairs[WHOLE])}
    for module, of_module in pairs.items():
        try:
            fits[module] = fit(of_module)
        except ValueError as error:
            print(f"{module} is left out: {error}")
    return fits


def _write_csv(pairs: Mapping[str, Pairs], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("module", "images", "half_squared_difference", "dot_product"))
        for module, by_size in pairs.items():
            for size, values in by_size.items():
                writer.writerows((module, size, *value) for value in values)


def to_table(fits: Mapping[str, Fit]) -> str:
    """Returns a Markdown table of slope and noise scale per module, with 95 % intervals."""
    rows = [
        {
            "module": module,
            "slope (the paper: -1)": f"{f.slope:.3f}",
            "95 %": f"{f.interval[0]:.3f} to {f.interval[1]:.3f}",
            "noise scale, images": f"{f.noise_scale:.3g}",
            "95 % ": f"{f.noise_interval[0]:.3g} to {f.noise_interval[1]:.3g}",
        }
        for module, f in fits.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def to_update_table(whole: Fit) -> str:
    """Returns a Markdown table of Var(g_N) per mini-batch and of the variance of the update.

    The latter is relative to k steps of the smallest mini-batch (Equation 4), for three scaling
    rules of the learning rate.
    """
    linear = whole.update_variances()
    least = min(linear)
    rows = [
        {
            "N": n,
            "Var(g_N)": f"{whole.variances[n]:.4g} ± {whole.errors[n]:.1g}",
            "k": f"{n / least:g}",
            "r̂ = k r (Eq. 4: 1)": f"{ratio:.3f}",
            "r̂ = √k r": f"{ratio / (n / least):.3f}",
            "r̂ = r": f"{ratio / (n / least) ** 2:.3g}",
        }
        for n, ratio in linear.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def plot(fits: Mapping[str, Fit], path: Path) -> None:
    """Draws Var(g_N) against N with error bars and the paper's slope, and the update's variance."""
    figure = make_figure(11, 4.5)
    variance, update = figure.subplots(1, 2)
    for number, (module, f) in enumerate(fits.items()):
        sizes, values = np.array(list(f.variances)), np.array(list(f.variances.values()))
        style = {"color": f"C{number % 10}", "linewidth": 2.5 if module == WHOLE else 1}
        label = f"{module}: {f.slope:.2f}"
        variance.errorbar(sizes, values, yerr=list(f.errors.values()), label=label, **style)
        update.plot(sizes, list(f.update_variances().values()), **style)
    whole = fits[WHOLE]
    sizes = np.array(list(whole.variances))
    line = whole.variances[int(sizes[0])] * sizes[0] / sizes
    variance.plot(sizes, line, "k--", linewidth=0.8, label="Eq. 2: -1")
    update.axhline(1, color="k", linestyle="--", linewidth=0.8)
    variance.set_title("Var(g_N)", loc="left")
    update.set_title("r̂² Var(g_kN) / (k r² Var(g_N)), r̂ = k r", loc="left")
    variance.set_yscale("log")
    for axes in (variance, update):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("images N")
        tidy(axes)
    figure.legend(frameon=False, fontsize=8, title="slope", loc="outside right upper")
    update.set_ylim(bottom=0)
    save_figure(figure, path)
