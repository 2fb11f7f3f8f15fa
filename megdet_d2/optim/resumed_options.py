"""The options that a config gives an optimizer, where a checkpoint brings others."""

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

_KEYS = {
    "weight_decay": "SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM or WEIGHT_DECAY_BIAS",
    "momentum": "SOLVER.MOMENTUM",
    "betas": "SOLVER.MOMENTUM",
    "nesterov": "SOLVER.NESTEROV",
    "trust_coeff": "MEGDET.LARS.TRUST_COEFFICIENT",
}
"""Option of a group of parameters -> the keys that decide it."""


def keep_options(optimizer: torch.optim.Optimizer, config_wins: bool) -> None:
    """Makes a resume use or name the options of the config that differ from the checkpoint's.

    torch replaces an optimizer's options, such as its weight decay, by those of the state that it
    loads. The learning rate is left out: the schedule sets it.

    Args:
        optimizer: as the config has built it; no state was loaded.
        config_wins: True if the config's options are used; False if a warning says that they are
            not, as those of a schedule in Detectron2's iterations.
    """
    own = [{key: group[key] for key in _KEYS if key in group} for group in optimizer.param_groups]
    sizes = [len(group["params"]) for group in optimizer.param_groups]

    def compare(_: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        groups = state["param_groups"]
        saved_sizes = [len(group["params"]) for group in groups]
        if saved_sizes != sizes:
            raise ValueError(
                f"The checkpoint's optimizer has groups of {_listed(saved_sizes)} parameters, and "
                f"that of this config {_listed(sizes)}. MODEL.BACKBONE.FREEZE_AT, "
                "SOLVER.BIAS_LR_FACTOR, WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS decide them. To "
                "resume, set them as before; for a new training from its weights, set "
                "MODEL.WEIGHTS to it, and another OUTPUT_DIR"
            )
        changes = [
            {key: value for key, value in options.items() if group.get(key, value) != value}
            for group, options in zip(groups, own, strict=True)
        ]
        if not any(changes):
            return None
        texts = (
            f"{key} of {group[key]} by {value} ({_KEYS[key]})"
            for group, changed in zip(groups, changes, strict=True)
            for key, value in changed.items()
        )
        listed = "; ".join(dict.fromkeys(texts))  # groups often have the same
        if not config_wins:
            logger.warning(
                f"MEGDET.POLICY is '', so the optimizer keeps the checkpoint's options, and does "
                f"not replace {listed}. Set MEGDET.POLICY, or start a new training from its weights"
            )
            return None
        logger.info(f"--resume replaces the optimizer's {listed}")
        groups = [group | changed for group, changed in zip(groups, changes, strict=True)]
        return state | {"param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(compare)


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
