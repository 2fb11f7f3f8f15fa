"""Checkpoints that are atomic, are checked, and hold the running statistics of every BN group."""

import contextlib
import copy
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from megdet_d2._moved import renamed
from megdet_d2.norm.running_statistics import (
    load_normalizers,
    load_statistics,
    mean_statistics,
    own_normalizers,
    own_statistics,
    processes_per_group,
)

from .hooks import is_due
from .uninterrupted import uninterrupted
from .weights_only import WeightsOnlyCheckpointer

logger = logging.getLogger(__name__)


class Checkpointer(WeightsOnlyCheckpointer):
    """A ``DetectionCheckpointer`` for a trainer; stock Detectron2 loads its files.

    * A file is written beside its place, synced and renamed. A kill or a full disk leaves the
      previous checkpoint whole.
    * ``model`` has the mean of the groups' running statistics, ``processes`` those of each group.
    * A resume checks the last checkpoint, names its damage, and takes the newest good one.

    Every process has to call ``gather`` before rank 0 saves; ``GatherStatistics`` does. Without it,
    and with several BN groups, the statistics of rank 0 are saved, as by Detectron2, with a
    warning.

    Args:
        model: as it is called in training, with its DDP.
        save_dir: folder of the checkpoints.
        kwargs: as for ``DetectionCheckpointer``; the key "trainer" is required for saving.
    """

    path_manager: Any

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any):
        super().__init__(model, save_dir, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        self.path_manager = WholeFiles(self.path_manager)
        self._gathered: tuple[int, dict[str, Any]] = (-1, {})
        self._resumed = ""  # the file, while it is loaded

    def gather(self) -> None:
        """Collects on rank 0 the state that processes do not share. Every process has to call it.

        That is the running statistics of each BN group and the loss normalizer of each process.
        """
        size = processes_per_group(self.model)
        leads = comm.get_rank() % size == 0
        mine = own_statistics(self.model) if leads else None, own_normalizers(self.model)
        everyone = comm.gather(mine)
        if everyone:
            groups = [statistics for statistics, _ in everyone if statistics is not None]
            normalizers = [normalizer for _, normalizer in everyone]
            state = {"statistics": groups, "normalizers": normalizers}
            self._gathered = (self.checkpointables["trainer"].iter, state)

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves as Detectron2 does, with ``processes`` beside ``model`` and ``trainer``.

        Args:
            name: name of the file, without ".pth".
            kwargs: other values to save, by their keys.

        Raises:
            OSError: the file could not be written; the previous checkpoint is unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        iteration, processes = self._gathered
        if iteration != self.checkpointables["trainer"].iter:
            processes = {}
            if processes_per_group(self.model) < comm.get_world_size():
                logger.warning(
                    f"{name}.pth has only the running statistics of rank 0's BN group: call "
                    "checkpointer.gather() in every process before saving"
                )
        try:
            with self._mean_over(processes.get("statistics", [])):
                super().save(name, processes=processes, **kwargs)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            raise OSError(
                f"could not write {os.path.join(self.save_dir, name)}.pth ({error}); the "
                "checkpoints before it are whole. Make room in OUTPUT_DIR and continue with "
                "--resume."
            ) from error

    def save_aside(self, path: str, **kwargs: Any) -> None:
        """Saves as ``save`` does, into another folder, so that no resume takes the file.

        Args:
            path: the file, with ".pth".
            kwargs: see ``save``.
        """
        aside = copy.copy(self)  # a signal may save meanwhile
        aside.save_dir, name = os.path.split(path)
        aside.save(name.removesuffix(".pth"), **kwargs)

    @contextlib.contextmanager
    def _mean_over(self, groups: list[dict]) -> Iterator[None]:
        # In the model itself, during the save, because fvcore reads its state_dict there.
        if len(groups) < 2:
            yield
            return
        own = own_statistics(self.model)
        load_statistics(self.model, mean_statistics(self.model, groups))
        try:
            yield
        finally:
            load_statistics(self.model, own)

    def has_checkpoint(self) -> bool:
        """Returns True if any process sees a checkpoint. Every process has to call it.

        Otherwise a process that shares no folder with the others would start again alone.
        """
        return any(comm.all_gather(super().has_checkpoint()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the newest good checkpoint, or loads ``path``, as Detectron2 does.

        Every process has to call it.

        Args:
            path: weights to load where nothing is resumed.
            resume: resume if there is a checkpoint.

        Returns:
            the content of the file that nothing has loaded.

        Raises:
            RuntimeError: there are checkpoints, and none of them is good, or not every process sees
                them.
            ValueError: the checkpoint to resume is of another model.
        """
        self._gathered = (-1, {})  # of the iterations that are about to come again
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=False)
        # Rank 0 decides, so that all raise or load alike.
        chosen, error = comm.all_gather(self._newest_good() if comm.is_main_process() else None)[0]
        if error:
            raise RuntimeError(error)
        path = os.path.join(self.save_dir, chosen)
        seen = comm.all_gather("://" in self.save_dir or os.path.isfile(path))
        if not all(seen):
            ranks = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
            raise RuntimeError(
                f"--resume: there is a checkpoint {path!r}, but not on the machines of ranks "
                f"{ranks}; put OUTPUT_DIR where all machines see it"
            )
        self._resumed = path
        try:
            rest = self.load(path)
        finally:
            self._resumed = ""
        self._load_processes(rest.pop("processes", {}))
        progress = self.checkpointables.get("progress")
        if "iteration" in rest and progress is not None and progress.loaded_iteration is None:
            # A file of another checkpointer may be without the trainer.
            self.checkpointables["trainer"].iter = rest["iteration"]
        return rest

    def step_back(self) -> None:
        """Makes the newest good checkpoint before the last one the last. Only rank 0 calls it."""
        last = self.get_checkpoint_file()
        others = self._newest_first()
        if last in others:
            older = (path for path in others[others.index(last) + 1 :] if not find_damage(path))
            self.tag_last_checkpoint(os.path.basename(next(older, last)))

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if self._resumed:
            self._refuse_other_model(incompatible)
        super()._log_incompatible_keys(incompatible)

    def _refuse_other_model(self, incompatible: Any) -> None:
        """Refuses a checkpoint that lacks trained weights of this model, or has other shapes.

        Frozen parameters may be missing, and those that the model leaves out of its ``state_dict``.
        """
        shapes = {name: (there, here) for name, there, here in incompatible.incorrect_shapes}
        missing, saved = (
            {*incompatible.missing_keys} - shapes.keys(),
            self.model.state_dict().keys(),
        )
        names: dict[nn.Parameter, list[str]] = {}  # a shared parameter has several
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and name in saved:
                names.setdefault(parameter, []).append(name)
        faults = [
            f"{name} is {there} there and {here} here" for name, (there, here) in shapes.items()
        ]
        faults += [f"{own[0]} is not there" for own in names.values() if missing.issuperset(own)]
        if faults:
            more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError(
                f"--resume: the checkpoint {self._resumed!r} is of another model than the "
                f"config's: {', '.join(faults[:3])}{more}. Give the config that it was trained "
                "with; or, for a new training from its weights, set MODEL.WEIGHTS to it, and "
                "another OUTPUT_DIR"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = super()._load_file(filename)
        _move_progress(checkpoint)
        return checkpoint

    def _load_processes(self, processes: dict[str, Any]) -> None:
        world, rank = comm.get_world_size(), comm.get_rank()
        size = processes_per_group(self.model)
        groups = processes.get("statistics", [])
        if len(groups) * size == world:
            load_statistics(self.model, groups[rank // size])
        normalizers = processes.get("normalizers", [])
        if normalizers:  # with another number of processes, any of them will do
            load_normalizers(self.model, normalizers[rank % len(normalizers)])

    def _newest_first(self) -> list[str]:
        return sorted(self.get_all_checkpoint_files(), key=os.path.getmtime, reverse=True)

    def _newest_good(self) -> tuple[str, str]:
        """Returns the name of the checkpoint to resume from, or "", and an error message."""
        last = self.get_checkpoint_file()
        if "://" in last:  # a remote file is not checked
            return os.path.basename(last), ""
        others = self._newest_first()
        wrong: list[str] = []
        for path in [last, *(other for other in others if other != last)]:
            fault = find_damage(path)
            if not fault:
                if wrong:
                    logger.warning("%s. Resuming from %s instead.", "; ".join(wrong), path)
                return os.path.relpath(path, self.save_dir), ""
            wrong.append(f"{path} {fault}")
        return "", (
            f"--resume: there is no good checkpoint in {self.save_dir!r}: {'; '.join(wrong)}. "
            "Remove them to start again, or put a good one there."
        )


class GatherStatistics(HookBase):
    """Collects in every process what a checkpoint needs, before each checkpoint and evaluation.

    Register it before the checkpointer's and the evaluation's hook. Hooks that save the best model
    come after an evaluation, and a signal during an evaluation saves a checkpoint too.

    Args:
        checkpointer: the trainer's, whose ``gather`` is called.
        checkpoint_period: iterations between two checkpoints; 0 for none.
        eval_period: iterations between two evaluations; 0 for none.
        others: other functions to call before ``gather``.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        checkpoint_period: int,
        eval_period: int,
        *others: Callable[[], None],
    ):
        self._functions = [*others, checkpointer.gather]
        self._periods = checkpoint_period, eval_period

    def after_step(self) -> None:
        """Collects if a checkpoint or an evaluation follows."""
        if is_due(self.trainer, *self._periods):
            self._collect()

    def after_train(self) -> None:
        """Collects once more after a training that all processes have completed."""
        if self.trainer.has_finished:
            self._collect()

    def _collect(self) -> None:
        for function in self._functions:
            function()


def adopt_checkpointer(other: FvcoreCheckpointer) -> Checkpointer:
    """Makes a checkpointer of another class one of ours too, in place; returns it.

    Its class becomes a subclass of ``Checkpointer`` and of its former class, whose methods are
    called from ours. So also its files are written whole and have every group's statistics.
    """
    kind = type(other)
    if not isinstance(other, Checkpointer):
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        other.__class__ = type(kind.__name__, (Checkpointer, kind), names)
        cast(Checkpointer, other)._prepare()
    return cast(Checkpointer, other)


def find_damage(path: str) -> str:
    """Returns the damage of a checkpoint file, as the end of a sentence; "" if there is none.

    torch writes zip archives with a checksum for every tensor, but does not check them on loading.
    """
    if not os.path.isfile(path):
        return "is not there"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory raises many kinds
        return f"is truncated or corrupt ({error})"
    return f"is corrupt (checksum of {damaged})" if damaged else ""


def _move_progress(checkpoint: dict[str, Any]) -> None:
    """Moves the progress of a file to its key; version 0.1.0 had it in the trainer's."""
    trainer = checkpoint.get("trainer")
    if isinstance(trainer, dict) and "megdet" in trainer:
        progress = trainer.pop("megdet")
        checkpoint["progress"] = progress | {"backoff": progress.pop("relief", {})}


class WholeFiles:
    """A path manager that writes local files whole or not at all.

    A signal that would end the process meanwhile ends it when the file is written.
    """

    def __init__(self, paths: Any):
        self._paths = paths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._paths, name)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Iterator[IO]:
        if "w" not in mode or "://" in path:
            with self._paths.open(path, mode, **kwargs) as file:
                yield file
            return
        unfinished = f"{path}.tmp"
        with uninterrupted():
            try:
                with self._paths.open(unfinished, mode, **kwargs) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(unfinished)
                raise
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename too
            finally:
                os.close(folder)


__getattr__ = renamed(__name__, find_fault="find_damage")
