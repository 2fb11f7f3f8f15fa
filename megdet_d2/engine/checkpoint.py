"""Checkpoints that appear whole or not at all, hold every group's statistics, and are checked."""

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from megdet_d2.norm.running_statistics import (
    load_normalizers,
    load_statistics,
    mean_statistics,
    own_normalizers,
    own_statistics,
    processes_per_group,
)

from .hooks import is_due
from .weights_only import WeightsOnlyCheckpointer

logger = logging.getLogger(__name__)


class Checkpointer(WeightsOnlyCheckpointer):
    """``DetectionCheckpointer`` for a trainer, with the same files, that any Detectron2 loads.

    * A file is written beside its place, synced and renamed: whoever kills the process or fills
      the disk, the previous one stays whole.
    * ``model`` has the mean of the groups' running statistics, ``processes`` each group's own.
    * Resuming checks the last checkpoint, names what is wrong with it, and takes the newest good.

    ``gather`` has to be called in every process before rank 0 saves; ``GatherStatistics`` does.
    Where BN groups are smaller than the world and it was not, rank 0's statistics are saved, as by
    Detectron2, and a warning says so.
    """

    def __init__(self, model, save_dir: str = "", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _WholeFiles(self.path_manager)
        self._gathered: tuple[int, dict[str, Any]] = (-1, {})

    def gather(self) -> None:
        """Collects on rank 0 what processes do not share. Every process has to call it."""
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
        """As Detectron2's, with ``processes`` beside ``model`` and ``trainer``.

        Raises:
            OSError: the file could not be written; the previous checkpoint is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        iteration, processes = self._gathered
        if iteration != self.checkpointables["trainer"].iter:
            processes = {}
            if processes_per_group(self.model) < comm.get_world_size():
                logger.warning(
                    f"{name}.pth has the running statistics of rank 0's BN group alone: call "
                    "checkpointer.gather() in every process before saving"
                )
        try:
            with self._mean_over(processes.get("statistics", [])):
                super().save(name, processes=processes, **kwargs)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            raise OSError(
                f"could not write {os.path.join(self.save_dir, name)}.pth ({error}); the "
                "checkpoints before it are whole. Make room in OUTPUT_DIR and go on with --resume."
            ) from error

    @contextlib.contextmanager
    def _mean_over(self, groups: list[dict]) -> Iterator[None]:
        # In the model itself, for the length of the save: fvcore takes its state_dict in there.
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
        """Whether any process sees one. Every process has to call it.

        Or one that does not, since it shares no folder with the others, would start anew alone.
        """
        return any(comm.all_gather(super().has_checkpoint()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's, from the newest good checkpoint. Every process has to call it.

        Raises:
            RuntimeError: there are checkpoints, and none of them is good, or not every process sees
                them.
        """
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=False)
        # Rank 0 looks, and all raise or load alike.
        chosen, error = comm.all_gather(self._newest_good() if comm.is_main_process() else None)[0]
        if error:
            raise RuntimeError(error)
        path = os.path.join(self.save_dir, chosen)
        seen = comm.all_gather("://" in self.save_dir or os.path.isfile(path))
        if not all(seen):
            ranks = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
            raise RuntimeError(
                f"--resume: there is a checkpoint {path!r}, and not on the machines of ranks "
                f"{ranks}; put OUTPUT_DIR where all machines see it"
            )
        rest = self.load(path)
        self._load_processes(rest.pop("processes", {}))
        return rest

    def step_back(self) -> None:
        """Makes the newest good checkpoint before the last one the last; for rank 0 to call."""
        last = self.get_checkpoint_file()
        others = self._newest_first()
        if last in others:
            older = (path for path in others[others.index(last) + 1 :] if not find_damage(path))
            self.tag_last_checkpoint(os.path.basename(next(older, last)))

    def _load_processes(self, processes: dict[str, Any]) -> None:
        world, rank = comm.get_world_size(), comm.get_rank()
        size = processes_per_group(self.model)
        groups = processes.get("statistics", [])
        if len(groups) * size == world:
            load_statistics(self.model, groups[rank // size])
        normalizers = processes.get("normalizers", [])
        if normalizers:  # of another number of processes, any is as good
            load_normalizers(self.model, normalizers[rank % len(normalizers)])

    def _newest_first(self) -> list[str]:
        return sorted(self.get_all_checkpoint_files(), key=os.path.getmtime, reverse=True)

    def _newest_good(self) -> tuple[str, str]:
        """The checkpoint to resume from, or "" and what to say."""
        last = self.get_checkpoint_file()
        if "://" in last:  # not ours to look into
            return os.path.basename(last), ""
        others = self._newest_first()
        wrong = []
        for path in [last, *(other for other in others if other != last)]:
            fault = find_damage(path)
            if not fault:
                if wrong:
                    logger.warning("%s. Resuming from %s instead.", "; ".join(wrong), path)
                return os.path.relpath(path, self.save_dir), ""
            wrong.append(f"{path} {fault}")
        return "", (
            f"--resume: there is no good checkpoint in {self.save_dir!r}: {'; '.join(wrong)}. "
            "Remove them to start anew, or put a good one there."
        )


class GatherStatistics(HookBase):
    """``Checkpointer.gather`` before each checkpoint and evaluation, in every process.

    Stands before the checkpointer and the evaluation hook, after which others may save too.
    """

    def __init__(self, checkpointer: Checkpointer, checkpoint_period: int, eval_period: int):
        self._checkpointer = checkpointer
        self._periods = checkpoint_period, eval_period

    def after_step(self):
        if is_due(self.trainer, *self._periods):
            self._checkpointer.gather()

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:  # all processes are here
            self._checkpointer.gather()


def find_damage(path: str) -> str:
    """What is wrong with a checkpoint file, or "".

    torch writes zip archives with a checksum for every tensor, and never looks at it on loading.
    """
    if not os.path.isfile(path):
        return "is not there"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damage in the directory makes it raise nearly anything
        return f"is truncated or corrupt ({error})"
    return f"is corrupt (checksum of {damaged})" if damaged else ""


def claim_run(launchers: Sequence[str], save_dir: str) -> bool:
    """Whether one of ``launchers`` began the run in ``save_dir``; else it is theirs from now on.

    Then an older run's last_checkpoint is renamed, so that a restart never resumes that one.
    """
    path, last = (os.path.join(save_dir, name) for name in ("launchers", "last_checkpoint"))
    if PathManager.isfile(path) and set(_read(path).splitlines()) & set(launchers):
        return True
    if PathManager.isfile(last):
        _write(f"{last}.old", _read(last))
        PathManager.rm(last)
        logger.warning(
            f"{save_dir!r} has the checkpoints of another run, and this one is to start anew: "
            f"renamed {last} to {last}.old"
        )
    PathManager.mkdirs(save_dir)
    _write(path, "\n".join(sorted(set(launchers))))
    return False


def _read(path: str) -> str:
    with PathManager.open(path) as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with PathManager.open(path, "w") as file:
        file.write(text)


class _WholeFiles:
    """A path manager whose written files appear whole or not at all, on local file systems."""

    def __init__(self, paths):
        self._paths = paths

    def __getattr__(self, name: str):
        return getattr(self._paths, name)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" not in mode or "://" in path:
            with self._paths.open(path, mode, **kwargs) as file:
                yield file
            return
        unfinished = f"{path}.tmp"
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
