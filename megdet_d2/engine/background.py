"""Evaluates snapshots of a training in another process, in their order and over resumes."""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from .background_worker import LOG, EvaluationProcess, WorkerError
from .best import BestCheckpointer
from .builders import Builders
from .checkpoint import Checkpointer, find_damage
from .late_results import deliver
from .metrics import has_results

logger = logging.getLogger(__name__)

FOLDER = "background"
ROOM = 2
"""The most snapshots on the disk: one that is evaluated, and one that waits."""
_LOOK = 5  # seconds between two messages of rank 0 to processes that wait for it


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is to be evaluated.

    Attributes:
        path: its file.
        iteration: the last one in it.
        images_seen: images of all updates in it.
    """

    path: str
    iteration: int
    images_seen: int

    @classmethod
    def at(cls, folder: str, iteration: int, images_seen: int) -> "Snapshot":
        """Returns the snapshot with its file in ``folder``."""
        path = os.path.join(folder, f"{iteration:07d}_{images_seen}.pth")
        return cls(path, iteration, images_seen)


class BackgroundEvaluation(hooks.EvalHook):
    """An ``EvalHook`` whose periodic evaluations run in one other process; the last one does not.

    Each period rank 0 writes a checkpoint into OUTPUT_DIR/background, and the training goes on.
    Results are written at the iteration of their checkpoint, in order, and the file is removed. A
    file that a stop has left is evaluated after a resume. If two files are there, the next
    evaluation waits for one of them.

    The error of an evaluation is logged at once. All processes raise it at the next evaluation.

    Register it after ``GatherStatistics`` and before the writers, in every process.

    Args:
        kind: the trainer's class.
        cfg: its config.
        checkpointer: the trainer's.
        last: evaluates after the training, in all processes.

    Attributes:
        pending: snapshots without results; the first is being evaluated. Only rank 0 has any.
    """

    def __init__(
        self,
        kind: type[Builders],
        cfg: CfgNode,
        checkpointer: Checkpointer,
        last: Callable[[], dict[str, Any] | None],
    ):
        super().__init__(0, last)
        self._kind, self._cfg, self._checkpointer = kind, cfg, checkpointer
        self._folder = os.path.join(cfg.OUTPUT_DIR, FOLDER)
        self._every = cfg.TEST.EVAL_PERIOD
        self.pending: list[Snapshot] = []
        self._process: EvaluationProcess | None = None
        self._began = 0.0
        self._failure = ""

    def before_train(self) -> None:
        """Begins again with what a stop has left unfinished.

        Raises:
            ValueError: in every process, if something else reads results where they are late.
        """
        registered = list(self.trainer._hooks)
        fault = comm.all_gather(_find_fault(self.trainer, registered))
        if any(fault):
            raise ValueError(next(filter(None, fault)))
        self._receivers = registered
        if comm.is_main_process():
            os.makedirs(self._folder, exist_ok=True)
            for snapshot in self._left():
                self._submit(snapshot)

    def after_step(self) -> None:
        """Takes results that are there, and hands the model over if an evaluation is due.

        Raises:
            RuntimeError: in every process, if an earlier evaluation has failed.
        """
        if self.pending:
            self._receive()
        done = self.trainer.iter + 1
        if self._every <= 0 or done % self._every or done == self.trainer.max_iter:
            return
        self._wait_until_fewer(ROOM)
        if self._failure:
            if comm.is_main_process():
                iteration = self.trainer.iter
                self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self.raise_failure()
        if comm.is_main_process():
            self.hand_over()

    def hand_over(self) -> None:
        """Writes a snapshot, and lets it be evaluated. Only rank 0 calls it, after ``gather``."""
        iteration = self.trainer.iter
        snapshot = Snapshot.at(self._folder, iteration, self.trainer.images_seen)
        self._checkpointer.save_aside(snapshot.path, iteration=iteration)
        self._submit(snapshot)

    def after_train(self) -> None:
        """Evaluates the last model in all processes, and waits for the other results."""
        super().after_train()
        if self.trainer.has_finished:
            self._wait_until_fewer(1)

    def raise_failure(self) -> None:
        """Raises the error of an evaluation that has failed, if there is one.

        Raises:
            RuntimeError: in every process.
        """
        if self._failure:
            raise RuntimeError(
                f"TEST.BACKGROUND: {self._failure}. The training is saved: correct the evaluation "
                "and continue with --resume, which repeats it. Its log is "
                f"{os.path.join(self._folder, LOG)}"
            )

    def close(self) -> None:
        """Ends the process. Unfinished snapshots stay, for a resume."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _left(self) -> list[Snapshot]:
        """Returns the snapshots to evaluate again, in order, and removes all others."""
        trainer = self.trainer
        metrics = os.path.join(self._cfg.OUTPUT_DIR, "metrics.json")
        resumed = trainer.progress.loaded_iteration
        if resumed is not None and resumed >= 0:
            _copy_if_due(self._checkpointer, self._folder, trainer, self._every, metrics)
        kept = []
        for snapshot in find_snapshots(self._folder):
            comes_again = resumed is None or snapshot.images_seen > trainer.images_seen
            damage = "" if comes_again else find_damage(snapshot.path)
            if damage:
                logger.warning(f"{snapshot.path} {damage}, and is not evaluated")
            if comes_again or damage or has_results(metrics, snapshot.iteration):
                os.remove(snapshot.path)
                continue
            logger.info(f"Evaluating iteration {snapshot.iteration}, which a stop has interrupted")
            kept.append(snapshot)
        return kept

    def _submit(self, snapshot: Snapshot) -> None:
        self.pending.append(snapshot)
        if len(self.pending) == 1:
            self._begin()

    def _begin(self) -> None:
        if self._process is None:
            cfg = worker_config(self._cfg)
            self._process = EvaluationProcess(self._kind, cfg, cfg.MEGDET.TIMEOUT)
        self._began = time.monotonic()
        self._process.send(self.pending[0].path)

    def _receive(self, wait: float = 0) -> None:
        """Takes the results of the running evaluation, and begins the next one."""
        if self._failure or self._process is None:
            return
        snapshot = self.pending[0]
        try:
            results = self._process.receive(wait)
        except WorkerError as error:
            self.close()
            said, reason = f"the evaluation of iteration {snapshot.iteration} failed", str(error)
            logger.error(f"TEST.BACKGROUND: {said}: {reason}")
            self._failure = f"{said}: {reason.strip().splitlines()[-1]}"
            return
        if results is None:
            return
        shown = ", ".join(f"{k} {v:.4f}" for k, v in results.items() if "-" not in k)
        logger.info(
            f"Evaluation of iteration {snapshot.iteration}, in "
            f"{time.monotonic() - self._began:.0f} s beside the training: {shown or 'no results'}"
        )
        deliver(self._receivers, results, snapshot.iteration, snapshot.images_seen, snapshot.path)
        os.remove(snapshot.path)
        self.pending.pop(0)
        if self.pending:
            self._begin()

    def _wait_until_fewer(self, count: int) -> None:
        """Waits until fewer than ``count`` snapshots are there, or one has failed.

        All processes learn from rank 0, so that none of them runs into a time limit.
        """
        began = time.monotonic()
        while True:
            waits = len(self.pending) >= count and not self._failure
            waits, self._failure = comm.all_gather((waits, self._failure))[0]
            if not waits:
                break
            if comm.is_main_process():
                self._receive(_LOOK)
        seconds = time.monotonic() - began
        if count == ROOM and seconds > 1 and comm.is_main_process():
            logger.warning(
                f"The training waited {seconds:.0f} s for an evaluation: set a longer "
                "TEST.EVAL_PERIOD, more TEST.BACKGROUND_THREADS or another TEST.BACKGROUND_DEVICE"
            )


def find_snapshots(folder: str) -> list[Snapshot]:
    """Returns the snapshots in a folder, in the order of their images."""
    names = (re.fullmatch(r"(\d+)_(\d+)\.pth", name) for name in os.listdir(folder))
    found = [Snapshot.at(folder, int(name[1]), int(name[2])) for name in names if name]
    return sorted(found, key=lambda snapshot: snapshot.images_seen)


def worker_config(cfg: CfgNode) -> CfgNode:
    """Returns the config of the process that evaluates. Its files are in OUTPUT_DIR/background."""
    trained_on = torch.device(cfg.MODEL.DEVICE).type
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, FOLDER)
    cfg.MODEL.DEVICE = cfg.TEST.BACKGROUND_DEVICE
    if torch.device(cfg.MODEL.DEVICE).type != trained_on:
        cfg.MODEL.COMPILE = False  # takes minutes, and may need another compiler
    cfg.freeze()
    return cfg


def check_background(cfg: CfgNode) -> None:
    """Checks the keys of ``TEST.BACKGROUND``.

    Raises:
        ValueError: a value is not valid, or cannot work here.
    """
    keys = cfg.TEST
    if not keys.BACKGROUND:
        return
    said = f"TEST.BACKGROUND_DEVICE is {keys.BACKGROUND_DEVICE!r}"
    if not re.fullmatch(r"cpu|cuda:\d+", keys.BACKGROUND_DEVICE):
        raise ValueError(f'{said}; give "cpu", or one GPU such as "cuda:7"')
    if keys.BACKGROUND_DEVICE != "cpu":
        found = torch.cuda.device_count()
        if int(keys.BACKGROUND_DEVICE[5:]) >= found:
            raise ValueError(f'{said}, and this machine has {found} GPUs; give another, or "cpu"')
    if keys.BACKGROUND_THREADS < 1:
        raise ValueError(f"TEST.BACKGROUND_THREADS is {keys.BACKGROUND_THREADS}; give 1 or more")
    if "://" in cfg.OUTPUT_DIR:
        raise ValueError(
            f"TEST.BACKGROUND is True, but OUTPUT_DIR {cfg.OUTPUT_DIR!r} is not on a disk of this "
            "machine; give a folder, or set TEST.BACKGROUND False"
        )
    if keys.EVAL_PERIOD <= 0:
        logger.warning(
            f"TEST.BACKGROUND is True, but TEST.EVAL_PERIOD is {keys.EVAL_PERIOD}: the one "
            "evaluation is that after the training, which all processes make"
        )


def _find_fault(trainer: Any, registered: list[HookBase]) -> str:
    """Returns what an evaluation in another process would do wrong; "" if there is nothing."""
    name = trainer.__class__.__name__
    for hook in registered:
        if isinstance(hook, hooks.BestCheckpointer) and not isinstance(hook, BestCheckpointer):
            return (
                "TEST.BACKGROUND is True, but a BestCheckpointer of Detectron2 is registered, "
                "which would save a later model than the evaluated one; use MEGDET.BEST_METRIC "
                "in its place, or set TEST.BACKGROUND False"
            )
    for method in ("test", "test_ema", "build_model", "build_evaluator", "build_test_loader"):
        own = trainer.__dict__.get(method)
        if own is not None and getattr(own, "__name__", "") != "_test_with_averages":
            return (
                f"TEST.BACKGROUND is True, but {method} is set on this {name} alone, which another "
                "process does not see; define it in the class, or set TEST.BACKGROUND False"
            )
    return ""


def _copy_if_due(
    checkpointer: Checkpointer, folder: str, trainer: Any, period: int, metrics: str
) -> None:
    """Copies the loaded checkpoint to the snapshots, if a stop came before its evaluation."""
    iteration = trainer.progress.loaded_iteration
    done = iteration + 1
    if period <= 0 or done % period or done >= trainer.max_iter:
        return
    snapshot = Snapshot.at(folder, iteration, trainer.images_seen)
    path = checkpointer.get_checkpoint_file()
    if os.path.isfile(snapshot.path) or not os.path.isfile(path):
        return
    if has_results(metrics, iteration):
        return
    file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if file.get("iteration") == iteration:
        shutil.copyfile(path, f"{snapshot.path}.tmp")
        os.replace(f"{snapshot.path}.tmp", snapshot.path)
