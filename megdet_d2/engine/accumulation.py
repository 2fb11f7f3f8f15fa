"""Several micro-batches an update: mini-batches larger than the GPUs can hold at once."""

import contextlib
import time

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer


class AccumulationTrainer(SimpleTrainer):
    """``SimpleTrainer`` whose step is one update of ``steps`` micro-batches.

    The loss of the mini-batch is the mean over its images, so each micro-batch counts by its share
    of them. Processes exchange gradients once, in the last micro-batch's backward. Whatever happens
    once a step in Detectron2 (hooks, metrics, clipping, the optimizer) happens once an update.

    Args:
        trainer: the stock one to take model, loader and optimizer from.
        steps: micro-batches an update, from 1.
    """

    def __init__(self, trainer: SimpleTrainer, steps: int):
        super().__init__(trainer.model, trainer.data_loader, trainer.optimizer)
        self.steps = steps

    def run_step(self):
        """One update."""
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

    def _scaled(self, loss):
        return loss

    def _update(self) -> None:
        self.optimizer.step()


class AMPAccumulationTrainer(AccumulationTrainer, AMPTrainer):
    """The same in mixed precision: one scale and one unscaling an update."""

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

    def _precision(self):
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.precision)

    def _scaled(self, loss):
        return self.grad_scaler.scale(loss)

    def _update(self):
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def accumulate(trainer: SimpleTrainer, steps: int) -> SimpleTrainer:
    """A trainer of ``steps`` micro-batches an update; ``trainer`` itself if ``steps`` is 1.

    Args:
        trainer: Detectron2's, plain or in mixed precision.
    """
    if steps == 1:
        return trainer
    kind = AMPAccumulationTrainer if isinstance(trainer, AMPTrainer) else AccumulationTrainer
    return kind(trainer, steps)
