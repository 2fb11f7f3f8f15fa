"""A trainer whose progress is counted in images, and which goes on where it stopped."""

import functools
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from megdet_d2.data.stream import build_train_loader, find_stream, step_seed
from megdet_d2.schedule.build import images_per_micro_batch
from megdet_d2.schedule.scaling import NEAR_ZERO

from .checkpoint import claim_run
from .divergence import ScheduleBackoff
from .launch import find_launcher, may_restart
from .progress import (
    Layout,
    cut_metrics,
    describe_resume,
    recent_scalars,
    restore_scalars,
    updates_done,
)

logger = logging.getLogger(__name__)


class ResumingTrainer(DefaultTrainer):
    """``DefaultTrainer`` whose resumed run goes on as if it had not stopped (docs/resume.md).

    Attributes:
        layout: processes, micro-batches and images that make up a mini-batch.
        images_seen: images that all updates so far have taken.
        relief: what roll-backs after a divergence have done to the schedule.
    """

    def __init__(self, cfg: CfgNode):
        self.images_seen = 0
        self.relief = ScheduleBackoff()
        # The last iteration in the checkpoint, as counted then: -1 before any, None without one.
        self._saved_iter: int | None = None
        self._scalars: dict[str, Any] = {}  # from a checkpoint, until there is a storage
        super().__init__(cfg)
        self._configured_lrs = list(self.scheduler.base_lrs)

    @functools.cached_property
    def layout(self) -> Layout:
        """From the config that Detectron2 has scaled to the workers."""
        processes, steps = comm.get_world_size(), self.cfg.MEGDET.ACCUMULATION_STEPS
        return Layout(processes, steps, images_per_micro_batch(self.cfg, processes))

    def run_step(self) -> None:
        """One update, with random numbers that follow from the seed, the images and the process."""
        stream = find_stream(self.data_loader)
        if stream:
            seed_all_rng(step_seed(stream.seed, self.images_seen, comm.get_rank()))
        super().run_step()
        self.images_seen += self.layout.batch_size

    def before_train(self) -> None:
        """Hooks, and the scalars from which smoothed metrics go on."""
        super().before_train()
        restore_scalars(self.storage, self._scalars)
        self._scalars = {}

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's, from the newest good checkpoint, at the image where it stopped.

        With another mini-batch the iteration is counted anew from the images, and the learning
        rate is the config's; the log says what changed. Processes that torchrun has restarted
        resume without being asked.

        Raises:
            RuntimeError: there are checkpoints, and none of them is good.
            ValueError: processes that were told different things, as machines may be.
        """
        asked = comm.all_gather(resume)
        if len(set(asked)) > 1:
            ranks = ", ".join(str(rank) for rank, said in enumerate(asked) if not said)
            raise ValueError(f"--resume is not given on ranks {ranks}; give it on all, or on none")
        if not resume and may_restart() and self._has_begun():
            logger.info("Restarted by torchrun: resuming")
            resume = True
        super().resume_or_load(resume)
        if self._saved_iter is not None and comm.is_main_process():
            metrics = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
            cut_metrics(metrics, self._saved_iter, self.images_seen)

    def _has_begun(self) -> bool:
        # torchrun's count of restarts does not tell: each machine's agent counts its own, and one
        # that failed before it came here has left an older run's checkpoint where it was.
        launchers = comm.all_gather(find_launcher())
        begun = comm.is_main_process() and claim_run(launchers, self.cfg.OUTPUT_DIR)
        return comm.all_gather(begun)[0]

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's, and under "megdet" what an exact resume needs besides."""
        stream = find_stream(self.data_loader)
        storage = getattr(self, "storage", None)  # there is none before training
        progress = {
            "images_seen": self.images_seen,
            "layout": vars(self.layout),
            "stream": stream.place(self.images_seen) if stream else None,
            "scalars": recent_scalars(storage, self.iter) if storage else {},
            "relief": vars(self.relief),
        }
        return super().state_dict() | {"megdet": progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Detectron2's, then the place in the data, and the schedule of this mini-batch."""
        super().load_state_dict(state_dict)
        self._saved_iter, done = self.iter, self.iter + 1
        saved = state_dict.get("megdet")
        if saved is None:
            self.images_seen = done * self.layout.batch_size
            logger.warning(
                f"The checkpoint is not of megdet_d2.Trainer: taking its {done} iterations for "
                f"{self.images_seen} images, at this config's mini-batch, of a new shuffling"
            )
            saved = {"layout": vars(self.layout), "stream": None, "scalars": {}}
        else:
            self.images_seen = saved["images_seen"]
        before = Layout(**saved["layout"])
        same_batch = before.batch_size == self.layout.batch_size
        self._go_to(saved["stream"])
        if same_batch:
            self._scalars = saved["scalars"]

        was = self.scheduler.base_lrs[0]
        saved_relief = ScheduleBackoff(**saved.get("relief", {}))
        self.relief = max(self.relief, saved_relief, key=lambda relief: relief.rollbacks)
        configured = self._ease_schedule()
        if self.cfg.MEGDET.POLICY or self.relief.rollbacks:
            if not same_batch:
                done = updates_done(self.images_seen, self.layout.batch_size)
            self._go_on_with_lr(configured, done)
        elif not same_batch or self.scheduler.base_lrs != configured:
            logger.warning(
                'MEGDET.POLICY is "", so the learning rate and the iteration go on as the '
                "checkpoint has them, whatever SOLVER says; the data go on at the right image"
            )
        self.iter = done - 1
        changes = describe_resume(
            before, self.layout, self.images_seen, (self._saved_iter + 1, done),
            (was, self.scheduler.base_lrs[0]),
        )  # fmt: skip
        if changes:
            logger.info("What --resume changes:\n%s", changes)

    def _ease_schedule(self) -> list[float]:
        """Lengthens the warm-up as ``relief`` has it; the config's base LRs, as eased."""
        cfg = self.cfg.clone()
        cfg.defrost()
        most = (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)[0] - 1
        warmup = min(updates_done(self.relief.warmup_images, self.layout.batch_size), most)
        if warmup > cfg.SOLVER.WARMUP_ITERS:
            for node in (cfg.SOLVER, cfg.MEGDET.RESOLVED):
                node.WARMUP_ITERS, node.WARMUP_FACTOR = warmup, NEAR_ZERO
            self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        return [lr * self.relief.lr_factor for lr in self._configured_lrs]

    def _go_to(self, place: dict[str, Any] | None) -> None:
        stream = find_stream(self.data_loader)
        if stream is None:
            logger.warning(
                "The training loader is not Trainer.build_train_loader's: its images start over"
            )
        elif place is None:
            stream.seek(stream.place(0) | {"images_seen": self.images_seen})
        else:
            stream.seek(place)

    def _go_on_with_lr(self, base_lrs: list[float], done: int) -> None:
        """The config's learning rate after ``done`` updates: to the bit the old one if it was."""
        self.scheduler.base_lrs = base_lrs
        self.scheduler.last_epoch = done
        lrs = self.scheduler.get_lr()
        for group, base_lr, lr in zip(self.optimizer.param_groups, base_lrs, lrs, strict=True):
            group.update(initial_lr=base_lr, lr=lr)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Detectron2's, over a stream of images whose place a checkpoint has."""
        return build_train_loader(cfg, images_per_micro_batch(cfg, comm.get_world_size()))
