"""How far a training has come, in images, and what a resume with another mini-batch changes."""

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a mini-batch is made up: batch_size = processes x accumulation_steps x images_per_gpu."""

    processes: int
    accumulation_steps: int
    images_per_gpu: int

    @property
    def batch_size(self) -> int:
        """Images of one update."""
        return self.processes * self.accumulation_steps * self.images_per_gpu


def updates_done(images_seen: int, batch_size: int) -> int:
    """The updates of ``batch_size`` that ``images_seen`` images amount to, rounded up."""
    return -(-images_seen // batch_size)


def describe_resume(
    before: Layout, after: Layout, images_seen: int, iterations: tuple[int, int], lrs: tuple
) -> str:
    """What a resume changes, as a table for the log: what, before, after. "" if nothing.

    Args:
        before, after: of the checkpoint and of the config.
        images_seen: images the checkpoint has seen.
        iterations: done, in mini-batches of each.
        lrs: base learning rates.
    """
    keys = {
        "processes": (before.processes, after.processes),
        "images a GPU and micro-batch": (before.images_per_gpu, after.images_per_gpu),
        "MEGDET.ACCUMULATION_STEPS": (before.accumulation_steps, after.accumulation_steps),
        "SOLVER.IMS_PER_BATCH": (before.batch_size, after.batch_size),
        "SOLVER.BASE_LR": lrs,
        "iterations done": iterations,
    }
    rows = [(key, *pair) for key, pair in keys.items() if pair[0] != pair[1]]
    if not rows:
        return ""
    table = tabulate(rows, headers=("key", "before", "after"), tablefmt="pipe")
    ahead = iterations[1] * after.batch_size - images_seen
    if before.batch_size != after.batch_size and ahead > 0:
        table += (
            f"\n{images_seen} images are no whole number of mini-batches of {after.batch_size}: the"
            f" schedule goes on {ahead} images ahead of the data, which go on exactly."
        )
    return table


def recent_scalars(storage: Any, iteration: int, window: int = 20) -> dict[str, Any]:
    """The last values of every scalar written in ``iteration``: what smoothed metrics follow from.

    Returns:
        by name, whether it is smoothed, and (value, iteration) pairs. Not those of the clock, which
        Detectron2 starts anew.
    """
    hints = storage.smoothing_hints()
    return {
        name: {"smoothed": hints[name], "values": history.values()[-window:]}
        for name, history in storage.histories().items()
        if history.values()[-1][1] == iteration and name not in ("time", "eta_seconds")
    }


def restore_scalars(storage: Any, scalars: dict[str, Any]) -> None:
    """Puts ``recent_scalars`` into a new ``EventStorage``."""
    for name, scalar in scalars.items():
        for value, iteration in scalar["values"]:
            storage.put_scalar(name, value, scalar["smoothed"], iteration)


def cut_metrics(path: str, iteration: int, images_seen: int) -> None:
    """Cuts the rows behind ``iteration``, which will be trained again, off a metrics.json.

    A row that says its ``images_seen`` is measured by it: in a run whose mini-batch has changed
    iterations do not compare. A last line that is torn, by a kill, goes too.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = len(lines)
    while kept and _is_behind(lines[kept - 1], iteration, images_seen):
        kept -= 1
    if kept < len(lines):
        # In place: the writer has opened the file already, to append.
        os.truncate(path, sum(map(len, lines[:kept])))
        logger.info(f"Cut {len(lines) - kept} rows behind iteration {iteration} off {path}")


def _is_behind(line: bytes, iteration: int, images_seen: int) -> bool:
    if not line.endswith(b"\n"):
        return True
    row = json.loads(line)
    if "images_seen" in row:
        return row["images_seen"] > images_seen
    return row["iteration"] > iteration
