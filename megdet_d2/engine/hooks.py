"""Hooks around the training step: layers out of step, scalars, skipped images, their order."""

import contextlib
import difflib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from torch import nn

from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.collective import raise_if_out_of_step
from megdet_d2.norm.configure import images_per_group

from .exchange import SKIPPED, StepExchange

logger = logging.getLogger(__name__)

# Steps between two reads of counters: the period of Detectron2's writers.
PERIOD = 20

_SAVERS = (hooks.PeriodicCheckpointer, hooks.BestCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)


class StepObserver(HookBase):
    """The base of hooks that watch the model's forward, and only during a training step.

    Between steps the model has nothing of them. So it can be copied and saved, and a forward that
    is no part of the training, such as that of a validation loss, is not watched.
    """

    def observe(self) -> contextlib.AbstractContextManager:
        """Returns a context that watches the model, and leaves nothing on it."""
        raise NotImplementedError

    def forget_step(self) -> None:
        """Undoes the counting of this step, which is about to be made again."""
        raise NotImplementedError


@contextlib.contextmanager
def observed_step(registered: Iterable[HookBase]) -> Iterator[None]:
    """Lets all ``StepObserver`` hooks among ``registered`` watch the step inside of a ``with``."""
    with contextlib.ExitStack() as contexts:
        for hook in registered:
            if isinstance(hook, StepObserver):
                contexts.enter_context(hook.observe())
        yield


class StopOutOfStep(HookBase):
    """Raises the ``OutOfStepError`` that CGBN layers on CUDA have noticed in this step.

    On CPU the layers raise it themselves. Detectron2's trainer waits for the losses in every step,
    so one more flag costs no time.

    Register it with Detectron2's inner trainer, before the divergence guard: mixed values may be
    not finite, later collectives may never end, and the optimizer must not see the gradients.
    """

    def after_backward(self) -> None:
        """Raises ``OutOfStepError`` if processes were in different layers."""
        raise_if_out_of_step()


class BatchScalars(HookBase):
    """Writes images seen, the mini-batch and the BN size, in images, beside the other metrics.

    ``training_time`` is the time of all iterations in seconds, without hooks and with those before
    a resume; Detectron2's ``time`` is a median, which hides slow iterations. Without a CGBN layer
    the BN size is 0, as in the paper's Table 3. CGBN layers do not use the statistics of a
    mini-batch that is not finite; the hook counts and logs these.

    Args:
        effective_batch_size: returns the images of an iteration's update, over all processes.
        images_per_gpu: images of one micro-batch in one process.
    """

    def __init__(self, effective_batch_size: Callable[[int], int], images_per_gpu: int):
        self._effective_batch_size = effective_batch_size
        self._images_per_gpu = images_per_gpu
        self._seconds = 0.0

    def before_train(self) -> None:
        """Finds the model's CGBN layers."""
        self._bn_size = images_per_group(self.trainer.model, self._images_per_gpu)
        layers = cgbn_layers(self.trainer.model)
        self._layers = [layer for layer in layers if layer.num_batches_skipped is not None]
        self._skipped = self._count()

    def before_step(self) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def _count(self) -> list[int]:
        # Waits for the GPU only once.
        counters: list[Any] = [layer.num_batches_skipped for layer in self._layers]
        return torch.stack(counters).tolist() if counters else []

    def after_step(self) -> None:
        """Writes the scalars."""
        self._seconds += time.perf_counter() - self._began
        if is_due(self.trainer, PERIOD):
            before, self._skipped = self._skipped, self._count()
            self._warn(before)
            self.trainer.storage.put_scalar(
                "cgbn_skipped_batches", sum(self._skipped), smoothing_hint=False
            )
        self.trainer.storage.put_scalars(
            images_seen=self.trainer.images_seen,
            effective_batch_size=self._effective_batch_size(self.trainer.iter),
            bn_size=self._bn_size,
            training_time=self._seconds,
            smoothing_hint=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the result of ``state_dict``."""
        self._seconds = state_dict["seconds"]

    def _warn(self, before: list[int]) -> None:
        grown = [
            f"{layer.name} {now - then}"
            for layer, then, now in zip(self._layers, before, self._skipped, strict=True)
            if now > then
        ]
        if grown:
            more = f" and {len(grown) - 5} more layers" if len(grown) > 5 else ""
            logger.warning(
                f"CGBN: until iteration {self.trainer.iter} statistics of mini-batches were not "
                f"finite, and were not used: {', '.join(grown[:5])}{more}"
            )


class CountSkippedImages(StepObserver):
    """Logs the images that ``MEGDET.SKIP_BAD_IMAGES`` skipped, and counts them over all processes.

    The metric ``skipped_images`` is their number since training began or was resumed.

    Args:
        model: as it is called in training; its inputs list the images that they replace.
        exchange: of all processes.
    """

    def __init__(self, model: nn.Module, exchange: StepExchange):
        self._exchange = exchange
        self._exchange.skipped = 0
        self._model = model

    @contextlib.contextmanager
    def observe(self) -> Iterator[None]:
        """Collects the images that the model takes."""
        self._before = self._exchange.skipped
        handle = self._model.register_forward_pre_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def forget_step(self) -> None:
        """Takes the images of this step from the count."""
        self._exchange.skipped = self._before

    def _note(self, model: nn.Module, inputs: tuple) -> None:
        for image in inputs[0] if model.training else ():
            for reason in image.get("skipped", ()):
                self._exchange.skipped += 1
                logger.warning(f"MEGDET.SKIP_BAD_IMAGES: skipped {reason}")

    def after_step(self) -> None:
        """Writes the count of all processes."""
        if is_due(self.trainer, PERIOD):
            count = int(self._exchange.complete()[:, SKIPPED].sum())
            self.trainer.storage.put_scalar("skipped_images", count, smoothing_hint=False)


def insert_before_savers(built: Sequence[HookBase], ours: Sequence[HookBase]) -> list[HookBase]:
    """Returns ``built`` with ``ours`` before the first hook that saves, evaluates or writes.

    Every process has to call it. Rank 0 alone may have some of the hooks, usually those that save
    and write. The others insert ``ours`` after the hooks that precede it on rank 0, so that hooks
    with collectives have one order in all processes.

    Args:
        built: the hooks of this process, in their order.
        ours: hooks that all processes have.
    """
    names = [type(hook).__qualname__ for hook in built]
    savers = (i for i, hook in enumerate(built) if isinstance(hook, _SAVERS))
    before = comm.all_gather(names[: next(savers, len(built))])[0]  # rank 0's
    matcher = difflib.SequenceMatcher(None, before, names, autojunk=False)
    ends = [block.b + block.size for block in matcher.get_matching_blocks() if block.size]
    place = max(ends, default=0)
    return [*built[:place], *ours, *built[place:]]


def insert_after_evaluation(built: Sequence[HookBase], ours: Sequence[HookBase]) -> list[HookBase]:
    """Returns ``built`` with ``ours`` before Detectron2's writers, which come after the evaluation.

    Args:
        built: the hooks of this process, in their order.
        ours: hooks that read results, or add some.
    """
    writers = (i for i, hook in enumerate(built) if isinstance(hook, hooks.PeriodicWriter))
    place = next(writers, len(built))
    return [*built[:place], *ours, *built[place:]]


def is_due(trainer: TrainerBase, *periods: int) -> bool:
    """Returns True if the completed step is the last, or ends a period; one of 0 never ends."""
    done = trainer.iter + 1
    return done >= trainer.max_iter or any(p > 0 and done % p == 0 for p in periods)
