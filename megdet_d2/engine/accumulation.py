"""Accumulation of micro-batches to one update, for mini-batches larger than the GPUs can hold."""

import contextlib
import time

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor


class AccumulationTrainer(SimpleTrainer):
    """A ``SimpleTrainer`` whose step is one update of ``steps`` micro-batches.

    The loss of the mini-batch is the mean over its images, so each micro-batch counts by its share
    of them. Processes exchange gradients once, in the last micro-batch's backward. Hooks, metrics,
    clipping and the optimizer run once per update, as they do once per step in Detectron2.

    Args:
        trainer: a stock trainer, whose model, loader and optimizer are used.
        steps: micro-batches per update; 1 or more.
    """

    def __init__(self, trainer: SimpleTrainer, steps: int):
        super().__init__(trainer.model, trainer.data_loader, trainer.optimizer)
        self.steps = steps

    def run_step(self) -> None:
        """Makes one update."""
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.steps)]
        data_time = time.perf_counter() - start

        images = sum(map(len, batches))
        self.optimizer.zero_grad()
        mean: dict = {}
        for i, batch in enumerate(batches):
            synchronized = i == self.steps - 1 or not hasattr(self.model, "no_sync")
            with contextlib.nullcontext() if synchronized else self.model.no_sync():
                with self._precision():
                    losses = self.model(batch)
                    if not isinstance(losses, dict):
                        losses = {"total_loss": losses}
                    share = len(batch) / images
                    losses = {name: share * loss for name, loss in losses.items()}
                self._scaled(sum(losses.values())).backward()
            for name, loss in losses.items():
                mean[name] = mean.get(name, 0) + loss.detach()
        self.after_backward()
        self._write_metrics(mean, data_time)
        self._update()

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
        )
        self.steps = steps

    def _precision(self) -> contextlib.AbstractContextManager:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.precision)

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.grad_scaler.scale(loss)

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def accumulate(trainer: SimpleTrainer, steps: int) -> SimpleTrainer:
    """Returns a trainer of ``steps`` micro-batches per update; ``trainer`` if ``steps`` is 1.

    Args:
        trainer: Detectron2's, plain or in mixed precision.
        steps: micro-batches per update; 1 or more.
    """
    if steps == 1:
        return trainer
    kind = AMPAccumulationTrainer if isinstance(trainer, AMPTrainer) else AccumulationTrainer
    return kind(trainer, steps)
