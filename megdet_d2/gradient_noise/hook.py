"""Measures the gradient noise while training with DDP."""

from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from megdet_d2.engine.hooks import is_due
from megdet_d2.engine.progress import Layout


class GradientNoise(HookBase):
    """Estimates Var(g_n) and the noise scale from the gradients of the processes and their mean.

    With g_i the gradient of process i's n images of an update and ḡ the mean over W processes,

        Σ|g_i - ḡ|² / (W - 1) estimates Var(g_n), and |ḡ|² - Var(g_n) / W estimates |G|².

    DDP reduces once per update, so n counts all its micro-batches. It grows with
    MEGDET.BATCH_WARMUP. Every ``period`` iterations the hook writes the scalars
    gradient_noise/variance, Var(g_n), and gradient_noise/scale, n Var(g_n) / |G|² in images. It
    averages n Var(g_n), Var(g_n) and |G|² since the last time, by one all-reduce of three numbers.

    Register it before training, on a trainer of two or more processes. It uses DDP's communication
    hook, so DDP accepts no other. If a BN group spans processes, their gradients share its
    statistics and are not independent. With a GradScaler the variance is that of the scaled loss;
    the noise scale does not change.

    Args:
        images_per_gpu: n, for a training loop without ``megdet_d2.Trainer``. That trainer knows
            its n, so leave it out there.
        period: iterations between two writes, the same as that of Detectron2's writers.

    Raises:
        ValueError: at the start of training, if the model is not wrapped in DDP, n is not known, or
            ``images_per_gpu`` is not that of the ``Trainer``.
    """

    def __init__(self, images_per_gpu: int | None = None, period: int = 20) -> None:
        self._images_per_gpu = images_per_gpu
        self._period = period
        # |g_i - ḡ|² of this process and |ḡ|², (2,) float64 on the device, per bucket of this step.
        self._parts: list[Tensor] = []
        # Their sums per step, and |g_i - ḡ|² n: (3,) each, since the last time.
        self._steps: list[Tensor] = []
        self._compared: nn.Module | None = None

    def before_train(self) -> None:
        """Registers the communication hook, once, and moves this hook before the writers.

        A roll-back calls it again. What the failed update has left is forgotten.
        """
        model = self.trainer.model
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("GradientNoise compares processes: train with two or more")
        self._check_images()
        # Scalars that are put after the writers' hook are never written. The trainer iterates over
        # this list now: the hooks that move back by one place have already been called.
        hooks = self.trainer._hooks
        hooks.remove(self)
        hooks.insert(0, self)
        self._parts.clear()
        self._steps.clear()
        if model is not self._compared:
            # The list alone: DDP keeps it on the model, which has to stay fit for copies.
            model.register_comm_hook(self._parts, _compare_with_mean)
            self._compared = model

    def after_step(self) -> None:
        """Adds up the step, in which DDP has reduced gradients; writes the scalars that are due."""
        if self._parts:
            deviation, square = torch.stack(self._parts).sum(0)
            self._steps.append(torch.stack([deviation, square, deviation * self._images()]))
            self._parts.clear()
        if not self._steps or not is_due(self.trainer, self._period):
            return
        world_size = comm.get_world_size()
        means = torch.stack(self._steps).mean(0)
        dist.all_reduce(means)
        deviation, squares, per_image = means.tolist()
        variance = deviation / (world_size - 1)
        square = (squares - variance) / world_size  # each process has added |ḡ|²
        sigma2 = per_image / (world_size - 1)  # n Var(g_n) = σ², whatever n is
        self.trainer.storage.put_scalars(
            **{
                "gradient_noise/variance": variance,
                "gradient_noise/scale": sigma2 / square if square > 0 else float("inf"),
            },
            smoothing_hint=False,
        )
        self._steps.clear()

    def _images(self) -> int:
        """Returns n of the update that has just been made."""
        layout = self._layout()
        if layout is None:
            assert self._images_per_gpu is not None  # by _check_images
            return self._images_per_gpu
        return layout.accumulation_steps * layout.images_per_gpu

    def _layout(self) -> Layout | None:
        layout = getattr(self.trainer, "layout", None)
        return layout if isinstance(layout, Layout) else None

    def _check_images(self) -> None:
        given, layout = self._images_per_gpu, self._layout()
        if layout is None and (given is None or given < 1):
            raise ValueError(
                f"GradientNoise: images_per_gpu is {given}, and the trainer, a "
                f"{self.trainer.__class__.__name__}, is no megdet_d2.Trainer, which would know it; "
                "give the images of an update in one process"
            )
        if layout and given not in (None, layout.images_per_gpu):
            raise ValueError(
                f"GradientNoise: images_per_gpu is {given}, but the trainer takes "
                f"{layout.images_per_gpu} in each of {layout.accumulation_steps} micro-batches; "
                "leave it out"
            )


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
