"""Equations 2 to 4: the variance of the gradient against the mini-batch, and what follows from it.

With g_N the gradient of a mini-batch of N images, G = E g_N, and Var the trace of the covariance:

* Var(g_N) = σ² / N (Eq. 2, 3), a slope of -1 in log Var against log N;
* Var(r Σ_k g_N) = k r² Var(g_N) = r̂² Var(g_kN) with r̂ = k r (Eq. 4);
* the gradient noise scale N Var(g_N) / |G|² (McCandlish et al., 2018): about the mini-batch beyond
  which more images buy little, the critical batch.

Everything is estimated from pairs of independent mini-batches (a, b): E ½|a - b|² = Var(g_N) and
E a·b = |G|², without bias at any number of pairs, and holding two gradients at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from megdet_d2.engine.hooks import is_due

WHOLE = "all"


def module_of(parameter_name: str) -> str:
    """The part of a detector that a parameter belongs to: "res4", "fpn", "proposal_generator"."""
    parts = parameter_name.split(".")
    if parts[0] != "backbone":
        return parts[0]
    if parts[1] == "bottom_up":
        return parts[2]
    return "fpn" if parts[1].startswith("fpn") else parts[1]


def gradient(model: nn.Module, images: Sequence[dict[str, Any]], bn_size: int) -> dict[str, Tensor]:
    """g_N of the model's loss, by parameter name, float32, zero where no loss reaches.

    Args:
        images: N, as Detectron2's training loader gives them.
        bn_size: images of a forward, which CGBN layers on one process normalise over: the mean over
            such micro-batches is what groups of this size come to.
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
    """For each module, and ``WHOLE``: (½|a - b|², a·b), which estimate Var(g_N) and |G|²."""
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
    """Yields (N, ``compare``'s sums) for so many pairs of every size, each of images of its own.

    The model is in training mode and its weights stay as they are; running statistics of its norms
    move. Sampling of anchors and proposals is part of the noise.
    """
    stream = iter(images)
    model.train()
    with EventStorage():  # where Detectron2's models write their scalars
        for _ in range(pairs):
            for size in sizes:
                a, b = (
                    gradient(model, [next(stream) for _ in range(size)], bn_size) for _ in range(2)
                )
                yield size, compare(a, b)


@dataclass(frozen=True)
class Fit:
    """What the pairs of one module say; intervals are of 95 %, from resampling pairs.

    Attributes:
        variances: Var(g_N), by N.
        errors: their standard errors.
        slope, interval: of log Var(g_N) against log N; the paper says -1.
        noise_scale, noise_interval: σ² / |G|² in images, by all sizes together. Infinite, or an
            interval up to infinity, where the pairs cannot tell |G|² from zero.
    """

    variances: dict[int, float]
    errors: dict[int, float]
    slope: float
    interval: tuple[float, float]
    noise_scale: float
    noise_interval: tuple[float, float]

    def update_variances(self) -> dict[int, float]:
        """r̂² Var(g_kN) / (k r² Var(g_N)) with r̂ = k r, by kN; N is the least size. Eq. 4 says 1."""
        least = min(self.variances)
        return {n: n / least * v / self.variances[least] for n, v in self.variances.items()}


def fit(pairs: dict[int, Sequence[tuple[float, float]]], resamples: int = 1000) -> Fit:
    """Fits one module's pairs.

    Args:
        pairs: for each N the (½|a - b|², a·b) of its pairs; two sizes and two pairs or more.

    Raises:
        ValueError: fewer; a gradient without any variance.
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
    slopes, scales = (np.array(values) for values in zip(*draws, strict=True))
    # Nearest, since an infinite scale cannot be interpolated.
    ends = {"q": (2.5, 97.5), "method": "nearest"}
    return Fit(
        variances={int(n): float(d[:, 0].mean()) for n, d in zip(sizes, data, strict=True)},
        errors={
            int(n): float(d[:, 0].std(ddof=1) / len(d) ** 0.5)
            for n, d in zip(sizes, data, strict=True)
        },
        slope=slope,
        interval=tuple(map(float, np.percentile(slopes, **ends))),
        noise_scale=scale,
        noise_interval=tuple(map(float, np.percentile(scales, **ends))),
    )


def _estimate(sizes: np.ndarray, means: list[np.ndarray]) -> tuple[float, float]:
    """Slope, and noise scale, of (mean ½|a - b|², mean a·b) by size."""
    variances, squares = np.array(means).T
    slope = np.polyfit(np.log(sizes), np.log(variances), 1)[0]
    # a·b of N images has a deviation of about Var(g_N): large mini-batches know |G|² best.
    square = np.average(squares, weights=sizes**2)
    per_image = np.mean(sizes * variances)
    return float(slope), float(per_image / square) if square > 0 else float("inf")


class GradientNoise(HookBase):
    """The same while training with DDP: the processes' gradients against their mean.

    With g_i the gradient of process i's n images and ḡ the mean over W processes, Σ|g_i - ḡ|² /
    (W - 1) estimates Var(g_n), and |ḡ|² - Var(g_n) / W estimates |G|². Every ``period`` iterations
    writes the scalars gradient_noise/variance and gradient_noise/scale, in images, as means since
    then; one all-reduce of two numbers. Register it on a trainer of two processes or more, before
    training; DDP takes no other communication hook then. Where a BN group spans processes their
    gradients share its statistics, and are not independent. With a GradScaler the variance is that
    of the scaled loss's gradient; the noise scale is as without.

    Args:
        images_per_gpu: n.
        period: iterations between two reductions, as Detectron2's writers have it.
    """

    def __init__(self, images_per_gpu: int, period: int = 20):
        self._images = images_per_gpu
        self._period = period
        self._steps = 0

    def before_train(self):
        model = self.trainer.model
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("GradientNoise compares processes: train with two or more")
        # In front of the hook that writes the scalars: what comes behind it is never written.
        # What moves back by one place has been called already, so none is called twice.
        hooks = self.trainer._hooks
        hooks.remove(self)
        hooks.insert(0, self)
        # |g_i - ḡ|² of this process and |ḡ|², for each bucket and step; on the device.
        self._parts: list[Tensor] = []
        model.register_comm_hook(self, _compare_with_mean)

    def after_step(self):
        self._steps += 1
        if not is_due(self.trainer, self._period):
            return
        world_size = comm.get_world_size()
        sums = torch.stack(self._parts).sum(0)
        dist.all_reduce(sums)
        deviation, squares = (sums / self._steps).tolist()
        variance = deviation / (world_size - 1)
        square = (squares - variance) / world_size  # every process has added |ḡ|²
        scale = self._images * variance / square if square > 0 else float("inf")
        self.trainer.storage.put_scalars(
            **{"gradient_noise/variance": variance, "gradient_noise/scale": scale},
            smoothing_hint=False,
        )
        self._parts.clear()
        self._steps = 0


def _compare_with_mean(
    noise: GradientNoise, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    local = bucket.buffer().clone()  # the reduction is in place

    def compare_with(future: torch.futures.Future) -> Tensor:
        mean = future.value()
        mean = mean[0] if isinstance(mean, (list, tuple)) else mean
        deviation = (local - mean).double().square().sum()
        # A list, since gloo calls back from threads of its own.
        noise._parts.append(torch.stack([deviation, mean.double().square().sum()]))
        return mean

    return allreduce_hook(None, bucket).then(compare_with)
