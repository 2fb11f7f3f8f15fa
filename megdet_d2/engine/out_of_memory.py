"""Makes an update that ran out of memory again, with smaller micro-batches, on all processes.

Gradients are reduced only after every process has reported that it has them. Before, a process
waits for others in CGBN layers alone. One that runs out of memory sends its group a message in
place of its next one, and the whole group stops. Groups without it finish. Then all processes meet
in the one exchange of the update.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from megdet_d2.norm.batch_norm import bare_model, cgbn_layers, set_accumulation_steps
from megdet_d2.norm.collective import GroupOutOfMemoryError, meet, report_out_of_memory
from megdet_d2.norm.configure import set_bn_size
from megdet_d2.norm.retinanet import restart_levels
from megdet_d2.norm.running_statistics import (
    average_in_groups,
    load_normalizers,
    own_normalizers,
)

from .auto_micro_batch import remember, smaller_micro_batch
from .ddp import sum_gradients
from .divergence import DivergenceGuard, StepOutOfMemoryError
from .hooks import StepObserver
from .memory_limit import MemoryLimit, OutOfMemoryError, state_tensors
from .random_state import RandomState

logger = logging.getLogger(__name__)

MOST = 2
"""Times that a run may halve its micro-batch."""
_ADVICE = (
    "Continue with --resume after one of these: lower INPUT.MAX_SIZE_TRAIN and MIN_SIZE_TRAIN; set "
    "MODEL.SUBLINEAR.ENABLED True; set SOLVER.AMP.ENABLED True; a smaller MODEL.CGBN.BN_SIZE, or "
    "MODEL.CGBN.CROSS_MACHINE True, for smaller micro-batches"
)


class UpdateRepeater:
    """Computes the gradients of updates; halves the micro-batches of one that runs out of memory.

    The repeated update has the same images, starts from the same random numbers and running
    statistics, and holds the BN size by larger groups. Where groups merge, their running statistics
    become the mean of the merged ones. The loader still yields the micro-batches of the start, so
    the place in the data does not depend on the splits.

    As a checkpointable it saves the splits and the number of halvings.

    Args:
        trainer: a ``Trainer``; only a weak reference is kept.
        guard: of the trainer, by whose exchange processes report.

    Attributes:
        splits: parts into which each micro-batch of the loader is cut.
        repeats: halvings of this run so far.
        limit: of the memory.
    """

    def __init__(self, trainer: DefaultTrainer, guard: DivergenceGuard):
        self._trainer: Any = weakref.proxy(trainer)
        self._guard = guard
        self.splits = 1
        self.repeats = 0
        self.limit = MemoryLimit(trainer.cfg)

    @property
    def images(self) -> int:
        """The images per GPU of a forward."""
        return self._trainer.layout.images_per_gpu // self.splits

    def __call__(
        self,
        compute: Callable[[Sequence[Any]], None],
        check: Callable[[], None],
        batches: Sequence[Any],
    ) -> None:
        """Computes the summed gradients of an update. Every process has to call it.

        Args:
            compute: makes forward and backward of micro-batches, without a reduction.
            check: calls the hooks after a backward.
            batches: of the loader.

        Raises:
            OutOfMemoryError: in every process, there is nothing left to halve. Where the others
                cannot be told, in this process alone.
        """
        while True:
            storage, before = get_event_storage(), self._keep()
            with _AttemptStorage(storage) as attempt:
                report = self._attempt(compute, check, batches)
            # Outside of every except, since errors keep the tensors of their frames alive.
            if report is None:
                attempt.put_into(storage)
                break
            self._restore(before)
            self._halve(report)
        sum_gradients(self._trainer.model)
        self._guard.refuse_missing()

    def _attempt(
        self,
        compute: Callable[[Sequence[Any]], None],
        check: Callable[[], None],
        batches: Sequence[Any],
    ) -> StepOutOfMemoryError | None:
        """Returns None after a backward of all processes; otherwise the report of all."""
        groups, is_cpu = self._groups(), self._trainer.cfg.MODEL.DEVICE == "cpu"
        reason = ""
        try:
            with self.limit.limited(state_tensors(self._trainer.model, self._trainer.optimizer)):
                compute([part for batch in batches for part in self._split(batch)])
            for group in groups if is_cpu else ():
                meet(group)
        except GroupOutOfMemoryError:
            reason = "stopped with its BN group"
        except OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            if groups and not is_cpu:
                self._leave(reason)
            for group in groups:
                report_out_of_memory(group)
        try:
            if reason:
                self._guard.report_out_of_memory(reason)
            check()
        except StepOutOfMemoryError as report:
            return report.with_traceback(None)
        return None

    def _split(self, batch: Any) -> Iterator[Any]:
        if self.splits == 1:
            yield batch
            return
        for start in range(0, len(batch), self.images):
            yield batch[start : start + self.images]

    def _groups(self) -> list[str]:
        """Returns the names of the BN groups of several processes, in the order of layers."""
        layers = [x for x in cgbn_layers(self._trainer.model) if x.group_size() > 1]
        groups: list[Any] = [layer.process_group for layer in layers]
        return list(dict.fromkeys(group.group_name for group in groups))

    def _keep(self) -> tuple[RandomState, list[Tensor], dict[str, float]]:
        model = bare_model(self._trainer.model)
        return RandomState(), [b.clone() for b in model.buffers()], own_normalizers(model)

    def _restore(self, before: tuple[RandomState, list[Tensor], dict[str, float]]) -> None:
        trainer = self._trainer
        random, buffers, normalizers = before
        model = bare_model(trainer.model)
        random.restore()
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        load_normalizers(model, normalizers)
        restart_levels(model)
        trainer.optimizer.zero_grad()
        for hook in [self._guard, *trainer._hooks]:
            if isinstance(hook, StepObserver):
                hook.forget_step()
        if trainer.cfg.MODEL.DEVICE != "cpu":
            torch.cuda.empty_cache()

    def _halve(self, report: StepOutOfMemoryError) -> None:
        trainer = self._trainer
        smaller = smaller_micro_batch(trainer.cfg, self.images)
        if self.repeats >= MOST or not smaller:
            why = f"it was halved {self.repeats} times" if smaller else self._why_not()
            raise OutOfMemoryError(
                f"{report}. A micro-batch has {self.images} images per GPU, and is not halved: "
                f"{why}. The weights are those before this update. {_ADVICE}"
            )
        self.repeats += 1
        self._set_splits(trainer.layout.images_per_gpu // smaller, average=True)
        logger.warning(
            f"{report}. The update is repeated, and training goes on, with {self.images} images "
            f"per GPU in {trainer.layout.accumulation_steps * self.splits} micro-batches: halving "
            f"{self.repeats} of {MOST}"
        )

    def _why_not(self) -> str:
        cfg = self._trainer.cfg
        if self.images == 1:
            return "it is one image"
        return (
            f"no smaller one holds MODEL.CGBN.BN_SIZE {cfg.MODEL.CGBN.BN_SIZE} on these processes"
        )

    def _leave(self, reason: str) -> None:
        """Ends this process, where its BN group is in kernels that cannot be stopped."""
        trainer = self._trainer
        smaller = smaller_micro_batch(trainer.cfg, self.images)
        said = "nothing smaller holds MODEL.CGBN.BN_SIZE"
        if smaller:
            with contextlib.suppress(OSError):  # a folder that only rank 0 has
                remember(trainer.cfg, smaller, trainer.cfg.MODEL.SUBLINEAR.ENABLED)
                said = f"--resume takes {smaller}"
        raise OutOfMemoryError(
            f"{reason}, in iteration {trainer.iter}, with {self.images} images per GPU. On GPUs "
            f"the other processes of a BN group cannot be told, so the run ends: {said}. {_ADVICE}"
        )

    def _set_splits(self, splits: int, average: bool) -> None:
        trainer = self._trainer
        self.splits = splits
        keys = trainer.cfg.MODEL.CGBN
        averaged = [trainer.ema.model] if trainer.ema else []
        for model in [bare_model(trainer.model), *averaged]:
            if not cgbn_layers(model):
                continue
            set_bn_size(model, keys.BN_SIZE, self.images, keys.CROSS_MACHINE)
            set_accumulation_steps(model, trainer.layout.accumulation_steps * splits)
            if average:
                average_in_groups(model)

    def state_dict(self) -> dict[str, int]:
        """Returns the splits, the halvings, and the micro-batch that they are of."""
        whole = self._trainer.layout.images_per_gpu
        return {"splits": self.splits, "repeats": self.repeats, "images_per_gpu": whole}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the result of ``state_dict``, unless another micro-batch was chosen since."""
        if state["images_per_gpu"] != self._trainer.layout.images_per_gpu:
            return
        self.repeats = max(self.repeats, state["repeats"])
        if state["splits"] > self.splits:  # fewer after a roll-back
            self._set_splits(state["splits"], average=False)


class _AttemptStorage(EventStorage):
    """Keeps the scalars of an attempt, which may fail; images go to the other storage at once."""

    def __init__(self, storage: EventStorage):
        super().__init__(storage.iter)
        self._other = storage

    def put_image(self, *args: Any, **kwargs: Any) -> None:
        self._other.put_image(*args, **kwargs)

    def put_histogram(self, *args: Any, **kwargs: Any) -> None:
        self._other.put_histogram(*args, **kwargs)

    def put_into(self, storage: EventStorage) -> None:
        """Puts all scalars into ``storage``."""
        hints = self.smoothing_hints()
        for name, history in self.histories().items():
            for value, _ in history.values():
                storage.put_scalar(name, value, smoothing_hint=hints[name])
