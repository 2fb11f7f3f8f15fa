"""The norm of a small tensor in one process, by torch's operator for all of it.

On a small tensor on the CPU the number of operators decides the time. torch's own is the fastest,
and it is exact enough if channels are outermost, or in float64.
"""

from typing import cast

import torch
from torch import Tensor

from . import aten
from .double_backward import differentiable_gradients

# Values of x up to which a copy of it costs less than the operators of ``functional``.
_MOST_VALUES = 65536


def few_values(x: Tensor) -> bool:
    """Returns True if :func:`batch_norm` is the fastest way for x, if it has a group of one."""
    return 0 < x.numel() <= _MOST_VALUES and not x.is_cuda


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns y = γ (x - μ_B) / √(σ²_B + ε) + β, and (2, C): mean and unbiased variance.

    y can be differentiated to any order.

    Args:
        x: (N, C, *), few values on the CPU, contiguous or channels_last.
        weight, bias: γ and β, (C,), or None for 1 and 0.
        eps: ε.
    """
    return cast(tuple[Tensor, Tensor], _BatchNorm.apply(x, weight, bias, eps))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        values, gamma, beta = x.contiguous(), weight, bias
        # With channels outermost ATen's forward adds up in float64.
        outermost = x.numel() > len(x) * x.shape[1]
        if not (outermost and aten.in_one_pass(values, weight)):
            values = x.double()
            gamma, beta = (None if t is None else t.double() for t in (weight, bias))
        moments = values.new_zeros(2, x.shape[1])
        y, mean, invstd = torch.native_batch_norm(
            values, gamma, beta, moments[0], moments[1], True, 1.0, eps
        )
        ctx.save_for_backward(x, weight, values, gamma, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(moments)
        return y if values is x else aten.like_layout(y, x), moments

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, values, gamma, mean, invstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: torch's own has two derivatives only
            count = mean.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
            gradients = differentiable_gradients(dy, x, weight, None, count, ctx.eps, "", "")
            return *(g if i else None for g, i in zip(gradients, needed, strict=True)), None
        dx, dgamma, dbeta = aten.gradients(dy, values, gamma, mean, invstd, needed)
        if dx is not None and values is not x:
            dx = aten.like_layout(dx, x)
        return dx, dgamma, dbeta, None
