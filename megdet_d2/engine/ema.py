"""The exponential moving average (EMA) of a model's weights, which is evaluated and saved too."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from megdet_d2.norm.batch_norm import bare_model
from megdet_d2.norm.running_statistics import (
    load_statistics,
    mean_statistics,
    own_statistics,
    processes_per_group,
)

from .checkpoint import WholeFiles
from .saved_classes import SavedClasses

logger = logging.getLogger(__name__)

FOLDER = "ema"
SUFFIX = "_EMA"


def effective_decay(cfg: CfgNode) -> float:
    """Returns the decay per update: ``MEGDET.EMA_DECAY`` to the power of k.

    k is the mini-batch over ``MEGDET.REFERENCE_BATCH_SIZE``. So the average spans the same number
    of images at every mini-batch (Busbridge et al., "How to scale your EMA", NeurIPS 2023).
    """
    return cfg.MEGDET.EMA_DECAY ** (cfg.SOLVER.IMS_PER_BATCH / cfg.MEGDET.REFERENCE_BATCH_SIZE)


def check_decay(cfg: CfgNode) -> None:
    """Checks ``MEGDET.EMA_DECAY``.

    Raises:
        ValueError: it is below 0, or not below 1.
    """
    decay = cfg.MEGDET.EMA_DECAY
    if not 0 <= decay < 1:
        raise ValueError(
            f"MEGDET.EMA_DECAY is {decay}; give 0.0 for no average, or a decay below 1 such as "
            "0.9998"
        )


class WeightAverage:
    """An average of a model over its updates: weights and running statistics of batch norms.

    After the first update the average is the model. After each later one it is
    decay x average + (1 - decay) x model. Running statistics are averaged like weights, since those
    of the last weights do not fit. Counters are copied.

    As a checkpointable it saves ``updates``, ``model`` (with the mean of the groups' statistics)
    and the statistics of each BN group, so that a resumed average is equal to the bit. It saves
    ``classes`` too, for the average's own file.

    Args:
        model: as it is called in training. The average is another model on the same device.
        decay: per update, from 0 to below 1; see ``effective_decay``.
        classes: the names of the model's classes; None saves none.
    """

    def __init__(self, model: nn.Module, decay: float, classes: SavedClasses | None = None):
        self._source = bare_model(model)
        self._classes = classes
        self._averaged = AveragedModel(self._source, multi_avg_fn=_mean(decay), use_buffers=True)
        self._averaged.requires_grad_(False).eval()
        self._groups: tuple[int, list[dict[str, Tensor]]] = (-1, [])

    @property
    def model(self) -> nn.Module:
        """The averaged model, in evaluation mode."""
        return self._averaged.module

    @property
    def updates(self) -> int:
        """The number of updates that the average contains."""
        return int(self._averaged.n_averaged)

    def update(self) -> None:
        """Adds the model after an update."""
        self._averaged.update_parameters(self._source)

    def clear(self) -> None:
        """Begins again: after the next update the average is the model."""
        self._averaged.n_averaged.zero_()

    def copy_model(self) -> None:
        """Begins again with the model as it is, so that no weights from before a load stay."""
        self.clear()
        self.update()  # the first one copies
        self.clear()

    def gather(self) -> None:
        """Collects the running statistics of every BN group on rank 0, for ``state_dict``.

        Every process has to call it.
        """
        leads = comm.get_rank() % processes_per_group(self.model) == 0
        everyone = comm.gather(own_statistics(self.model) if leads else None)
        self._groups = self.updates, [group for group in everyone if group is not None]

    def state_dict(self) -> dict[str, Any]:
        """Returns ``updates``, ``model``, ``groups`` and ``classes``.

        Without a ``gather`` since the last update, ``model`` has the statistics of this process.
        """
        gathered_at, groups = self._groups
        if gathered_at != self.updates:
            groups = []
        state = dict(self.model.state_dict())
        if len(groups) > 1:
            state.update(mean_statistics(self.model, groups))
        classes = self._classes.state_dict() if self._classes else None
        return {"updates": self.updates, "model": state, "groups": groups, "classes": classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self._averaged.n_averaged.fill_(state["updates"])
        groups, size = state["groups"], processes_per_group(self.model)
        if len(groups) * size == comm.get_world_size():
            load_statistics(self.model, groups[comm.get_rank() // size])

    def save(self, folder: str, name: str) -> None:
        """Writes the averaged model as a checkpoint that stock Detectron2 loads.

        Args:
            folder: OUTPUT_DIR; the file goes into its folder "ema", so that no resume takes it.
            name: name of the file, without ".pth".
        """
        write_average(folder, name, self.state_dict())


def write_average(folder: str, name: str, state: dict[str, Any]) -> None:
    """Writes model and classes of an average's ``state_dict``; see ``WeightAverage.save``."""
    folder = os.path.join(folder, FOLDER)
    PathManager.mkdirs(folder)
    with WholeFiles(PathManager).open(os.path.join(folder, f"{name}.pth"), "wb") as file:
        # Snapshots of earlier versions have no classes here.
        torch.save({"model": state["model"], "classes": state.get("classes")}, file)


class UpdateAverage(HookBase):
    """Updates a ``WeightAverage`` after each update, and writes it after the training.

    Register it before the hooks that save or evaluate.

    Args:
        average: the trainer's.
        output_dir: OUTPUT_DIR, which gets ema/model_final.pth.
    """

    def __init__(self, average: WeightAverage, output_dir: str):
        self._average = average
        self._output_dir = output_dir

    def after_step(self) -> None:
        """Updates the average."""
        self._average.update()

    def after_train(self) -> None:
        """Writes the average of a training that all processes have completed."""
        if self.trainer.has_finished:
            self._average.gather()
            if comm.is_main_process():
                self._average.save(self._output_dir, "model_final")


def build_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """Returns the average of ``MEGDET.EMA_DECAY``; None if it is 0.0. Logs the effective decay.

    Args:
        cfg: a config.
        model: as it is called in training.
    """
    if not cfg.MEGDET.EMA_DECAY:
        return None
    decay = effective_decay(cfg)
    logger.info(
        f"MEGDET.EMA_DECAY {cfg.MEGDET.EMA_DECAY:g} is for a mini-batch of "
        f"{cfg.MEGDET.REFERENCE_BATCH_SIZE}; with SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} "
        f"the decay per update is {decay:.8g}"
    )
    return WeightAverage(model, decay, SavedClasses(cfg))


def load_average(
    average: WeightAverage | None, checkpoint: Mapping[str, Any]
) -> WeightAverage | None:
    """Loads the average of a checkpoint, and returns it; None, with a warning, if it has none.

    Args:
        average: of the config; None loads nothing.
        checkpoint: the content of the file.
    """
    if average is None:
        return None
    if "ema" not in checkpoint:  # saved before MEGDET.EMA_DECAY was set
        logger.warning("MEGDET.EMA_DECAY is set, but the checkpoint has no average to evaluate")
        return None
    average.load_state_dict(checkpoint["ema"])
    return average


def _mean(decay: float) -> Callable[..., None]:
    lerp = get_ema_multi_avg_fn(decay)

    def average(averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        if averaged[0].is_floating_point():
            lerp(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    return average
