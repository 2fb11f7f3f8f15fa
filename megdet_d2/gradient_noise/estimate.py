"""Estimates the variance of the gradient against the mini-batch, and the noise scale, from pairs.

With g_N the gradient of a mini-batch of N images, G = E g_N, and Var the trace of the covariance:

* Var(g_N) = σ² / N (Equations 2 and 3), a slope of -1 in log Var against log N;
* Var(r Σ_k g_N) = k r² Var(g_N) = r̂² Var(g_kN) with r̂ = k r (Equation 4);
* N Var(g_N) / |G|² is the gradient noise scale (McCandlish et al., 2018). It approximates the
  critical mini-batch: beyond it, more images bring little.

All estimates come from pairs of independent mini-batches (a, b), because E ½|a - b|² = Var(g_N) and
E a·b = |G|². They have no bias, even from few pairs, and need only two gradients in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from megdet_d2._moved import renamed

__getattr__ = renamed(__name__, GradientNoise="megdet_d2.gradient_noise.hook.GradientNoise")

WHOLE = "all"
"""The module name under which ``compare`` returns the sums over the whole model."""


def module_of(parameter_name: str) -> str:
    """Returns the part of a detector with this parameter, such as "res4", "fpn" or "roi_heads"."""
    parts = parameter_name.split(".")
    if parts[0] != "backbone":
        return parts[0]
    if parts[1] == "bottom_up":
        return parts[2]
    return "fpn" if parts[1].startswith("fpn") else parts[1]


def gradient(model: nn.Module, images: Sequence[dict[str, Any]], bn_size: int) -> dict[str, Tensor]:
    """Returns g_N, the gradient of the model's loss, by parameter name, in the parameters' dtype.

    It is zero where a parameter does not contribute to the loss.

    Args:
        images: N images as dicts of Detectron2's training loader.
        bn_size: images per forward pass, which are the group of a CGBN layer on one process. The
            gradient is the mean over these micro-batches.
    """
    model.zero_grad(set_to_none=True)
    for start in range(0, len(images), bn_size):
        part = images[start : start + bn_size]
        loss = sum(model(part).values()) * (len(part) / len(images))
        loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Returns (½|a - b|², a·b) for each module and for ``WHOLE``.

    They estimate Var(g_N) and |G|².

    Args:
        a, b: gradients of two mini-batches of N images, by parameter name.
    """
    sums: dict[str, tuple[float, float]] = {}
    for name in a:
        x, y = a[name].double(), b[name].double()
        pair = (0.5 * (x - y).square().sum().item(), (x * y).sum().item())
        for key in (module_of(name), WHOLE):
            variance, square = sums.get(key, (0.0, 0.0))
            sums[key] = (variance + pair[0], square + pair[1])
    return sums


def measure_pairs(
    model: nn.Module,
    images: Iterable[dict[str, Any]],
    sizes: Sequence[int],
    pairs: int,
    bn_size: int,
) -> Iterator[tuple[int, dict[str, tuple[float, float]]]]:
    """Yields N and the sums of ``compare``, for ``pairs`` pairs of each size N.

    Each mini-batch takes new images. The model is in training mode. Its weights do not change, but
    the running statistics of its norms do. The random choice of anchors and proposals is part of
    the noise.

    Args:
        images: as many as all pairs need.
        bn_size: images per forward pass, see ``gradient``.
    """
    stream = iter(images)
    model.train()
    with EventStorage():  # Detectron2's models write scalars into it
        for _ in range(pairs):
            for size in sizes:
                a, b = (
                    gradient(model, [next(stream) for _ in range(size)], bn_size) for _ in range(2)
                )
                yield size, compare(a, b)


@dataclass(frozen=True)
class Fit:
    """The estimates from the pairs of one module, with 95 % intervals from resampled pairs.

    Attributes:
        variances: Var(g_N), by N.
        errors: their standard errors.
        slope, interval: slope of log Var(g_N) against log N; -1 in the paper.
        noise_scale, noise_interval: σ² / |G|² in images, from all sizes together. The scale, or the
            end of the interval, is infinite if the pairs cannot distinguish |G|² from zero.
    """

    variances: dict[int, float]
    errors: dict[int, float]
    slope: float
    interval: tuple[float, float]
    noise_scale: float
    noise_interval: tuple[float, float]

    def update_variances(self) -> dict[int, float]:
        """Returns r̂² Var(g_kN) / (k r² Var(g_N)) with r̂ = k r, by kN; 1 by Equation 4.

        N is the smallest size.
        """
        least = min(self.variances)
        return {n: n / least * v / self.variances[least] for n, v in self.variances.items()}


def fit(pairs: Mapping[int, Sequence[tuple[float, float]]], resamples: int = 1000) -> Fit:
    """Returns the estimates from the pairs of one module.

    Args:
        pairs: for each N the (½|a - b|², a·b) of its pairs.
        resamples: number of bootstrap draws for the intervals.

    Raises:
        ValueError: there are fewer than two sizes or two pairs of a size, or a gradient is the
            same for different mini-batches.
    """
    if len(pairs) < 2 or min(map(len, pairs.values())) < 2:
        raise ValueError("a slope and its interval take two sizes or more, and two pairs of each")
    sizes = np.array(sorted(pairs))
    data = [np.array(pairs[n]) for n in sizes]
    if any(not (d[:, 0] > 0).all() for d in data):
        raise ValueError("a gradient is the same for different mini-batches: nothing to fit")
    rng = np.random.default_rng(0)
    slope, scale = _estimate(sizes, [d.mean(0) for d in data])
    draws = [
        _estimate(sizes, [d[rng.integers(len(d), size=len(d))].mean(0) for d in data])
        for _ in range(resamples)
    ]
    slopes, scales = zip(*draws, strict=True)
    return Fit(
        variances={int(n): float(d[:, 0].mean()) for n, d in zip(sizes, data, strict=True)},
        errors={
            int(n): float(d[:, 0].std(ddof=1) / len(d) ** 0.5)
            for n, d in zip(sizes, data, strict=True)
        },
        slope=slope,
        interval=_interval(slopes),
        noise_scale=scale,
        noise_interval=_interval(scales),
    )


def _estimate(sizes: np.ndarray, means: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns slope and noise scale from (mean ½|a - b|², mean a·b) by size."""
    variances, squares = np.array(means).T
    slope = np.polyfit(np.log(sizes), np.log(variances), 1)[0]
    # The deviation of a·b is about Var(g_N), so large mini-batches estimate |G|² best.
    square = np.average(squares, weights=sizes**2)
    per_image = np.mean(sizes * variances)
    return float(slope), float(per_image / square) if square > 0 else float("inf")


def _interval(draws: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval, of values that were drawn: infinity cannot be interpolated."""
    low, high = np.percentile(draws, (2.5, 97.5), method="nearest")
    return float(low), float(high)
