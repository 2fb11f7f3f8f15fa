"""The implementation of torch's SGD: a loop, foreach or fused kernels."""

from typing import Any

import torch
from detectron2.config import CfgNode

_OPTIONS = {
    "for_loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


def check_sgd(cfg: CfgNode) -> None:
    """Checks ``SOLVER.SGD_IMPLEMENTATION``. MODEL.DEVICE has to be the one that is used.

    Raises:
        ValueError: it is unknown, or this version of torch cannot fuse SGD on the device.
    """
    name = cfg.SOLVER.SGD_IMPLEMENTATION
    if not name:
        return
    if name not in _OPTIONS:
        raise ValueError(
            f'SOLVER.SGD_IMPLEMENTATION is {name!r}; use one of {", ".join(_OPTIONS)}, or "" for '
            "Detectron2's choice"
        )
    parameter = torch.zeros(1, device=cfg.MODEL.DEVICE, requires_grad=True)
    parameter.sum().backward()
    try:
        torch.optim.SGD([parameter], lr=0.1, **_OPTIONS[name]).step()  # some find it out here
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"SOLVER.SGD_IMPLEMENTATION is {name!r}, which torch {torch.__version__} does not have "
            f"on {cfg.MODEL.DEVICE} ({error}); use foreach"
        ) from error


def set_sgd_implementation(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Makes an SGD optimizer use one implementation, now and after a checkpoint is loaded.

    Args:
        optimizer: torch's SGD or a subclass, such as Detectron2's with clipping.
        name: "for_loop", "foreach" or "fused"; "" changes nothing.

    Raises:
        ValueError: the optimizer is not an SGD.
    """
    if not name:
        return
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"SOLVER.SGD_IMPLEMENTATION is {name!r}, but the optimizer is a "
            f'{type(optimizer).__name__}; set SOLVER.SGD_IMPLEMENTATION ""'
        )

    def choose(loaded: Any = None) -> None:
        for group in optimizer.param_groups:
            group.update(_OPTIONS[name])

    choose()
    optimizer.register_load_state_dict_post_hook(choose)  # a checkpoint has its writer's choice
