"""Divergence of a training: noticed by all processes in one step, so that all can roll back."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from megdet_d2._moved import renamed

from .ddp import parameters_without_gradient, summed_parameters
from .exchange import FAULT, StepExchange
from .hooks import StepObserver

# Seconds in which all processes that fail in the same forward have to report it.
PATIENCE = 30
# The least scale of a ``GradScaler``: it starts at 2^16 and halves in each step that it skips.
LEAST_SCALE = 2.0**-16

_FINE, _GRADIENT, _LOSS, _MEMORY = range(4)

_FIX = (
    "The weights are still those before this step. Look at these images, lower MEGDET.LR_FACTOR, "
    "raise MEGDET.WARMUP_EPOCHS, or set MEGDET.ON_DIVERGENCE 'half_lr' or 'longer_warmup', which "
    "go back to a checkpoint and continue"
)


class DivergenceError(FloatingPointError):
    """An error in every process, with the same message: a loss or a gradient was not finite."""


class StepOutOfMemoryError(RuntimeError):
    """An error in every process, with the same message: one has no memory for its update."""


class DivergenceGuard(StepObserver):
    """Raises ``DivergenceError`` in all processes when a loss or a gradient of any is not finite.

    It acts after each backward, before the optimizer steps and metrics are written. So neither the
    weights nor a checkpoint contain the bad values. The cost is one wait for the GPU, in which the
    losses are read for the metrics too, and one ``StepExchange``.

    Under a ``GradScaler`` gradients are not checked, because it skips steps in which they overflow.
    If it skips all steps, that is a divergence too.

    Register it with Detectron2's inner trainer, since only that calls ``after_backward``.

    Args:
        model: as it is called in training, with its DDP.
        exchange: of all processes.

    Attributes:
        checks: number of updates that have been checked.
    """

    def __init__(self, model: nn.Module, exchange: StepExchange):
        self._images: list[str] = []
        self._losses: list[tuple[str, Tensor]] = []
        self._exchange = exchange
        self._model = model
        self._summed = summed_parameters(model)
        self.checks = 0

    @contextlib.contextmanager
    def observe(self) -> Iterator[None]:
        """Collects the images that the model takes, and the losses that it returns."""
        self._images, self._losses = [], []  # an own step may never check those of the last one
        handles = [
            self._model.register_forward_pre_hook(self._note_images),
            self._model.register_forward_hook(self._note_losses),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget_step(self) -> None:
        """Removes the images and losses of this step."""
        self._images, self._losses = [], []

    def _note_images(self, model: nn.Module, inputs: tuple) -> None:
        if model.training:
            self._images += describe_images(inputs[0])

    def _note_losses(self, model: nn.Module, inputs: tuple, losses: Any) -> None:
        if model.training:
            losses = losses if isinstance(losses, dict) else {"total_loss": losses}
            self._losses += [(name, loss.detach()) for name, loss in losses.items()]

    def after_backward(self) -> None:
        """Checks losses and gradients.

        Raises:
            DivergenceError: in all processes, if any is not finite.
            RuntimeError: in this process, if its loss does not depend on all trained parameters.
                The other processes wait for their gradients.
        """
        self.checks += 1
        self.refuse_missing()
        offered = self._exchange.losses  # the means over all micro-batches
        losses = list(offered.items()) or self._losses
        gradients = self._gradients()
        # A finite norm has finite elements only, and on a CPU takes a tenth of the time of a check
        # of each. A norm that is not finite may come from large elements, which are looked at then.
        norms = torch._foreach_norm(gradients) if gradients else ()
        values = [*(loss for _, loss in losses), *norms]
        read = torch.stack(values).tolist() if values else []  # the one wait for the GPU
        names = [name for name, _ in losses]
        named = list(zip(names, read, strict=False))
        fault = self._find_nonfinite(named, read[len(names) :], gradients)
        self._raise_together(*fault, losses=dict(named) if offered else None)

    def refuse_missing(self) -> None:
        """Checks that DDP has all gradients of this process.

        Raises:
            RuntimeError: in this process, see ``after_backward``.
        """
        missing = parameters_without_gradient(self._model, self._summed)
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise RuntimeError(
                f"Rank {comm.get_rank()} has no gradient for {', '.join(missing[:5])}{more} in "
                f"iteration {self.trainer.iter}: its losses do not depend on them, and DDP on the "
                f"other ranks waits for them. Images: {', '.join(self._images)}. Every rank has to "
                "use all trained parameters in every step: add 0 times the sum of an unused output "
                "to a loss, or freeze parameters that no rank needs before the trainer is built"
            )

    def report_out_of_memory(self, reason: str) -> NoReturn:
        """Tells all processes, in place of their check, that this one has no memory left.

        Raises:
            StepOutOfMemoryError: in all processes.
        """
        self._raise_together(_MEMORY, reason)
        raise AssertionError("unreachable: a fault raises")

    def join(self, error: FloatingPointError) -> NoReturn:
        """Raises the error of a process whose forward raised ``error``, as Detectron2's RPN does.

        If all processes call it within ``PATIENCE`` seconds, all raise ``DivergenceError``.
        Otherwise the error is one that is never rolled back, since the other processes cannot be
        reached.

        Raises:
            DivergenceError: all processes have failed in the same forward.
            FloatingPointError: this process alone has failed.
        """
        images = ", ".join(self._images)
        with contextlib.suppress(RuntimeError):  # the others wait in a collective of the model
            self._raise_together(_LOSS, str(error), patience=PATIENCE)
        iteration, rank = self.trainer.iter, comm.get_rank()
        raise FloatingPointError(
            f"Training has diverged in iteration {iteration}, on rank {rank} alone: {error}; "
            f"images: {images}. {_FIX}"
        ) from error

    def _gradients(self) -> list[Tensor]:
        """Returns the gradients that the optimizer would use; none under a ``GradScaler``."""
        if self._scaler:
            return []
        groups = self.trainer.optimizer.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    @property
    def _scaler(self) -> Any:
        scaler: Any = getattr(self.trainer, "grad_scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _find_nonfinite(
        self,
        losses: list[tuple[str, float]],
        norms: list[float],
        gradients: list[Tensor],
    ) -> tuple[int, str]:
        wrong_losses = {f"{name} is {value}" for name, value in losses if not math.isfinite(value)}
        if wrong_losses:
            return _LOSS, ", ".join(sorted(wrong_losses))
        if self._scaler and self._scaler.get_scale() < LEAST_SCALE:
            return _GRADIENT, "gradients were not finite at any scale in mixed precision"
        wrong = [
            self._name_of(gradient)
            for gradient, norm in zip(gradients, norms, strict=True)
            if not math.isfinite(norm) and not gradient.isfinite().all()
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return _GRADIENT, f"the gradient of {', '.join(wrong[:3])}{more} is not finite"
        return _FINE, ""

    def _name_of(self, gradient: Tensor) -> str:
        named = self.trainer.model.named_parameters()
        return next((name for name, p in named if p.grad is gradient), "a parameter")

    def _raise_together(
        self,
        kind: int,
        fault: str,
        losses: dict[str, float] | None = None,
        patience: float = 0,
    ) -> None:
        images, self._images, self._losses = self._images, [], []
        worst = self._exchange(kind, losses, patience)[:, FAULT].max()
        if worst == _FINE:
            return
        report = (kind, f"{fault}; images: {', '.join(images)}")
        reports = comm.all_gather(report, self._exchange.group)
        if worst == _MEMORY:
            raise StepOutOfMemoryError(
                f"Out of memory in iteration {self.trainer.iter}. {_join(reports, _MEMORY)}"
            )
        # One process's loss spoils the averaged gradient of all, so losses are reported first.
        raise DivergenceError(
            f"Training has diverged in iteration {self.trainer.iter}. "
            f"{_join(reports, worst)}. {_FIX}"
        )


def _join(reports: Iterable[tuple[int, str]], kind: int) -> str:
    lines = [f"rank {rank}: {text}" for rank, (k, text) in enumerate(reports) if k == kind]
    more = f" (and {len(lines) - 4} more ranks)" if len(lines) > 4 else ""
    return f"{'. '.join(lines[:4])}{more}"


def describe_images(batch: Iterable[Any]) -> list[str]:
    """Returns the file of each image in a batch, or its id, or "?"."""
    entries = [image if isinstance(image, dict) else {} for image in batch]
    return [str(e.get("file_name") or e.get("image_id", "?")) for e in entries]


__getattr__ = renamed(
    __name__,
    Relief="megdet_d2.engine.rollback.ScheduleBackoff",
    ScheduleBackoff="megdet_d2.engine.rollback.ScheduleBackoff",
    ON_DIVERGENCE="megdet_d2.engine.rollback.ON_DIVERGENCE",
)
