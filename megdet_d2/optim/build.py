"""Checks ``MEGDET.OPTIMIZER`` and builds the optimizer that it names."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as d2_build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from megdet_d2.config import load_config

from .agvm import build_agvm
from .from_timm import NAMES as FROM_TIMM
from .from_timm import build_lamb, build_lars, build_muon, find_timm_fault

logger = logging.getLogger(__name__)

STOCK = "sgd"
BUILDERS = {"lars": build_lars, "lamb": build_lamb, "muon": build_muon, "agvm": build_agvm}
OPTIMIZERS = (STOCK, *BUILDERS)
"""The values of ``MEGDET.OPTIMIZER``."""

_NAME = "optimizer"  # the key of a group that names its optimizer; stock SGD's has none


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of ``MEGDET.OPTIMIZER``; with "sgd" that of Detectron2.

    The groups are Detectron2's: SOLVER.BASE_LR, BIAS_LR_FACTOR, WEIGHT_DECAY, WEIGHT_DECAY_NORM and
    WEIGHT_DECAY_BIAS. ``from_timm`` and ``agvm`` say what each optimizer does differently.
    SOLVER.CLIP_GRADIENTS clips before any of them, as Detectron2 does. The state of another
    optimizer is refused when a checkpoint is loaded.

    Args:
        cfg: a config.
        model: whose parameters are trained; frozen ones are left out.

    Raises:
        ValueError: see ``check_optimizer``; with "agvm" the backbone is frozen.
    """
    name = STOCK
    if "MEGDET" in cfg:
        check_optimizer(cfg, warn=False)
        name = cfg.MEGDET.OPTIMIZER
    if name == STOCK:
        optimizer = d2_build_optimizer(cfg, model)
    else:
        optimizer = maybe_add_gradient_clipping(cfg, BUILDERS[name](cfg, model))
        for group in optimizer.param_groups:
            group[_NAME] = name
    optimizer.register_load_state_dict_pre_hook(_refuse_other_state)
    return optimizer


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Returns the value of ``MEGDET.OPTIMIZER`` that built an optimizer; "sgd" for any other."""
    return optimizer.param_groups[0].get(_NAME, STOCK)


def warn_if_unused(name: str, optimizer: torch.optim.Optimizer, owner: str) -> None:
    """Warns where a trainer's own ``build_optimizer`` wins over ``MEGDET.OPTIMIZER``.

    Args:
        name: the key's value.
        optimizer: as the trainer has built it.
        owner: the name of the trainer's class, for the message.
    """
    if name not in (STOCK, optimizer_name(optimizer)):
        logger.warning(
            f"MEGDET.OPTIMIZER {name!r} is not used: {owner}.build_optimizer returns a "
            f"{type(optimizer).__name__}. Call super().build_optimizer(cfg, model) there to use it"
        )


def check_optimizer(cfg: CfgNode, warn: bool = True) -> None:
    """Checks ``MEGDET.OPTIMIZER`` and the ``SOLVER`` keys that it reads.

    Warns where the learning rate is still SGD's, since it fits no other optimizer.

    Args:
        cfg: a config.
        warn: False for errors alone.

    Raises:
        ValueError: the name is unknown, its package is missing, or a key is not valid with it. The
            message names the key, its value and the fix.
    """
    name, solver = cfg.MEGDET.OPTIMIZER, cfg.SOLVER
    if name not in OPTIMIZERS:
        raise ValueError(f"MEGDET.OPTIMIZER is {name!r}; use one of {', '.join(OPTIMIZERS)}")
    _check_shared_keys(cfg)
    if name == STOCK:
        return

    def refuse(key: str, value: Any, why: str) -> None:
        raise ValueError(f"{key} is {value!r}, but MEGDET.OPTIMIZER {name!r} {why}")

    if name in FROM_TIMM and (fault := find_timm_fault()):
        raise ValueError(f"MEGDET.OPTIMIZER is {name!r}, which needs {fault}")
    if name in FROM_TIMM and solver.SGD_IMPLEMENTATION:
        fix = 'is no SGD of torch; set SOLVER.SGD_IMPLEMENTATION ""'
        refuse("SOLVER.SGD_IMPLEMENTATION", solver.SGD_IMPLEMENTATION, fix)
    if solver.NESTEROV and name == "lamb":
        refuse("SOLVER.NESTEROV", True, "has no such momentum; set SOLVER.NESTEROV False")
    if solver.NESTEROV and not solver.MOMENTUM:
        fix = "with SOLVER.NESTEROV needs momentum; set SOLVER.MOMENTUM 0.9"
        refuse("SOLVER.MOMENTUM", solver.MOMENTUM, fix)
    for key in ("WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS") if name in ("lars", "lamb") else ():
        if solver[key]:
            fix = f"decays no norm and no bias; set SOLVER.{key} 0.0"
            refuse(f"SOLVER.{key}", solver[key], fix)
    _check_own_keys(cfg)
    if warn and comm.is_main_process():
        _warn_of_learning_rate(cfg)


def _refuse_other_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Refuses the state of another optimizer, which torch would load or reject by its shapes."""
    saved, own = state["param_groups"][0].get(_NAME, STOCK), optimizer_name(optimizer)
    if saved != own:
        raise ValueError(
            f"The checkpoint has the optimizer {saved!r}, but MEGDET.OPTIMIZER is {own!r}. To "
            f"resume, set MEGDET.OPTIMIZER {saved!r}; for a new training from its weights, set "
            "MODEL.WEIGHTS to it, and another OUTPUT_DIR"
        )


def _check_shared_keys(cfg: CfgNode) -> None:
    """Checks keys of all optimizers whose wrong values torch and Detectron2 take without a word."""
    momentum, clip = cfg.SOLVER.MOMENTUM, cfg.SOLVER.CLIP_GRADIENTS
    if not 0 <= momentum < 1:
        raise ValueError(f"SOLVER.MOMENTUM is {momentum}; give 0 to below 1, such as 0.9")
    if clip.ENABLED and not clip.CLIP_VALUE > 0:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE is {clip.CLIP_VALUE}, which leaves no gradient; "
            "give it above 0, or set SOLVER.CLIP_GRADIENTS.ENABLED False"
        )


def _check_own_keys(cfg: CfgNode) -> None:
    lars, agvm = cfg.MEGDET.LARS, cfg.MEGDET.AGVM
    for key, value, valid, fix in (
        ("LARS.TRUST_COEFFICIENT", lars.TRUST_COEFFICIENT, lars.TRUST_COEFFICIENT > 0, "above 0"),
        ("AGVM.INTERVAL", agvm.INTERVAL, agvm.INTERVAL >= 1, "1 or more"),
        ("AGVM.AFTER_WARMUP", agvm.AFTER_WARMUP, agvm.AFTER_WARMUP >= 0, "0 or more"),
        ("AGVM.SMOOTHING", agvm.SMOOTHING, 0 <= agvm.SMOOTHING < 1, "0 to below 1, such as 0.97"),
    ):
        if not valid:
            raise ValueError(f"MEGDET.{key} is {value}; give {fix}")


def _warn_of_learning_rate(cfg: CfgNode) -> None:
    """Warns where the config has the default learning rate, which is one of SGD."""
    name = cfg.MEGDET.OPTIMIZER
    if name not in FROM_TIMM:  # AGVM's is SGD's
        return
    node, section, key = cfg.SOLVER, "SOLVER", "BASE_LR"
    if cfg.MEGDET.POLICY:
        node, section, key = cfg.MEGDET, "MEGDET", "REFERENCE_LR"
    defaults = load_config()
    if node[key] == (defaults.MEGDET if cfg.MEGDET.POLICY else defaults.SOLVER)[key]:
        logger.warning(
            f"MEGDET.OPTIMIZER is {name!r}, and {section}.{key} {node[key]:g} is the default, a "
            f"learning rate of SGD; set one that was found for {name} (docs/large_batch.md)"
        )
