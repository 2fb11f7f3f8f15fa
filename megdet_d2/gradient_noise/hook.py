"""Measures the gradient noise while training with DDP."""

from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from megdet_d2.engine.hooks import is_due


class GradientNoise(HookBase):
    """Estimates Var(g_n) and the noise scale from the gradients of the processes and their mean.

    With g_i the gradient of process i's n images and ḡ the mean over W processes,

        Σ|g_i - ḡ|² / (W - 1) estimates Var(g_n), and |ḡ|² - Var(g_n) / W estimates |G|².

    Every ``period`` iterations it writes the scalars gradient_noise/variance and
    gradient_noise/scale (in images), as means since the last time. That takes one all-reduce of
    two numbers.

    Register it before training, on a trainer of two or more processes. It uses DDP's communication
    hook, so DDP accepts no other. If a BN group spans processes, their gradients share its
    statistics and are not independent. With a GradScaler the variance is that of the scaled loss;
    the noise scale does not change.

    Args:
        images_per_gpu: n.
        period: iterations between two writes, the same as that of Detectron2's writers.

    Raises:
        ValueError: at the start of training, if the model is not wrapped in DDP.
    """

    def __init__(self, images_per_gpu: int, period: int = 20) -> None:
        self._images = images_per_gpu
        self._period = period
        self._steps = 0
        # |g_i - ḡ|² of this process and |ḡ|², (2,) float64 on the device, per bucket and step.
        self._parts: list[Tensor] = []
        self._compared: nn.Module | None = None

    def before_train(self) -> None:
        """Registers the communication hook, once, and moves this hook before the writers.

        A roll-back calls it again. What the failed update has left is forgotten.
        """
        model = self.trainer.model
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("GradientNoise compares processes: train with two or more")
        # Scalars that are put after the writers' hook are never written. The trainer iterates over
        # this list now: the hooks that move back by one place have already been called.
        hooks = self.trainer._hooks
        hooks.remove(self)
        hooks.insert(0, self)
        self._parts.clear()
        self._steps = 0
        if model is not self._compared:
            # The list alone: DDP keeps it on the model, which has to stay fit for copies.
            model.register_comm_hook(self._parts, _compare_with_mean)
            self._compared = model

    def after_step(self) -> None:
        """Counts the step; writes the scalars when they are due."""
        self._steps += 1
        if not is_due(self.trainer, self._period):
            return
        world_size = comm.get_world_size()
        sums = torch.stack(self._parts).sum(0)
        dist.all_reduce(sums)
        deviation, squares = (sums / self._steps).tolist()
        variance = deviation / (world_size - 1)
        square = (squares - variance) / world_size  # each process has added |ḡ|²
        scale = self._images * variance / square if square > 0 else float("inf")
        self.trainer.storage.put_scalars(
            **{"gradient_noise/variance": variance, "gradient_noise/scale": scale},
            smoothing_hint=False,
        )
        self._parts.clear()
        self._steps = 0


def _compare_with_mean(
    parts: list[Tensor], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    local = bucket.buffer().clone()  # the reduction is in place

    def compare(future: torch.futures.Future[Any]) -> Tensor:
        mean = future.value()
        mean = mean[0] if isinstance(mean, (list, tuple)) else mean
        deviation = (local - mean).double().square().sum()
        # A list, because gloo may call this in several threads; append is atomic.
        parts.append(torch.stack([deviation, mean.double().square().sum()]))
        return mean

    world = dist.group.WORLD
    assert world is not None  # since there is a DDP
    return allreduce_hook(world, bucket).then(compare)
