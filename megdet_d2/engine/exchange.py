"""Exchanges one message per update, with all that the processes have to know of each other."""

import zlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

# The columns of a row. The last is the first of the losses.
FAULT, SIGNAL, SKIPPED, DATA_TIME, NAMES, LOSSES = range(6)
WIDTH = 32
_NO_NAMES = 0.0


class StepExchange:
    """A table with one row of numbers per process, which every process gets once per update.

    One all-gather of 32 numbers on the CPU carries a fault that the process has found, a signal
    that it has received, its skipped images and its losses. It is sent after the backward, when
    the losses are read anyway. The optimizer waits for it, since a fault has to stop all processes
    before any weight changes. Signals, skipped images and losses are read from it afterwards.

    Every process has to construct one, in the same order as its other process groups. It has a
    separate group, so that a process that failed in forward receives no message of the model's
    collectives.

    Attributes:
        signal: number of the signal that this process has received; 0 for none.
        skipped: images that this process has skipped.
        losses: of this update and process, if its step offers them: scalars by name.
        data_time: seconds in which this process waited for its images.
        table: (processes, WIDTH) float64, of the last exchange.
    """

    def __init__(self) -> None:
        world = comm.get_world_size()
        self.group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self.signal = 0
        self.skipped = 0
        self.losses: Mapping[str, Tensor] = {}
        self.data_time = 0.0
        self.table = np.zeros((world, WIDTH))
        self._is_done = False
        self._sent: Mapping[str, Tensor] = {}

    @property
    def data_times(self) -> np.ndarray:
        """The data times of all processes, in seconds."""
        return self.table[:, DATA_TIME]

    def begin(self) -> None:
        """Starts an update."""
        self._is_done, self.losses, self._sent = False, {}, {}

    def __call__(
        self, fault: int = 0, losses: Mapping[str, float] | None = None, patience: float = 0
    ) -> np.ndarray:
        """Sends this process's row, and receives those of all. Every process has to call it.

        Args:
            fault: of this process; 0 for none.
            losses: the values of ``self.losses``.
            patience: seconds to wait for the other processes; 0 takes the group's own limit.

        Returns:
            the table.

        Raises:
            RuntimeError: another process did not call it in time.
        """
        losses = losses or {}
        row = np.zeros(WIDTH)
        row[:NAMES] = fault, self.signal, self.skipped, self.data_time
        if 0 < len(losses) <= WIDTH - LOSSES:
            row[NAMES] = zlib.crc32("\0".join(losses).encode())
            row[LOSSES : LOSSES + len(losses)] = list(losses.values())
        self.table = np.zeros((len(self.table), WIDTH))
        if self.group is None:
            self.table[0] = row
        else:
            rows = list(torch.from_numpy(self.table))  # views
            work = dist.all_gather(rows, torch.from_numpy(row), group=self.group, async_op=True)
            work.wait(timedelta(seconds=patience)) if patience else work.wait()
        self._is_done, self._sent = True, self.losses
        return self.table

    def complete(self) -> np.ndarray:
        """Sends the row, if this update has not done so. Every process has to call it.

        Returns:
            the table.
        """
        return self.table if self._is_done else self()

    def gathered(self, losses: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns the value of each loss in every process, by name.

        Args:
            losses: as they were offered in this update.

        Returns:
            {} if these were not exchanged: there are too many, or other ones in another process.
        """
        names = self.table[:, NAMES]
        if losses is not self._sent or names[0] == _NO_NAMES or (names != names[0]).any():
            return {}
        return {name: self.table[:, LOSSES + i].copy() for i, name in enumerate(losses)}
