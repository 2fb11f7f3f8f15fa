"""The progress of a training, counted in images, and the place where a resumed run continues."""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

from megdet_d2._moved import renamed
from megdet_d2.data.stream import find_stream, seed_cpu, step_seed
from megdet_d2.schedule.build import images_per_micro_batch, phases_from_config
from megdet_d2.schedule.scaling import NEAR_ZERO

from .metrics import recent_scalars, restore_scalars
from .rollback import ScheduleBackoff

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """The parts of a mini-batch: batch_size = processes x accumulation_steps x images_per_gpu."""

    processes: int
    accumulation_steps: int
    images_per_gpu: int

    def at(self, batch_size: int) -> "Layout":
        """Returns the layout of another mini-batch, with the same micro-batches."""
        steps = batch_size // (self.processes * self.images_per_gpu)
        return Layout(self.processes, steps, self.images_per_gpu)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Layout":
        """Returns the layout of ``cfg`` on the processes that are running.

        Raises:
            ValueError: the processes cannot share SOLVER.IMS_PER_BATCH evenly.
        """
        processes = comm.get_world_size()
        images_per_gpu = images_per_micro_batch(cfg, processes)
        return cls(processes, cfg.MEGDET.ACCUMULATION_STEPS, images_per_gpu)

    @property
    def batch_size(self) -> int:
        """The images of one update."""
        return self.processes * self.accumulation_steps * self.images_per_gpu


class TrainingProgress:
    """Counts the images of a training, and restores the place of a resumed one.

    ``Trainer`` adds it to its checkpointer under the key "progress", after itself. So everything
    that an exact resume needs beside Detectron2's own state is in one place (docs/resume.md).

    Args:
        trainer: a trainer with its loader, optimizer and scheduler. Only a weak reference is kept.

    Attributes:
        phases: the mini-batch of each iteration.
        images_seen: images that all updates so far have taken.
        backoff: changes of the schedule that roll-backs after a divergence have made.
        warmup_iters: iterations of the warm-up, which a roll-back may have lengthened.
        loaded_iteration: the last iteration in the loaded checkpoint, in the mini-batches of that
            run: -1 before the first update, None where no checkpoint was loaded.
    """

    def __init__(self, trainer: DefaultTrainer):
        self._trainer: Any = weakref.proxy(trainer)
        self._configured_lrs = _base_lrs(trainer)
        self._scalars: dict[str, Any] = {}  # from a checkpoint, until there is a storage
        self._layout = Layout.from_config(trainer.cfg)
        self.phases = phases_from_config(trainer.cfg)
        self.images_seen = 0
        self.warmup_iters = trainer.cfg.SOLVER.WARMUP_ITERS
        self.backoff = ScheduleBackoff()
        self.loaded_iteration: int | None = None

    @property
    def layout(self) -> Layout:
        """The processes, micro-batches and images that make up the mini-batch of this iteration."""
        if len(self.phases.starts) == 1:
            return self._layout
        return self._layout.at(self.phases.batch_size(self._trainer.iter))

    def clear_loaded(self) -> None:
        """Sets ``loaded_iteration`` to None, so that the next load can be noticed."""
        self.loaded_iteration = None

    def seed_step(self) -> None:
        """Seeds the random numbers of one update by the seed, the images and the process."""
        stream = find_stream(self._trainer.data_loader)
        if stream:
            seed = step_seed(stream.seed, self.images_seen, comm.get_rank())
            if self._trainer.cfg.MODEL.DEVICE == "cpu":
                seed_cpu(seed)  # torch.manual_seed formats a stack trace for each unused device
            else:
                seed_all_rng(seed)

    def count_step(self) -> None:
        """Counts the images of one update."""
        self.images_seen += self.layout.batch_size

    def restore_scalars(self) -> None:
        """Puts the scalars of the loaded checkpoint into the trainer's storage, once."""
        restore_scalars(self._trainer.storage, self._scalars)
        self._scalars = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values: images, layout, place in the data, recent scalars, backoff."""
        stream = find_stream(self._trainer.data_loader)
        storage = getattr(self._trainer, "storage", None)  # there is none before training
        return {
            "images_seen": self.images_seen,
            "layout": vars(self.layout),
            "phases": self.phases.pairs,
            "stream": stream.place(self.images_seen) if stream else None,
            "scalars": recent_scalars(storage, self._trainer.iter) if storage else {},
            "backoff": vars(self.backoff),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the place in the data, and the schedule of the config's mini-batch.

        The trainer's own state has to be loaded before. With another mini-batch the iteration
        follows from the images, and the learning rate from the config. The log lists the changes.

        Args:
            state: returned by ``state_dict``; {} for a checkpoint of another trainer, whose
                iterations are then multiplied by the config's mini-batch.
        """
        trainer = self._trainer
        self.loaded_iteration, done = trainer.iter, trainer.iter + 1
        if not state:
            self.images_seen = self.phases.images(done)
            logger.warning(
                f"The checkpoint is not from megdet_d2.Trainer: taking its {done} iterations for "
                f"{self.images_seen} images, at this config's mini-batch; the images are shuffled "
                "again"
            )
            state = {"layout": vars(self.layout), "stream": None, "scalars": {}, "backoff": {}}
        else:
            self.images_seen = state["images_seen"]
        before = Layout(**state["layout"])
        # Older checkpoints have no phases, and one mini-batch.
        phases = state.get("phases", [[0, before.batch_size]])
        same_batch = phases == self.phases.pairs
        self._seek(state["stream"])
        if same_batch:
            self._scalars = state["scalars"]

        lrs_before = _base_lrs(trainer)
        loaded = ScheduleBackoff(**state["backoff"])
        self.backoff = max(self.backoff, loaded, key=lambda backoff: backoff.rollbacks)
        base_lrs = self._apply_backoff()
        if trainer.cfg.MEGDET.POLICY or self.backoff.rollbacks:
            if not same_batch:
                done = self.phases.updates(self.images_seen)
            self._set_schedule(base_lrs, done)
        elif not same_batch or lrs_before != base_lrs:
            logger.warning(
                'MEGDET.POLICY is "", so the learning rate and the iteration continue from the '
                "checkpoint, and changes of SOLVER have no effect; the data continue at the right "
                "image"
            )
        trainer.iter = done - 1
        changes = describe_resume(
            before,
            self.layout,
            self.images_seen,
            (self.loaded_iteration + 1, done),
            (lrs_before[0], _base_lrs(trainer)[0]),
            self.phases.images(done),
        )
        if changes:
            logger.info("What --resume changes:\n%s", changes)

    def _seek(self, place: dict[str, Any] | None) -> None:
        stream = find_stream(self._trainer.data_loader)
        if stream is None:
            logger.warning(
                "The training loader is not from Trainer.build_train_loader: its images start over"
            )
        elif place is None:
            stream.seek(stream.place(0) | {"images_seen": self.images_seen})
        else:
            stream.seek(place)

    def _apply_backoff(self) -> list[float]:
        """Lengthens the warm-up by ``backoff``; returns the base learning rates, lowered by it."""
        trainer = self._trainer
        cfg = trainer.cfg.clone()
        cfg.defrost()
        # Detectron2's default STEPS are after the end of a short training. Without a decay before
        # it, as with a cosine, a long warm-up would leave no learning rate for the rest.
        decays = [step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER]
        most = decays[0] - 1 if decays else cfg.SOLVER.MAX_ITER // 2
        warmup = min(updates_done(self.backoff.warmup_images, self.layout.batch_size), most)
        self.warmup_iters = max(warmup, cfg.SOLVER.WARMUP_ITERS)
        if warmup > cfg.SOLVER.WARMUP_ITERS:
            for node in (cfg.SOLVER, cfg.MEGDET.RESOLVED):
                node.WARMUP_ITERS, node.WARMUP_FACTOR = warmup, NEAR_ZERO
            trainer.scheduler = trainer.build_lr_scheduler(cfg, trainer.optimizer)
        return [lr * self.backoff.lr_factor for lr in self._configured_lrs]

    def _set_schedule(self, base_lrs: list[float], done: int) -> None:
        """Sets the learning rate after ``done`` updates; equal to the bit to an unbroken run's."""
        trainer = self._trainer
        trainer.scheduler.base_lrs = base_lrs
        trainer.scheduler.last_epoch = done
        lrs = trainer.scheduler.get_lr()
        for group, base_lr, lr in zip(trainer.optimizer.param_groups, base_lrs, lrs, strict=True):
            group.update(initial_lr=base_lr, lr=lr)


def _base_lrs(trainer: Any) -> list[float]:
    # Schedulers of other packages have none.
    groups = trainer.optimizer.param_groups
    default = [group.get("initial_lr", group["lr"]) for group in groups]
    return list(getattr(trainer.scheduler, "base_lrs", default))


def updates_done(images_seen: int, batch_size: int) -> int:
    """Returns the number of updates of ``batch_size`` in ``images_seen`` images, rounded up."""
    return -(-images_seen // batch_size)


def describe_resume(
    before: Layout,
    after: Layout,
    images_seen: int,
    iterations: tuple[int, int],
    lrs: tuple[float, float],
    scheduled: int | None = None,
) -> str:
    """Returns a table of the changes of a resume for the log; "" if nothing changes.

    Args:
        before, after: the layouts of the checkpoint and of the config.
        images_seen: images in the checkpoint.
        iterations: completed iterations, in mini-batches of each layout.
        lrs: base learning rates of each.
        scheduled: images of the completed iterations; by default those of ``after`` alone.
    """
    keys = {
        "processes": (before.processes, after.processes),
        "images per GPU and micro-batch": (before.images_per_gpu, after.images_per_gpu),
        "MEGDET.ACCUMULATION_STEPS": (before.accumulation_steps, after.accumulation_steps),
        "SOLVER.IMS_PER_BATCH": (before.batch_size, after.batch_size),
        "SOLVER.BASE_LR": lrs,
        "iterations done": iterations,
    }
    rows = [(key, *pair) for key, pair in keys.items() if pair[0] != pair[1]]
    if not rows:
        return ""
    table = tabulate(rows, headers=("key", "before", "after"), tablefmt="pipe")
    if scheduled is None:
        scheduled = iterations[1] * after.batch_size
    ahead = scheduled - images_seen
    if before.batch_size != after.batch_size and ahead > 0:
        table += (
            f"\n{images_seen} images are not a whole number of mini-batches of {after.batch_size}: "
            f"the schedule continues {ahead} images ahead of the data, which continue exactly."
        )
    return table


__getattr__ = renamed(__name__, cut_metrics="megdet_d2.engine.metrics.cut_metrics")
