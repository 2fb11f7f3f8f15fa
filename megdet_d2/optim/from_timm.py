"""Builds LARS, LAMB and Muon of timm, with the parameter groups that their papers use.

w is a weight, g its gradient, η the learning rate, λ the weight decay and m the momentum.

LARS (You, Gitman and Ginsburg, 2017, Algorithm 1), for weights of two or more dimensions:

    r = c |w| / (|g| + λ |w|)    v ← m v + r (g + λ w)    w ← w - η v

The paper has η inside of v. The two differ while η changes, as torch's SGD does from Caffe's. r is
1 where w or g is zero.

LAMB (You et al., ICLR 2020, Algorithm 2, with φ(z) = z), for weights of two or more dimensions:

    p ← β1 p + (1 - β1) g    q ← β2 q + (1 - β2) g²
    u = (p / (1 - β1ᵗ)) / (√(q / (1 - β2ᵗ)) + ε)
    w ← w - η |w| / |u + λ w| (u + λ w)

Biases, and γ and β of norms, have no decay and no ratio of norms in both: LARS is SGD with momentum
there, and LAMB is Adam.

Muon (Jordan et al., 2024), for weights of two or more dimensions, as matrices of their output
channels by everything else:

    v ← m v + (1 - m) g    w ← (1 - η λ) w - 0.2 √max(rows, columns) η NS5(v)

NS5 takes five steps of a Newton-Schulz iteration in bfloat16, which bring all singular values near
1. The factor is that of Liu et al. (2025), with which η is AdamW's. All other parameters have
AdamW.
"""

import importlib.util
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .groups import default_groups, split_groups

NAMES = ("lars", "lamb", "muon")
"""The values of ``MEGDET.OPTIMIZER`` that need timm."""

_NO_ADAPTATION = {"always_adapt": False, "weight_decay": 0.0}


def find_timm_fault() -> str:
    """Returns what to install, as the end of a sentence; "" if timm is there."""
    if importlib.util.find_spec("timm") is None:
        return 'timm, which is not installed; run  pip install "megdet_d2[optimizers]"'
    return ""


def build_lars(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds LARS with SOLVER's momentum, and ``MEGDET.LARS.TRUST_COEFFICIENT`` as c.

    Args:
        cfg: a config that ``check_optimizer`` has passed.
        model: whose parameters are trained.
    """
    from timm.optim import Lars

    return Lars(
        split_groups(default_groups(cfg, model), _adaptation),
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        trust_coeff=cfg.MEGDET.LARS.TRUST_COEFFICIENT,
        foreach=True,  # as Detectron2's SGD, on every device
    )


def build_lamb(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds LAMB with SOLVER.MOMENTUM as β1, β2 = 0.999 and ε = 1e-6.

    Args, see ``build_lars``.
    """
    from timm.optim import Lamb

    return Lamb(
        split_groups(default_groups(cfg, model), _adaptation),
        lr=cfg.SOLVER.BASE_LR,
        betas=(cfg.SOLVER.MOMENTUM, 0.999),
        eps=1e-6,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        max_grad_norm=None,  # the paper has no clipping, and SOLVER.CLIP_GRADIENTS is one
        foreach=True,
    )


def build_muon(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds Muon with SOLVER's momentum; its AdamW has β = (0.9, 0.95).

    Args, see ``build_lars``.
    """
    from timm.optim import Muon

    return Muon(
        split_groups(default_groups(cfg, model), lambda p: {"use_muon": is_matrix(p)}),
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        # Said here, so that another default of the library does not change a training.
        ns_steps=5,
        ns_coefficients="original",
        adjust_lr_fn="match_rms_adamw",
        conv_mode="flatten",
        betas=(0.9, 0.95),
    )


def is_matrix(parameter: Tensor) -> bool:
    """Returns True for weights that Muon updates: two or more dimensions, the first two above 1.

    So depthwise convolutions, and layers with one output, are left to AdamW: an orthogonal matrix
    across unrelated channels, or of one row, is no use.
    """
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1


def _adaptation(parameter: Tensor) -> dict[str, Any]:
    return {"always_adapt": True} if parameter.ndim >= 2 else _NO_ADAPTATION
