"""The backward of Algorithm 1 in operations that autograd can differentiate, to any order.

A backward with ``create_graph`` uses it: gradient penalties, Hessians. The operators of
``functional`` are faster, but autograd cannot look into them.
"""

from typing import cast

import torch
from torch import Tensor

from . import aten
from .collective import all_reduce


def differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    count: Tensor,
    eps: float,
    group: str,
    layer: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dγ and dβ by operations that autograd can differentiate.

    μ_B and σ²_B are computed again, as functions of x. This costs two more all-reduces, and one for
    each of the three when the result is differentiated.

    Args:
        dy: x's shape, without the values that ReLU has cut.
        x, weight, valid, count, eps, group, layer: as in ``Normalization``.
    """
    if not x.requires_grad:
        # Every process records the same collectives, also one whose empty input needs no gradient.
        x = x.detach().requires_grad_()
    dtype = aten.statistics_dtype(x)
    dims = [d for d in range(x.dim()) if d != 1]
    inside = torch.ones_like(x[:, :1], dtype=torch.bool) if valid is None else valid

    def mean_over_b(sums: Tensor, name: str) -> Tensor:
        total = total_over_group(sums, group, layer, f"backward, {name} for create_graph")
        return total / count.clamp(min=1)

    mean = mean_over_b(torch.where(inside, x, 0).sum(dims, dtype=torch.float64), "mean")
    centred = x.to(dtype) - aten.per_channel(mean.to(dtype), x)
    squares = torch.where(inside, centred, 0).square()
    var = mean_over_b(squares.sum(dims, dtype=torch.float64), "variance")
    invstd = torch.rsqrt(var.to(dtype) + eps)
    x_hat = centred * aten.per_channel(invstd, x)

    slope = dy.to(dtype)
    sums = torch.stack([t.sum(dims, dtype=torch.float64) for t in (slope, slope * x_hat)])
    mean_dy, mean_dy_xhat = mean_over_b(sums, "gradient").to(dtype)
    through_b = aten.per_channel(mean_dy, x) + x_hat * aten.per_channel(mean_dy_xhat, x)
    scale = invstd if weight is None else weight.to(dtype) * invstd
    dx = aten.per_channel(scale, x) * (slope - torch.where(inside, through_b, 0))
    dbias, dweight = sums.to(dtype if weight is None else weight.dtype)
    return dx.to(x.dtype), dweight, dbias


def total_over_group(part: Tensor, group: str, layer: str, direction: str) -> Tensor:
    """Returns the sum of ``part`` over the group, as a function that autograd can differentiate.

    Args:
        part: float64, of the same shape on every process.
        group, layer, direction: as in ``all_reduce``.
    """
    return cast(Tensor, _Total.apply(part, group, layer, direction)) if group else part


class _Total(torch.autograd.Function):
    """The sum over a group. Its gradient is the sum over the group of the gradients."""

    @staticmethod
    def forward(ctx, part, group, layer, direction):
        ctx.group, ctx.layer, ctx.direction = group, layer, direction
        (total,) = all_reduce(group, layer, direction, part.flatten())
        return total.view_as(part)

    @staticmethod
    def backward(ctx, gradient):
        direction = f"differentiated {ctx.direction}"
        return total_over_group(gradient, ctx.group, ctx.layer, direction), None, None, None
