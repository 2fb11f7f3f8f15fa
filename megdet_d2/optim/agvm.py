"""AGVM, the adaptive gradient variance modulator (Xue et al., NeurIPS 2022), over SGD.

At large mini-batches the gradients of a detector's modules differ in their relative variance, since
an image gives the backbone one gradient, and the heads those of hundreds of anchors and regions.
AGVM scales the learning rate of each module i until its variance is that of the backbone, i = 1.

g_A and g_B are the gradients of two halves of the mini-batch, before clipping. With cos for the
cosine of the angle between them, and η for the learning rate of the schedule:

    Φ_i = 1 - cos(g_A,i , g_B,i)                 relative variance of module i
    r_i = √ clip((Φ_1 + ε) / (Φ_i + ε), ½, 10)   ratio to the backbone, with ε = 1e-6
    μ_i ← α μ_i + (1 - α) r_i                    moving average, from μ_i = 1
    η_i = μ_i η                                  effective learning rate

For halves of n images and small noise, Φ_i is near σ_i² / (n |G_i|²), where G_i is the mean of the
gradient and σ_i² the variance of one image's. Φ depends on no scale, so neither a loss scale nor
the number of images of a half has to be known.

The ratios are measured every ``INTERVAL`` updates, from ``AFTER_WARMUP`` updates after the warm-up
on; before, μ_i is 1. Between two measurements μ_i stays. The backbone's is always 1.

The equations, the bounds ½ and 10, ε and the place of the moving average follow the authors' public
code, of which this is a new implementation; they were not compared with the paper's line by line.
For SGD only. The authors also describe AdamW.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .groups import default_groups, module_of, split_groups

REFERENCE = "backbone"
"""The module whose variance the others are brought to."""
BOUNDS = (0.5, 10.0)
"""The least and the largest ratio of variances."""
EPSILON = 1e-6


def relative_variances(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
) -> tuple[list[str], Tensor]:
    """Computes Φ of each module.

    Args:
        pairs: of each parameter its module, and its parts of g_A and g_B, of one shape.

    Returns:
        the modules in the order in which they come, and their Φ: (modules,) float64 on the
        gradients' device. NaN where the gradient of a half is zero or not finite.
    """
    sums: dict[str, Tensor] = {}
    for module, a, b in pairs:
        # Products of float32, summed in float64: 1 - cos is a small difference.
        own = torch.stack([(x * y).sum(dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b))])
        sums[module] = sums[module] + own if module in sums else own
    if not sums:
        return [], torch.zeros(0, dtype=torch.float64)
    product, square_a, square_b = torch.stack(list(sums.values())).unbind(1)
    return list(sums), 1 - product / (square_a.sqrt() * square_b.sqrt())


def ratios(variances: Mapping[str, float]) -> dict[str, float]:
    """Computes r of each module.

    Args:
        variances: Φ by module.

    Returns:
        r by module, without modules whose Φ is not finite; {} if that is the backbone's.
    """
    reference = variances.get(REFERENCE, math.nan)
    if not math.isfinite(reference):
        return {}
    low, high = BOUNDS
    return {
        module: math.sqrt(min(max((reference + EPSILON) / (variance + EPSILON), low), high))
        for module, variance in variances.items()
        if math.isfinite(variance)
    }


class AGVM(torch.optim.SGD):
    """An SGD of torch with the learning rate μ_i η in module i.

    "lr" of every group is η before and after a step, so schedulers and logs see the schedule. μ_i
    is "lr_factor" of the module's groups, so a checkpoint has it.

    Args:
        params: groups as dicts, each with "module" and, to continue, "lr_factor".
        smoothing: α, from 0 to below 1.
        options: of ``torch.optim.SGD``.

    Raises:
        ValueError: no group is of the backbone, so there is nothing to compare with.
    """

    def __init__(self, params: Sequence[dict[str, Any]], smoothing: float = 0.97, **options: Any):
        super().__init__([{"lr_factor": 1.0, **group} for group in params], **options)
        self.smoothing = smoothing
        if REFERENCE not in self.factors:
            raise ValueError(
                "MEGDET.OPTIMIZER is 'agvm', which brings the variance of the other modules to "
                "the backbone's, but no parameter of model.backbone is trained; lower "
                "MODEL.BACKBONE.FREEZE_AT, or set MEGDET.OPTIMIZER 'sgd'"
            )

    @property
    def factors(self) -> dict[str, float]:
        """The μ of each module, in the order of the groups."""
        return {group["module"]: group["lr_factor"] for group in self.param_groups}

    def update_factors(self, variances: Mapping[str, float]) -> None:
        """Updates μ of all modules whose Φ is finite.

        Args:
            variances: Φ by module; see ``relative_variances``.
        """
        measured, alpha = ratios(variances), self.smoothing
        for group in self.param_groups:
            if group["module"] in measured:
                new = measured[group["module"]]
                group["lr_factor"] = alpha * group["lr_factor"] + (1 - alpha) * new

    def step(self, closure: Any = None) -> Any:
        """Makes one update with the effective learning rates."""
        lrs = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr_factor"] * group["lr"]
            return super().step(closure)
        finally:
            for group, lr in zip(self.param_groups, lrs, strict=True):
                group["lr"] = lr  # a division would leave another last bit


def build_agvm(cfg: CfgNode, model: nn.Module) -> AGVM:
    """Builds AGVM over Detectron2's SGD, with its groups split by module.

    Args:
        cfg: a config that ``check_optimizer`` has passed.
        model: whose parameters are trained.

    Raises:
        ValueError: the backbone is frozen, or the model has none.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    solver = cfg.SOLVER
    return AGVM(
        split_groups(default_groups(cfg, model), lambda p: {"module": module_of(names[id(p)])}),
        smoothing=cfg.MEGDET.AGVM.SMOOTHING,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
    )
