"""The parameter groups of Detectron2, split by what an optimizer does differently."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import Tensor, nn


def default_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Returns the groups that Detectron2's ``build_optimizer`` makes for its SGD.

    Frozen parameters are in none. Groups have "lr", and "weight_decay" where it is not
    SOLVER.WEIGHT_DECAY: that of norms, and of biases where SOLVER.WEIGHT_DECAY_BIAS is set.

    Args:
        cfg: a config.
        model: whose parameters are trained.
    """
    solver = cfg.SOLVER
    return get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )


def split_groups(
    groups: list[dict[str, Any]], options_of: Callable[[Tensor], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns groups whose parameters have the same options, with these options.

    Groups, and parameters inside of a group, keep their order: a checkpoint knows them by it.

    Args:
        groups: parameter groups as dicts, each with "params".
        options_of: returns the options of a parameter, which win over those of its group.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[tuple, dict[str, Any]] = {}
        for parameter in group["params"]:
            options = options_of(parameter)
            part = parts.setdefault(tuple(options.items()), {**group, **options, "params": []})
            part["params"].append(parameter)
        split += parts.values()
    return split


def module_of(parameter_name: str) -> str:
    """Returns the module of a detector that a parameter belongs to, in AGVM's sense.

    That is "backbone", "fpn", "proposal_generator", "roi_heads.box", "roi_heads.mask", or the
    first part of the name, such as RetinaNet's "head". A backbone without an FPN is "backbone".
    """
    first, *rest = parameter_name.split(".")
    if first == "backbone":
        return "fpn" if rest and rest[0].startswith(("fpn_", "simfp_", "top_block")) else "backbone"
    if first == "roi_heads" and len(rest) > 1:
        return f"roi_heads.{rest[0].split('_')[0]}"
    return first
