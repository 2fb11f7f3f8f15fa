"""Accumulation of micro-batches to one update, for mini-batches larger than the GPUs can hold."""

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor

from megdet_d2.optim.halves import Halves

from .ddp import sum_gradients
from .exchange import StepExchange
from .metrics import put_losses

if TYPE_CHECKING:
    from .modulation import Modulation
    from .out_of_memory import UpdateRepeater

logger = logging.getLogger(__name__)

# Detectron2's options of a trainer; older versions have fewer.
_OPTIONS = ("gather_metric_period", "zero_grad_before_forward", "async_write_metrics")


class AccumulationTrainer(SimpleTrainer):
    """A ``SimpleTrainer`` whose step is one update of ``steps`` micro-batches.

    The loss of the mini-batch is the mean over its images, so each micro-batch counts by its share
    of them. Processes exchange gradients once, in the last micro-batch's backward. Hooks, metrics,
    clipping and the optimizer run once per update, as they do once per step in Detectron2.

    Args:
        trainer: a stock trainer, whose model, loader, optimizer and options are used.
        steps: micro-batches per update; 1 or more.

    Attributes:
        exchange: carries the losses of all processes to the metrics; None gathers them as
            Detectron2 does.
        repeater: repeats an update that runs out of memory; None for none.
        modulation: measures the variance of gradients in some updates; None for none.
    """

    def __init__(self, trainer: SimpleTrainer, steps: int):
        super().__init__(
            trainer.model, trainer.data_loader, trainer.optimizer, **_options_of(trainer)
        )
        self.steps = steps
        self.exchange: StepExchange | None = None
        self.repeater: UpdateRepeater | None = None
        self.modulation: Modulation | None = None

    def run_step(self) -> None:
        """Makes one update."""
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.steps)]
        self._data_time = time.perf_counter() - start

        halves = self.modulation.begin(self.iter) if self.modulation else None
        if self.repeater is None:
            self._compute(batches, reduce=halves is None, halves=halves)
            if halves:
                halves.exchange()  # of gradients that DDP has not averaged yet
                sum_gradients(self.model)
            self.after_backward()
        else:
            compute = functools.partial(self._compute, reduce=False, halves=halves)
            self.repeater(compute, functools.partial(self._check, halves), batches)
        if self.modulation and halves:
            self.modulation.end(halves)
        self._report(self._mean, self._data_time)
        self._update()

    def _check(self, halves: Halves | None) -> None:
        """Calls the hooks, before gradients are averaged over processes."""
        self.after_backward()
        if halves:
            halves.exchange()

    def _compute(
        self, batches: Sequence[Any], reduce: bool = True, halves: Halves | None = None
    ) -> None:
        """Makes forward and backward of all micro-batches.

        Args:
            batches: the micro-batches.
            reduce: let DDP reduce the gradients in the last backward.
            halves: gets the gradients of half of them; None for none.
        """
        images = sum(map(len, batches)) if len(batches) > 1 else 0
        zero_first = getattr(self, "zero_grad_before_forward", False)
        if zero_first:
            self.optimizer.zero_grad()
        mean: dict[str, Any] = {}
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            synchronized = (last and reduce) or not hasattr(self.model, "no_sync")
            with contextlib.nullcontext() if synchronized else self.model.no_sync():
                with self._precision():
                    losses = self.model(batch)
                    if not isinstance(losses, dict):
                        losses = {"total_loss": losses}
                    if len(batches) > 1:
                        share = len(batch) / images
                        losses = {name: share * loss for name, loss in losses.items()}
                if i == 0 and not zero_first:
                    self.optimizer.zero_grad()
                self._scaled(sum(losses.values())).backward()
            if halves:
                halves.keep(i + 1, len(batches))
            for name, loss in losses.items():
                mean[name] = mean[name] + loss.detach() if name in mean else loss.detach()
        self._mean = mean
        if self.exchange:
            self.exchange.losses, self.exchange.data_time = mean, self._data_time

    def _report(self, losses: dict[str, Any], data_time: float) -> None:
        gathered = self.exchange.gathered(losses) if self.exchange else {}
        if self.exchange and gathered:
            if (self.iter + 1) % getattr(self, "gather_metric_period", 1) == 0:
                put_losses(get_event_storage(), gathered, self.exchange.data_times)
        elif getattr(self, "async_write_metrics", False):
            self.concurrent_executor.submit(self._write_metrics, losses, data_time, iter=self.iter)
        else:
            self._write_metrics(losses, data_time)

    def _precision(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss

    def _update(self) -> None:
        self.optimizer.step()


class AMPAccumulationTrainer(AccumulationTrainer, AMPTrainer):
    """An ``AccumulationTrainer`` in mixed precision, with one loss scale per update."""

    def __init__(self, trainer: AMPTrainer, steps: int):
        AMPTrainer.__init__(
            self,
            trainer.model,
            trainer.data_loader,
            trainer.optimizer,
            grad_scaler=trainer.grad_scaler,
            precision=trainer.precision,
            **_options_of(trainer, "log_grad_scaler"),
        )
        # Detectron2's AMPTrainer takes the option and does not use it.
        self.async_write_metrics = getattr(trainer, "async_write_metrics", False)
        self.steps = steps
        self.exchange = None
        self.repeater = None
        self.modulation = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a trainer, also of one in full precision, which has no loss scale."""
        if "grad_scaler" not in state_dict:
            logger.info(
                "The checkpoint has no loss scale, since SOLVER.AMP.ENABLED was False: it starts "
                f"at {self.grad_scaler.get_scale():g}"
            )
            state_dict = state_dict | {"grad_scaler": self.grad_scaler.state_dict()}
        super().load_state_dict(state_dict)

    def _precision(self) -> contextlib.AbstractContextManager:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.precision)

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.grad_scaler.scale(loss)

    def _report(self, losses: dict[str, Any], data_time: float) -> None:
        if getattr(self, "log_grad_scaler", False):
            scale = self.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)
        super()._report(losses, data_time)

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def accumulate(trainer: SimpleTrainer, steps: int) -> AccumulationTrainer:
    """Returns a trainer of ``steps`` micro-batches per update.

    Args:
        trainer: Detectron2's, plain or in mixed precision.
        steps: micro-batches per update; 1 or more.
    """
    kind = AMPAccumulationTrainer if isinstance(trainer, AMPTrainer) else AccumulationTrainer
    return kind(trainer, steps)


def _options_of(trainer: SimpleTrainer, *more: str) -> dict[str, Any]:
    return {name: getattr(trainer, name) for name in (*_OPTIONS, *more) if hasattr(trainer, name)}
