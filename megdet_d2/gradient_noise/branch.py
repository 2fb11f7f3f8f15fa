"""Trains one branch: from a checkpoint, some images at k times its mini-batch."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from torch import nn

from megdet_d2.engine import Trainer
from megdet_d2.norm.running_statistics import load_normalizers
from megdet_d2.schedule.phases import Phases
from megdet_d2.schedule.scaling import scale_lr

from .critical_batch import Branch


class BranchTrainer(Trainer):
    """A ``Trainer`` that writes no checkpoint and evaluates no AP."""

    def build_hooks(self) -> list[HookBase | None]:
        """Builds the hooks of ``Trainer`` without those that save and evaluate."""
        savers = (hooks.PeriodicCheckpointer, hooks.EvalHook)
        return [hook for hook in super().build_hooks() if not isinstance(hook, savers)]


class Start:
    """The state of a training from which branches start.

    Args:
        path: a checkpoint of ``Trainer``, with its optimizer.
        batch_size: the config's SOLVER.IMS_PER_BATCH.

    Attributes:
        path: the argument.
        digest: of the file's content.
        images_seen: by the training so far.
        lr: learning rate of the next update, of the optimizer's first parameter group.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no optimizer, or is of another mini-batch.
    """

    def __init__(self, path: Path, batch_size: int):
        if not path.is_file():
            raise FileNotFoundError(f"--checkpoints: there is no file {path}; correct the path")
        self.path = path
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer, progress = state.get("trainer", {}), state.get("progress", {})
        if "optimizer" not in trainer.get("_trainer", {}) or "images_seen" not in progress:
            raise ValueError(
                f"--checkpoints: {path} has no optimizer and progress, so no branch can go on from "
                "it; give a checkpoint that megdet train has written, such as model_0000999.pth"
            )
        layout = progress["layout"]
        own = layout["processes"] * layout["accumulation_steps"] * layout["images_per_gpu"]
        # Older checkpoints have no phases, and one mini-batch.
        starts, batch_sizes = zip(*progress.get("phases", [(0, own)]), strict=True)
        trained = Phases(starts, batch_sizes).batch_size(trainer["iteration"] + 1)
        if trained != batch_size:
            raise ValueError(
                f"--checkpoints: {path} is of a training with mini-batches of {trained}, and "
                f"SOLVER.IMS_PER_BATCH is {batch_size}; give the config of its training, or "
                f"SOLVER.IMS_PER_BATCH {trained}"
            )
        self.images_seen: int = progress["images_seen"]
        self._inner: dict[str, Any] = trainer["_trainer"]
        normalizers = state.get("processes", {}).get("normalizers", [])
        self._normalizers: dict[str, float] = normalizers[0] if normalizers else {}
        self.lr: float = self._inner["optimizer"]["param_groups"][0]["lr"]

    def apply(self, trainer: Trainer, lr_factor: float) -> None:
        """Gives a trainer the momentum and ``lr_factor`` times the learning rates, for all updates.

        Its weights come from MODEL.WEIGHTS.

        Raises:
            ValueError: the optimizer of the config has other parameters.
        """
        # torch keeps tensors that it loads, and the momentum would change for the next branch.
        inner = copy.deepcopy(self._inner)
        try:
            trainer.optimizer.load_state_dict(inner["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"{self.path}: its optimizer does not fit that of the config ({error}); give the "
                "config of its training"
            ) from error
        if "grad_scaler" in inner and hasattr(trainer._trainer, "grad_scaler"):
            trainer._trainer.grad_scaler.load_state_dict(inner["grad_scaler"])
        load_normalizers(trainer.model, self._normalizers)
        for group in trainer.optimizer.param_groups:
            group["initial_lr"] = group["lr"] = lr_factor * group["lr"]
        trainer.scheduler = trainer.build_lr_scheduler(trainer.cfg, trainer.optimizer)


class RecordLoss(HookBase):
    """Records a loss of the model after given numbers of updates.

    Args:
        measure: returns the loss of a model.
        points: the numbers of updates.
        on_update: is called after each update.

    Attributes:
        losses: the losses so far.
    """

    def __init__(
        self,
        measure: Callable[[nn.Module], float],
        points: Sequence[int],
        on_update: Callable[[], object],
    ):
        self._measure = measure
        self._points = frozenset(points)
        self._on_update = on_update
        self.losses: list[float] = []

    def after_step(self) -> None:
        """Records the loss where it is due."""
        if self.trainer.iter + 1 in self._points:
            self.losses.append(self._measure(self.trainer.model))
        self._on_update()


def loss_points(iterations: int, points: int) -> list[int]:
    """Returns the updates after which the loss is measured, evenly over the second half.

    Args:
        iterations: a multiple of 2 ``points``.
        points: how many; their mean is the smoothed loss at the end.
    """
    return [iterations * (points + i) // (2 * points) for i in range(1, points + 1)]


def train_branch(
    cfg: CfgNode,
    start: Start,
    factor: int,
    rule: str,
    seed: int,
    images: int,
    points: int,
    measure: Callable[[nn.Module], float],
    folder: Path,
    on_update: Callable[[], object] = lambda: None,
) -> Branch:
    """Trains a branch, with a constant learning rate, and returns its losses.

    Args:
        cfg: resolved, with the mini-batch B, the BN size and micro-batches of ``start``, and a
            constant schedule. Not frozen; it is not changed.
        start: where the branch starts.
        factor: k. The micro-batches stay, so an update has k times as many.
        rule: see ``megdet_d2.schedule.scaling.scale_lr``.
        seed: decides the order of the images, which is the same for every factor.
        images: to train on; a multiple of 2 ``points`` k B.
        points: see ``loss_points``.
        measure: returns the loss of a model.
        folder: gets metrics.json of the branch.
        on_update: is called after each update.
    """
    lr_factor = scale_lr(1.0, 1, factor, rule)
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH *= factor
    cfg.MEGDET.ACCUMULATION_STEPS *= factor
    cfg.SOLVER.MAX_ITER = images // cfg.SOLVER.IMS_PER_BATCH
    cfg.SOLVER.BASE_LR = lr_factor * start.lr
    cfg.MODEL.WEIGHTS, cfg.SEED, cfg.OUTPUT_DIR = str(start.path), seed, str(folder)
    cfg.DATASETS.TEST = ()
    folder.mkdir(parents=True, exist_ok=True)
    trainer = BranchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start.apply(trainer, lr_factor)
    recorder = RecordLoss(measure, loss_points(trainer.max_iter, points), on_update)
    trainer.register_hooks([recorder])
    reason = ""
    try:
        trainer.train()
    except FloatingPointError as error:  # also a DivergenceError
        reason = str(error)
    return Branch(
        factor,
        "" if factor == 1 else rule,
        seed,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.MAX_ITER,
        tuple(recorder.losses),
        reason,
    )
