"""Divergence of a training: all processes notice it in the same step, so that all can roll back."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from megdet_d2._moved import renamed

logger = logging.getLogger(__name__)

ON_DIVERGENCE = ("stop", "half_lr", "longer_warmup")
# Seconds in which all processes that fail in the same forward get to say so.
PATIENCE = 30
# Of a ``GradScaler``, which starts at 2^16 and halves its scale in each step that it skips.
LEAST_SCALE = 2.0**-16

_FINE, _GRADIENT, _LOSS = range(3)

_FIX = (
    "The weights are still those before this step. Look at these images, lower MEGDET.LR_FACTOR, "
    "raise MEGDET.WARMUP_EPOCHS, or set MEGDET.ON_DIVERGENCE to go on by itself"
)


class DivergenceError(FloatingPointError):
    """A loss or a gradient was not finite. Raised in every process, with one message."""


class DivergenceGuard(HookBase):
    """Raises ``DivergenceError`` in all processes when a loss or a gradient of any is not finite.

    After each backward, before the optimizer steps and the metrics are written, so that neither the
    weights nor a checkpoint ever hold its result. Registered with Detectron2's inner trainer,
    whose ``after_backward`` is the only one that is called. One wait for the GPU, which the metrics
    need anyway, and one small all-reduce on the CPU. Under a ``GradScaler`` gradients are not
    looked at: it skips steps in which they overflow. If it skips all, that is a divergence too.

    Every process has to make one, in the same order as its other process groups: it has a group of
    its own, in which a process that failed in forward meets no message of the model's.

    Args:
        model: as it is called in training, with its DDP.
    """

    def __init__(self, model: nn.Module):
        self._images: list[str] = []
        self._losses: list[tuple[str, Tensor]] = []
        self._group = dist.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        model.register_forward_pre_hook(self._note_images)
        model.register_forward_hook(self._note_losses)

    def _note_images(self, model, inputs):
        if model.training:
            self._images += describe_images(inputs[0])

    def _note_losses(self, model, inputs, losses):
        if model.training:
            losses = losses if isinstance(losses, dict) else {"total_loss": losses}
            self._losses += [(name, loss.detach().float()) for name, loss in losses.items()]

    def after_backward(self):
        self._raise_together(*self._find_nonfinite())

    def join(self, error: FloatingPointError) -> None:
        """For a process whose forward raised ``error``, as Detectron2's RPN does.

        Where all processes are here within ``PATIENCE`` seconds, all raise ``DivergenceError``. One
        that is alone raises what nobody rolls back from: the others do not hear of it.

        Raises:
            DivergenceError, FloatingPointError: one of them, always.
        """
        images = ", ".join(self._images)
        try:
            self._raise_together(_LOSS, str(error), PATIENCE)
        except RuntimeError:  # the others are in a collective of the model's, and end when we do
            iteration, rank = self.trainer.iter, comm.get_rank()
            raise FloatingPointError(
                f"Training has diverged in iteration {iteration}, on rank {rank} alone: {error}; "
                f"images: {images}. {_FIX}"
            ) from error

    def _find_nonfinite(self) -> tuple[int, str]:
        names, values = [n for n, _ in self._losses], [loss for _, loss in self._losses]
        gradients = {}
        scaler = getattr(self.trainer, "grad_scaler", None)
        scaled = scaler is not None and scaler.is_enabled()
        if not scaled:
            parameters = self.trainer.model.named_parameters()
            gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        # A norm that is finite has finite elements only, and takes a tenth of the time, on a
        # processor, that looking at each does. One that is not may be of large ones: see below.
        if gradients:
            values += [norm.float() for norm in torch._foreach_norm(list(gradients.values()))]
        finite = torch.stack(values).isfinite().tolist() if values else []
        losses = {
            f"{name} is {float(value)}"
            for name, value, ok in zip(names, values, finite, strict=False)  # losses come first
            if not ok
        }
        if losses:
            return _LOSS, ", ".join(sorted(losses))
        if scaled and scaler.get_scale() < LEAST_SCALE:
            return _GRADIENT, "gradients were not finite at any scale in mixed precision"
        suspects = [
            g for g, ok in zip(gradients.items(), finite[len(names) :], strict=True) if not ok
        ]
        wrong = [name for name, gradient in suspects if not gradient.isfinite().all()]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return _GRADIENT, f"the gradient of {', '.join(wrong[:3])}{more} is not finite"
        return _FINE, ""

    def _raise_together(self, kind: int, fault: str, patience: float | None = None) -> None:
        images, self._images, self._losses = self._images, [], []
        worst = self._agree(kind, patience)
        if worst == _FINE:
            return
        reports = comm.all_gather((kind, f"{fault}; images: {', '.join(images)}"), self._group)
        # One process's loss makes everyone's averaged gradient what it is.
        lines = [f"rank {rank}: {text}" for rank, (k, text) in enumerate(reports) if k == worst]
        more = f" (and {len(lines) - 4} ranks more)" if len(lines) > 4 else ""
        raise DivergenceError(
            f"Training has diverged in iteration {self.trainer.iter}. "
            f"{'. '.join(lines[:4])}{more}. {_FIX}"
        )

    def _agree(self, number: int, patience: float | None) -> int:
        if self._group is None:
            return number
        largest = torch.tensor(number)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group, async_op=True)
        work.wait() if patience is None else work.wait(timedelta(seconds=patience))
        return int(largest)


def describe_images(batch: Iterable[Any]) -> list[str]:
    """For each image of a batch its file, or its id, or "?"."""
    entries = [image if isinstance(image, dict) else {} for image in batch]
    return [str(e.get("file_name") or e.get("image_id", "?")) for e in entries]


@dataclass(frozen=True)
class ScheduleBackoff:
    """How far roll-backs have eased the schedule; kept in checkpoints.

    Attributes:
        rollbacks: how many there were.
        lr_factor: multiplies the learning rate.
        warmup_images: the least length of the warm-up, in images.
    """

    rollbacks: int = 0
    lr_factor: float = 1.0
    warmup_images: int = 0

    def next(self, action: str, warmup_images: int, images_seen: int) -> "ScheduleBackoff":
        """After one more roll-back.

        Args:
            action: "half_lr", or "longer_warmup" for one twice as long, and at least twice as long
                as training had come.
            warmup_images: length of the config's warm-up.
            images_seen: when training diverged.
        """
        rollbacks = self.rollbacks + 1
        if action == "half_lr":
            return ScheduleBackoff(rollbacks, self.lr_factor / 2, self.warmup_images)
        so_far = max(warmup_images, self.warmup_images)
        return ScheduleBackoff(rollbacks, self.lr_factor, 2 * max(so_far, images_seen))


__getattr__ = renamed(__name__, Relief="ScheduleBackoff")
