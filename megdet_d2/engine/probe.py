"""Tests whether a micro-batch of worst-case images fits into the memory of this process's device.

The tries run on a model and an optimizer that nothing else uses. Their CGBN layers normalise over
this process alone, and there is no DDP. So no process waits for another one that has no memory
left, and the training's weights, statistics and counters are not touched.
"""

import contextlib
import copy
import gc
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from megdet_d2.memory import checkpoint_stages
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.groups import SELF
from megdet_d2.norm.keys import plain_batch_norms
from megdet_d2.optim.halves import keeps_first_half

from .memory_limit import MemoryLimit, OutOfMemoryError, state_tensors

logger = logging.getLogger(__name__)


class Probe:
    """Makes training steps of any number of worst-case images.

    Args:
        cfg: a config.
        trainer: the class that builds model and optimizer. Every process has to construct it.
        image: the worst image, as an input of the model.

    Attributes:
        reason: the last error; "" if the last try was fine.

    Raises:
        ValueError: the model has synchronised batch norms of Detectron2 or torch.
    """

    def __init__(self, cfg: CfgNode, trainer: type[DefaultTrainer], image: dict[str, Any]):
        self.reason = ""
        self._needs_two = False
        self._cfg = cfg
        self._image = image
        self._limit = MemoryLimit(cfg)
        self._model = trainer.build_model(cfg)
        self._model.train()
        _separate(self._model)
        self._optimizer: Any = trainer.build_optimizer(cfg, self._model)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # the second step should see the same weights
        self._others = self._allocate_others()

    def use_sublinear(self) -> None:
        """Turns on the stages of ``MODEL.SUBLINEAR.STAGES`` for the tries that follow."""
        checkpoint_stages(self._model, self._cfg.MODEL.SUBLINEAR.STAGES)

    def fits(self, images: int) -> bool:
        """Returns True if two micro-batches of ``images`` worst images and an update fit."""
        self.reason = ""
        if images == 1 and self._needs_two:
            images = 2
        try:
            self._train([copy.deepcopy(self._image) for _ in range(images)])
        except OutOfMemoryError as error:
            self.reason = str(error).splitlines()[0]
        except ValueError as error:
            # Alone, a process may have one value per channel, which its BN group does not.
            if images > 1 or self._needs_two or "more than 1 value per channel" not in str(error):
                raise
            self._needs_two = True
        # After the except, since the error keeps the tensors of its frames alive.
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()
        if self.reason:
            gc.collect()
        if self._cfg.MODEL.DEVICE != "cpu":
            torch.cuda.empty_cache()
        return not self.reason and (images > 1 or not self._needs_two or self.fits(1))

    def _train(self, batch: list[dict[str, Any]]) -> None:
        state = state_tensors(self._model, self._optimizer)
        with EventStorage(), self._limit.limited(state):
            try:
                self._micro_batch(batch)
            except FloatingPointError:  # of weights that nothing has loaded, on noise
                for image in batch:
                    image["image"].fill_(128)
                self._micro_batch(batch)
            self._optimizer.step()
            # With the gradients and the momentum of the first, as in the middle of a training.
            self._micro_batch(batch)

    def _micro_batch(self, batch: list[dict[str, Any]]) -> None:
        with self._precision():
            losses = self._model(batch)
            loss: Any = sum(losses.values()) if isinstance(losses, dict) else losses
        loss.backward()

    def _precision(self) -> contextlib.AbstractContextManager:
        amp = self._cfg.SOLVER.AMP
        if not amp.ENABLED:
            return contextlib.nullcontext()
        device = torch.device(self._cfg.MODEL.DEVICE).type
        return torch.autocast(device, dtype=getattr(torch, amp.PRECISION))

    def _allocate_others(self) -> list[Tensor]:
        """Takes the GPU memory of DDP's buckets, of AGVM's copy and of the averaged model."""
        if self._cfg.MODEL.DEVICE == "cpu":  # whose limit counts the tensors of a step
            return []
        trained = [p for p in self._model.parameters() if p.requires_grad]
        world_size = comm.get_world_size()
        copies = trained if world_size > 1 or keeps_first_half(self._cfg, world_size) else []
        averaged = list(self._model.parameters()) if self._cfg.MEGDET.EMA_DECAY else []
        return [torch.empty_like(parameter) for parameter in [*copies, *averaged]]


def _separate(model: nn.Module) -> None:
    """Lets no layer of ``model`` communicate."""
    for layer in cgbn_layers(model):
        layer.process_group = SELF
    if comm.get_world_size() > 1:
        for name, module in model.named_modules():
            if "SyncBatchNorm" in type(module).__name__:
                raise ValueError(
                    f"MEGDET.AUTO_MICRO_BATCH is True, and {name} is a {type(module).__name__}, "
                    "which waits for other processes, also for one that runs out of memory; use "
                    'NORM "CGBN", or set MEGDET.AUTO_MICRO_BATCH False'
                )
    plain = len(plain_batch_norms(model))
    if plain:
        logger.warning(
            f"MEGDET.AUTO_MICRO_BATCH: {plain} batch norms are plain, over the images of one "
            'micro-batch, whose size follows from the memory; NORM "CGBN" holds '
            "MODEL.CGBN.BN_SIZE, whatever fits"
        )
