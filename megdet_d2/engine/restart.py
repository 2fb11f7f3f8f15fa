"""Resumes a run by --resume, or after a restart by torchrun: all processes decide alike."""

import logging
import os
from collections.abc import Sequence

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .launch import find_launcher, may_restart

logger = logging.getLogger(__name__)


def agree_on_resume(resume: bool, save_dir: str) -> bool:
    """Returns whether to resume. Every process has to call it.

    Args:
        resume: the user's wish. Processes that torchrun has restarted resume without it.
        save_dir: OUTPUT_DIR.

    Raises:
        ValueError: ``resume`` differs between processes, as it may between machines.
    """
    asked = comm.all_gather(resume)
    if len(set(asked)) > 1:
        ranks = ", ".join(str(rank) for rank, said in enumerate(asked) if not said)
        raise ValueError(f"--resume is not given on ranks {ranks}; give it on all, or on none")
    if not resume and may_restart() and _has_begun(save_dir):
        logger.info("Restarted by torchrun: resuming")
        return True
    return resume


def _has_begun(save_dir: str) -> bool:
    # torchrun's count of restarts is not enough. Each machine's agent has another count, and a
    # start that failed before this line has left an older run's checkpoint where it was.
    launchers = comm.all_gather(find_launcher())
    begun = comm.is_main_process() and claim_run(launchers, save_dir)
    return comm.all_gather(begun)[0]


def claim_run(launchers: Sequence[str], save_dir: str) -> bool:
    """Returns True if one of ``launchers`` began the run in ``save_dir``; else records them there.

    In that case an older run's last_checkpoint is renamed, so that a restart never resumes it.

    Args:
        launchers: names from ``find_launcher``, of all processes.
        save_dir: OUTPUT_DIR.
    """
    path, last = (os.path.join(save_dir, name) for name in ("launchers", "last_checkpoint"))
    if PathManager.isfile(path) and set(_read(path).splitlines()) & set(launchers):
        return True
    if PathManager.isfile(last):
        _write(f"{last}.old", _read(last))
        PathManager.rm(last)
        logger.warning(
            f"{save_dir!r} has the checkpoints of another run, and this one starts from the "
            "beginning: "
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
