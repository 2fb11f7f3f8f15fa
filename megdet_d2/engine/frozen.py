"""Finds frozen layers that no weights were loaded into, which stay random to the end."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

logger = logging.getLogger(__name__)

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, nn.GroupNorm)


def check_frozen(model: nn.Module, cfg: CfgNode, refuse: bool) -> None:
    """Checks that no layer is frozen with random weights.

    Args:
        model: after its weights were loaded.
        cfg: names the keys of the fix.
        refuse: raise; otherwise, as after a resume, warn.

    Raises:
        ValueError: there are such layers. The message names them and the fix.
    """
    layers = find_frozen_at_random(model)
    if not layers:
        return
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    said = (
        f"{', '.join(layers[:3])}{more} are frozen with random weights, since "
        f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} has none for them, and "
        f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}. Set "
        "MODEL.BACKBONE.FREEZE_AT 0, or MODEL.WEIGHTS to a file that has them"
    )
    if refuse:
        raise ValueError(said)
    logger.warning(said)


def find_frozen_at_random(model: nn.Module) -> list[str]:
    """Returns the names of frozen convolutions whose norm still has its initial values.

    Loaded weights change the norm: Detectron2's have a folded scale and shift, others have means
    and variances too. A convolution without a norm is left out, since its values do not tell.

    Args:
        model: after its weights were loaded.
    """
    frozen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not module.weight.requires_grad
    ]
    initial = {name for name, module in model.named_modules() if _is_initial(module)}
    # Detectron2's norm is an attribute of its convolution, torchvision's a neighbour.
    beside = {name.rpartition(".")[0] for name in initial if not name.endswith(".norm")}
    return [n for n in frozen if f"{n}.norm" in initial or n.rpartition(".")[0] in beside]


def _is_initial(norm: nn.Module) -> bool:
    if not isinstance(norm, _NORMS) or norm.weight is None:
        return False
    untouched = bool((norm.weight == 1).all()) and not bool(torch.count_nonzero(norm.bias))
    mean = getattr(norm, "running_mean", None)
    return untouched and (mean is None or not bool(torch.count_nonzero(mean)))
