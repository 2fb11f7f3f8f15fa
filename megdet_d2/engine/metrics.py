"""The metrics: losses of all processes; a resumed run continues them, and writes no row twice."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

logger = logging.getLogger(__name__)


def put_losses(
    storage: EventStorage, losses: Mapping[str, np.ndarray], data_times: np.ndarray
) -> None:
    """Writes what Detectron2's ``SimpleTrainer.write_metrics`` writes, without a gather.

    Args:
        storage: the trainer's.
        losses: finite values of all processes, by name.
        data_times: seconds in which each process has waited for its images.
    """
    storage.put_scalar("rank_data_time", data_times[comm.get_rank()])
    if not comm.is_main_process():
        return
    storage.put_scalar("data_time", data_times.max())  # the slowest delays all
    means = {name: np.mean(values) for name, values in losses.items()}
    storage.put_scalar("total_loss", sum(means.values()))
    if len(means) > 1:
        storage.put_scalars(**means)


def recent_scalars(storage: EventStorage, iteration: int, window: int = 20) -> dict[str, Any]:
    """Returns the last values of every scalar that was written in ``iteration``.

    A resumed run continues smoothed metrics from them. Detectron2 restarts its clock, so the
    scalars "time" and "eta_seconds" are left out.

    Args:
        storage: the trainer's.
        iteration: the last one that was completed.
        window: number of values per scalar; Detectron2 smooths over 20.

    Returns:
        by name, a dict of "smoothed" (bool) and "values", a list of (value, iteration) pairs.
    """
    hints = storage.smoothing_hints()
    return {
        name: {"smoothed": hints[name], "values": history.values()[-window:]}
        for name, history in storage.histories().items()
        if history.values()[-1][1] == iteration and name not in ("time", "eta_seconds")
    }


def restore_scalars(storage: EventStorage, scalars: dict[str, Any]) -> None:
    """Puts the result of ``recent_scalars`` into a new ``EventStorage``."""
    for name, scalar in scalars.items():
        for value, iteration in scalar["values"]:
            storage.put_scalar(name, value, scalar["smoothed"], iteration)


def cut_metrics(path: str, iteration: int, images_seen: int) -> None:
    """Cuts the rows after ``iteration`` off a metrics.json, since they will be written again.

    Rows without losses are kept if their iteration is not cut: those of evaluations, which
    Detectron2 may write after the row of a later iteration, and ``TEST.BACKGROUND`` after several.

    A row that has ``images_seen`` is compared by it, because the iterations of a run whose
    mini-batch has changed cannot be compared. An incomplete last line, left by a kill, is cut off
    too.

    Args:
        path: the file; nothing is done if there is none.
        iteration: the last one in the checkpoint.
        images_seen: images in the checkpoint.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    whole = len(lines)  # the rows before all that are cut
    for place in reversed(range(len(lines))):
        if _is_after(lines[place], iteration, images_seen):
            whole = place
        elif "total_loss" in json.loads(lines[place]):
            break
    kept = [line for line in lines[whole:] if not _is_after(line, iteration, images_seen)]
    if whole < len(lines):
        # In place: the writer has already opened the file, to append.
        os.truncate(path, sum(map(len, lines[:whole])))
        with open(path, "ab") as file:
            file.writelines(kept)
        cut = len(lines) - whole - len(kept)
        logger.info(f"Cut {cut} rows after iteration {iteration} off {path}")


def has_results(path: str, iteration: int) -> bool:
    """Returns True if a metrics.json has late results of an iteration."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        rows = [json.loads(line) for line in file if line.endswith(b"\n")]
    return any(row["iteration"] == iteration and _is_late(row) for row in rows)


def _is_late(row: dict[str, Any]) -> bool:
    return "images_seen" in row and "total_loss" not in row


def _is_after(line: bytes, iteration: int, images_seen: int) -> bool:
    if not line.endswith(b"\n"):
        return True
    row = json.loads(line)
    if "images_seen" in row:
        return row["images_seen"] > images_seen
    return row["iteration"] > iteration
