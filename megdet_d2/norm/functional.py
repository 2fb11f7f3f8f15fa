"""The operators and the autograd function of Algorithm 1 (MegDet §3.3).

The n processes of a group hold the mini-batch B = B_1 ∪ … ∪ B_n. The layer normalises over it.

Forward, over all |B| values of a channel::

    μ_B  = Σ x / |B|            σ²_B = Σ (x - μ_B)² / |B|
    x̂    = (x - μ_B) / √(σ²_B + ε)          y = γ x̂ + β

Backward, with the sums again over the whole of B. The gradients of γ and β are summed over this
process's B_i only, because DDP averages the gradients of parameters::

    dx = γ / √(σ²_B + ε) · (dy - Σ dy / |B| - x̂ · Σ dy x̂ / |B|)
    dγ = Σ dy x̂     dβ = Σ dy

The statistics, the normalisation and the backward are ``torch.library`` operators, which take their
process group by its name. So ``torch.compile`` can trace through them. Selective activation
checkpointing that saves ``megdet_d2::statistics`` repeats neither a collective nor an update of the
running statistics.

x has the shape (N, C, *), 2-D to 5-D, contiguous or channels_last, and any floating dtype. N may be
0. N and the sizes after C may differ between processes. Statistics are float64 for a float64 x and
float32 for any other. The sums are sent as float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megdet_d2._older_torch import infer_schema

from . import aten, kernels
from .collective import (
    all_reduce,
    compare_stamps,
    mismatch_flag,
    new_message,
    send,
    stamp_of,
)
from .double_backward import differentiable_gradients

ALGORITHMS = ("one_reduce", "two_pass")

# A layer's running_mean, running_var, num_batches_tracked and num_batches_skipped.
Buffers = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def use_triton(x: Tensor) -> bool:
    """Returns True where Triton's kernels run the passes over x, False where ATen's primitives do.

    Only Triton's kernels fuse the activation.
    """
    return x.is_cuda and kernels.available()


def runs_triton(x: Tensor) -> bool:
    """Returns True if Triton's kernels run on x. They do not take an empty x, ATen's way does."""
    return use_triton(x) and x.numel() > 0


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def dense(x: Tensor) -> Tensor:
    """Returns x if it is contiguous or channels_last, and a contiguous copy otherwise."""
    if x.is_contiguous() or (
        x.dim() in _LAYOUTS and x.is_contiguous(memory_format=_LAYOUTS[x.dim()])
    ):
        return x
    return x.contiguous()


# The functions behind the operators, by name. benchmarks/launches.py counts what they launch.
implementations: dict[str, Callable] = {}


def _operator(mutates: tuple[str, ...] = ()):
    """Returns a decorator that makes a function the operator ``megdet_d2::<name>`` on all devices.

    A call goes through the operator only where something watches operators, and otherwise straight
    to the function. A detector makes hundreds of these calls per step, and torch's dispatch costs
    the host 15 us for each.

    Args:
        mutates: names of the arguments that the function changes in place.
    """

    def define(function):
        implementations[function.__name__] = function
        name = f"megdet_d2::{function.__name__}"
        torch.library.define(name, infer_schema(function, mutates_args=mutates))
        torch.library.impl(name, "default")(function)
        operator = getattr(torch.ops.megdet_d2, function.__name__).default

        @functools.wraps(function)
        def call(*args):
            if watched(args[0]):  # autograd does not look into an operator
                return operator(*map(_without_gradient, args))
            return function(*args)

        return call

    return define


def _without_gradient(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def watched(x: Tensor) -> bool:
    """Returns True where torch has to see operators.

    It compiles, traces, transforms or profiles, or a mode or a subclass of Tensor looks at them.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or _dispatch_modes() > 0
        or _is_profiled()
        or is_transformed()
    )


def is_transformed() -> bool:
    """Returns True where ``torch.jit.trace``, ``torch.func`` or forward-mode gradients look on."""
    return _is_traced() or _has_transforms() or torch.autograd.forward_ad._current_level >= 0


# Looked up once, for the host's time.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_profiled = torch._C._autograd._profiler_enabled
_is_traced = torch._C._is_tracing
_has_transforms = torch._C._are_functorch_transforms_active


# --- forward -------------------------------------------------------------------------------------


@_operator(
    mutates=("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped"),
)
def statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    momentum: float | None,
    eps: float,
    group: str,
    algorithm: str,
    layer: str,
) -> tuple[Tensor, Tensor]:
    """Returns the values of each channel that the layer needs: lines 1 to 10 of Algorithm 1.

    Args:
        x: (N, C, *), this process's part B_i of the mini-batch. N may be 0.
        weight, bias: γ and β, (C,), or None for 1 and 0.
        valid: bool, (N, 1, *), true at the values that belong to B; None if all do.
        running_mean, running_var: (C,), updated in place, or both None. They keep their values
            where the mini-batch has fewer than two values per channel, or statistics that are not
            finite.
        num_batches_tracked: counts the mini-batches that updated them; or None.
        num_batches_skipped: counts the mini-batches that had values and did not update them; or
            None.
        momentum: weight of the new statistics; None for the cumulative average, which leaves them
            unchanged without ``num_batches_tracked``.
        eps: ε.
        group: name of the process group to normalise over; "" for this process alone.
        algorithm: "one_reduce" sends |B_i|, Σx and Σx² together. "two_pass" follows the paper: a
            reduction for μ_B and, from it, a second one for σ²_B. On CPU "one_reduce" makes the
            second one too, for a float64 x whose mean is more than 10⁴ deviations from zero.
        layer: the layer's name, for errors; the same on every process.

    Returns:
        (4, C) in the statistics' dtype: μ_B, 1 / √(σ²_B + ε), γ / √(σ²_B + ε) and β; and |B|,
        (1,), float64.

    Raises:
        ValueError: on CPU, in every process of the group: B has one value per channel. On CUDA this
            check would stall the host, so such a batch yields β.
        OutOfStepError: the processes are in different layers; see ``collective``.
    """
    buffers = running_mean, running_var, num_batches_tracked, num_batches_skipped
    if runs_triton(x):
        # For a float64 x a second pass is exact, and in one process it costs no collective.
        two_pass = algorithm == "two_pass" or (x.dtype == torch.float64 and not group)
        return _statistics_by_kernels(
            x, weight, bias, valid, buffers, momentum, eps, group, two_pass, layer
        )
    with torch.no_grad():
        return _statistics_by_aten(
            x, weight, bias, valid, buffers, momentum, eps, group, algorithm, layer
        )


@torch.library.register_fake("megdet_d2::statistics")
def _(
    x, weight, bias, valid, running_mean, running_var, tracked, skipped, momentum, eps, group,
    algorithm, layer,
):  # fmt: skip
    stats = x.new_empty(4, x.shape[1], dtype=aten.statistics_dtype(x))
    return stats, x.new_empty(1, dtype=torch.float64)


def _statistics_by_aten(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    buffers: Buffers,
    momentum: float | None,
    eps: float,
    group: str,
    algorithm: str,
    layer: str,
) -> tuple[Tensor, Tensor]:
    """Returns what ``statistics`` does, by ATen's primitives."""
    if not group and valid is None and x.dtype != torch.float64 and aten.has_few_values(x):
        return _statistics_of_few(x, weight, bias, buffers, momentum, eps)
    sums, squares, n = _local_sums(x, valid)
    # The same message for both algorithms, and for the kernels, which a process with values uses.
    sums, squares, count = all_reduce(group, layer, "forward", sums, squares, n)
    # Without a group |B| is known. Small layers are then made of few operations.
    known = x.numel() // x.shape[1] if not group and valid is None else None
    values = count.clamp(min=1) if known is None else max(1, known)
    mean = sums / values
    var = torch.addcmul(squares / values, mean, mean, value=-1)
    if algorithm == "two_pass" or _cancels(x, group, mean, var):
        # Line 7, Σ (x - μ_B)² over B_i, around a pivot that x's dtype can hold.
        pivot = mean.to(aten.statistics_dtype(x))
        sums, squares, _ = _local_sums(x - aten.per_channel(pivot, x), valid)
        rest = mean - pivot
        squares += rest * (n * rest - 2 * sums)
        (squares,) = all_reduce(group, layer, "forward, variance", squares)
        var = squares / values
    var.clamp_(min=0)

    update = _update_on_device if x.is_cuda else _update_on_host
    update(*buffers, momentum, mean, var, count)
    dtype = aten.statistics_dtype(x)
    invstd = torch.rsqrt(var.to(dtype) + eps)
    scale = invstd if weight is None else weight * invstd
    shift = torch.zeros_like(invstd) if bias is None else bias
    stats = torch.cat([t.to(dtype) for t in (mean, invstd, scale, shift)])
    return stats.view(4, -1), count


def _statistics_of_few(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: Buffers,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns what ``statistics`` does in one process on a CPU, in few operations."""
    n = x.numel() // x.shape[1]
    refuse_one_value(n)
    dtype = aten.statistics_dtype(x)
    if aten.is_exact_in_torch(x, weight, eps):  # by the same operation as ``by_torch``, bit by bit
        _, mean, invstd, new = aten.batch_norm(x, weight, None, eps)
    else:
        mean, var = aten.moments(x)
        new = unbiased(mean, var, n)
        mean, invstd = mean.to(dtype), var.to(dtype).add_(eps).rsqrt_()
    move_running_statistics(*buffers, momentum, new, n)
    scale = invstd if weight is None else (weight * invstd).to(dtype)
    shift = torch.zeros_like(invstd) if bias is None else bias.to(dtype)
    return torch.stack((mean, invstd, scale, shift)), x.new_full((1,), n, dtype=torch.float64)


def runs_by_torch(x: Tensor, weight: Tensor | None, valid: Tensor | None, eps: float) -> bool:
    """Returns True where ``by_torch`` is the fastest way through a layer without a group."""
    return (
        # Not in traced code, which would be compiled again for sizes on the other side of a limit.
        not (use_triton(x) or torch.compiler.is_compiling())
        and valid is None
        and aten.is_exact_in_torch(x, weight, eps)
        and not watched(x)
    )


def by_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: Buffers,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Returns the output of a layer in training by torch's batch norm, with torch's gradient.

    Statistics, output and gradients equal those of ``statistics`` and ``Normalization`` bit by bit,
    and the running statistics are updated as there. The arguments are those of ``statistics``.
    """
    n = x.numel() // x.shape[1]
    refuse_one_value(n)
    y, _, _, new = aten.batch_norm(x, weight, bias, eps)
    move_running_statistics(*buffers, momentum, new, n)
    return y


def _statistics_by_kernels(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    buffers: Buffers,
    momentum: float | None,
    eps: float,
    group: str,
    two_pass: bool,
    layer: str,
) -> tuple[Tensor, Tensor]:
    """Returns what ``statistics`` does, by two kernels, or three for ``two_pass`` in a group."""
    channels = x.shape[1]
    message = new_message(x, 2 * channels + 1, group)
    own = x.new_empty(2 * channels + 1, dtype=torch.float64) if two_pass else None
    stamp = stamp_of(layer, "forward") if group else None
    kernels.power_sums(x, valid, message, stamp, own)
    processes = send(message, group, layer, "forward")
    second = None
    if own is not None and group:
        second = new_message(x, channels, group)
        kernels.deviations(own, message, second, stamp_of(layer, "forward, variance"))
        send(second, group, layer, "forward, variance")
    elif own is not None:
        second = own[channels:]
    stats = x.new_empty(4, channels, dtype=aten.statistics_dtype(x))
    count = x.new_empty(1, dtype=torch.float64)
    kernels.finish(
        message, second, weight, bias, *buffers, momentum, eps, stats, count, processes,
        mismatch_flag(group, x.device),
    )  # fmt: skip
    for running in buffers[:2]:  # changed where autograd does not see it
        if running is not None and not running.is_inference():
            torch.autograd.graph.increment_version(running)
    return stats, count


@_operator()
def normalize(x: Tensor, stats: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Returns y = (x - μ_B) · γ / √(σ²_B + ε) + β: line 11 of Algorithm 1.

    Args:
        x: (N, C, *); y has its shape, dtype and layout.
        stats: (4, C), of ``statistics``.
        residual: x's shape, any dtype and layout, added to y; or None.
        relu: returns max(0, y).
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    if runs_triton(x):
        return kernels.normalize(x, stats, residual, relu)
    if residual is not None:
        residual = aten.like_layout(residual, x)
    mean, _, scale, bias = stats.unbind()
    return aten.normalize(x, mean, scale, bias, residual, relu)


@torch.library.register_fake("megdet_d2::normalize")
def _(x, stats, residual, relu):
    return torch.empty_like(x)


# --- backward ------------------------------------------------------------------------------------


class Normalization(torch.autograd.Function):
    """The normalisation: line 11 of Algorithm 1, with its gradient through μ_B and σ²_B.

    Its backward can be differentiated again, to any order, see ``differentiable_gradients``.

    Args of ``apply``:
        x: (N, C, *), contiguous or channels_last, see ``dense``.
        weight, bias: γ and β, (C,), or None for 1 and 0.
        residual: x's shape and dtype, added to y; or None.
        valid: as in ``statistics``. The other values are normalised with the statistics of B, and
            their dy has no influence on them.
        stats, count: of ``statistics``.
        eps: ε.
        relu: y is max(0, ·) of the result.
        group, layer: as in ``statistics``.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, valid, stats, count, eps, relu, group, layer):
        y = normalize(x, stats, residual, relu)
        # The backward needs the sign of y. It reads y, unless a kernel computes it from x.
        ctx.mask_dy_first = relu and not use_triton(x)
        mask = y if relu and (ctx.mask_dy_first or residual is not None) else None
        ctx.save_for_backward(x, weight, valid, stats, count, mask)
        ctx.eps, ctx.relu, ctx.group, ctx.layer = eps, relu, group, layer
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, valid, stats, count, y = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        relu = ctx.relu
        # With create_graph, autograd records this backward. It could not look into the operators,
        # nor see that the statistics depend on x.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if relu:
                if y is None:
                    y = normalize(x.detach(), stats, None, True)
                dy = torch.where(y.detach() <= 0, 0, dy)
            recorded = differentiable_gradients(
                dy, x, weight, valid, count, ctx.eps, ctx.group, ctx.layer
            )
            needed = ctx.needs_input_grad[:4]
            return (
                *(g if i else None for g, i in zip((*recorded, dy), needed, strict=True)),
                *[None] * 7,
            )
        if ctx.mask_dy_first:
            dy, y, relu = torch.ops.aten.threshold_backward(dy, y, 0), None, False
        # Not in traced code, which would be compiled again for sizes on the other side of a limit.
        here = not (ctx.group or use_triton(x) or torch.compiler.is_compiling())
        if here and valid is None and aten.in_one_pass(x, weight):
            wanted = needs_x, needs_weight, needs_bias
            dx, dweight, dbias = aten.gradients(dy, x, weight, stats[0], stats[1], wanted)
            return dx, dweight, dbias, dy if needs_residual else None, *[None] * 7
        needs_masked = needs_residual and relu
        dx, masked, sums = gradients(
            dy, x, stats, count, valid, relu, y, needs_x or needs_masked, needs_masked, ctx.group,
            ctx.layer,
        )  # fmt: skip
        return (
            dx if needs_x else None,
            sums[1] if needs_weight else None,
            sums[0] if needs_bias else None,
            (masked if relu else dy) if needs_residual else None,
            *[None] * 7,
        )


@_operator()
def gradients(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    count: Tensor,
    valid: Tensor | None,
    relu: bool,
    y: Tensor | None,
    needs_x: bool,
    needs_masked: bool,
    group: str,
    layer: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x and the residual, and the sums that are those of γ and β.

    The collective is unconditional, because needs_x may differ between processes: one without
    proposals makes an empty input that needs no gradient. Its peers would wait for ever.

    Args:
        dy: x's shape, any floating dtype.
        x, stats, count, valid, group, layer: as in ``Normalization``.
        relu: sets dy to 0 where the output was not positive.
        y: the output, to read its sign. Without y the output is computed again from x.
        needs_x: returns dx.
        needs_masked: returns dy masked by ``relu``, the gradient of the residual; with needs_x.

    Returns:
        dx and the masked dy, in x's shape, dtype and layout, or empty where they are not needed;
        Σ dy and Σ dy x̂ over B_i, (2, C) in the statistics' dtype.

    Raises:
        OutOfStepError: the processes are in different layers; see ``collective``.
    """
    if runs_triton(x):
        dx, masked, sums = _gradients_by_kernels(
            dy, x, stats, count, valid, relu, y, needs_x, needs_masked, group, layer
        )
    else:  # the caller has masked dy, unless x is empty
        sums, totals = gradient_sums(dy, x, stats, group, layer)
        dx = input_gradient(dy, x, stats, totals, count, valid) if needs_x else None
        masked = torch.empty_like(x) if needs_masked else None
    # An operator's results share no memory.
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if masked is None else masked, sums


@torch.library.register_fake("megdet_d2::gradients")
def _(dy, x, stats, count, valid, relu, y, needs_x, needs_masked, group, layer):
    dx, masked = (torch.empty_like(x) if i else x.new_empty(0) for i in (needs_x, needs_masked))
    return dx, masked, stats.new_empty(2, x.shape[1])


def gradient_sums(
    dy: Tensor, x: Tensor, stats: Tensor, group: str, layer: str
) -> tuple[Tensor, Tensor]:
    """Returns Σ dy and Σ dy x̂, over B_i as (2, C) and over B as 2 C float64 values."""
    if x.numel() == 0:
        sums = stats.new_zeros(2, x.shape[1])
    else:
        mean, invstd = stats[:2].unbind()
        sums = torch.stack(aten.gradient_sums(dy, x, mean, invstd))
    (totals,) = all_reduce(group, layer, "backward", sums.double().flatten())
    return sums, totals


def input_gradient(
    dy: Tensor, x: Tensor, stats: Tensor, totals: Tensor, count: Tensor, valid: Tensor | None
) -> Tensor:
    """Returns dx = γ / √(σ²_B + ε) · (dy - Σ dy / |B| - x̂ Σ dy x̂ / |B|)."""
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, invstd, scale, _ = stats.unbind()
    means = (totals / count.clamp(min=1)).to(stats.dtype).view(2, -1)
    dx = aten.input_gradient(dy, x, mean, invstd, scale, means[0], means[1])
    if valid is not None:
        dx = torch.where(valid, dx, dy * aten.per_channel(scale, dy).to(dy.dtype))
    return dx


def _gradients_by_kernels(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    count: Tensor,
    valid: Tensor | None,
    relu: bool,
    y: Tensor | None,
    needs_x: bool,
    needs_masked: bool,
    group: str,
    layer: str,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns what ``gradients`` does, by two kernels."""
    message = new_message(x, 2 * x.shape[1], group)
    stamp = stamp_of(layer, "backward") if group else None
    sums = kernels.gradient_sums(dy, x, stats, relu, y, message, stamp)
    processes = send(message, group, layer, "backward")
    flag = mismatch_flag(group, x.device)
    if not needs_x:
        if flag is not None:
            compare_stamps(message, processes, flag)
        return None, None, sums
    dx, masked = kernels.input_gradient(
        dy, x, stats, message, count, valid, relu, y, needs_masked, processes, flag
    )
    return dx, masked, sums


# --- running statistics -------------------------------------------------------------------------


def _update_on_host(running_mean, running_var, tracked, skipped, momentum, mean, var, count):
    """Moves the running statistics towards those of B, as described in ``statistics``."""
    n = count.item()
    refuse_one_value(n)
    new = unbiased(mean, var, n)
    move_running_statistics(running_mean, running_var, tracked, skipped, momentum, new, n)


def refuse_one_value(n: float) -> None:
    """Raises a ValueError if a channel has n = 1 value, which has no variance."""
    if n == 1:
        raise ValueError(
            "CrossGPUBatchNorm: expected more than 1 value per channel over the group in training, "
            "and the whole mini-batch holds one. Raise SOLVER.IMS_PER_BATCH or MODEL.CGBN.BN_SIZE."
        )


def unbiased(mean: Tensor, var: Tensor, n: float) -> Tensor:
    """Returns the mean and the unbiased variance, (2, C), of n values with this biased variance."""
    return torch.stack((mean, var * (n / max(n - 1, 1))))


def move_running_statistics(running_mean, running_var, tracked, skipped, momentum, new, n):
    """Moves the running statistics towards those of n values, ``new`` as ``unbiased`` returns it.

    The buffers and momentum are those of ``statistics``.
    """
    if running_mean is None and tracked is None:
        return
    # In the buffers' dtype: a variance may overflow in a module of half precision.
    dtype = torch.float32 if running_mean is None else running_mean.dtype
    new = new if new.dtype == dtype else new.to(dtype)
    if n > 1 and torch.linalg.vector_norm(new, torch.inf).item() < torch.inf:
        factor = 0.0 if momentum is None else momentum
        if tracked is not None:
            tracked += 1
            factor = 1 / tracked.item() if momentum is None else momentum
        if running_mean is not None:
            mean, var = new.unbind()
            running_mean.lerp_(mean, factor)
            running_var.lerp_(var, factor)
    elif n > 0 and skipped is not None:
        skipped += 1


def _update_on_device(running_mean, running_var, tracked, skipped, momentum, mean, var, count):
    """Does the same with ``where`` in place of ``if``, so that the host never waits for |B|.

    A mini-batch of one value is no error here.
    """
    if running_mean is None and tracked is None:
        return
    n = count.squeeze(0)
    new = torch.stack((mean, var * (n / (n - 1).clamp(min=1))))
    new = new.to(torch.float32 if running_mean is None else running_mean.dtype)
    keep = (n > 1) & (new.abs().max() < torch.inf)
    factor = 0.0 if momentum is None else momentum
    if tracked is not None:
        tracked += keep
        if momentum is None:
            factor = (1 / tracked.clamp(min=1)).to(new.dtype)
    if skipped is not None:
        skipped += (n > 0) ^ keep
    if running_mean is not None:
        for running, value in ((running_mean, new[0]), (running_var, new[1])):
            running.copy_(torch.where(keep, running.lerp(value, factor), running))


def _cancels(x: Tensor, group: str, mean: Tensor, var: Tensor) -> bool:
    """Returns True where E[x²] - μ² may have lost more than half of its 16 digits.

    All processes return the same, because they compare the same sums. A float32 x has fewer digits
    itself. On CUDA the host would wait for the sums.
    """
    if x.dtype != torch.float64:
        return False
    return not group if x.is_cuda else bool((mean.square() > 1e8 * var).any())


# --- the part of one process ---------------------------------------------------------------------


def _local_sums(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Σ x (C,), Σ x² (C,) and |B_i| (1,) over B_i, float64."""
    if x.numel() == 0:
        zeros = x.new_zeros(2, x.shape[1], dtype=torch.float64)
        return zeros[0], zeros[1], zeros.new_zeros(1)
    if valid is None:
        sums, squares = aten.power_sums(x)
        return sums, squares, sums.new_full((1,), x.numel() // x.shape[1])
    # Plain passes: the host never waits for the number of values.
    n = valid.sum(dtype=torch.float64).view(1)
    dims = [d for d in range(x.dim()) if d != 1]
    sums = torch.where(valid, x, 0).sum(dims, dtype=torch.float64)
    pivot = (sums / n.clamp(min=1)).to(aten.statistics_dtype(x))
    centred = torch.where(valid, x - aten.per_channel(pivot, x), 0)
    pivot = pivot.double()
    squares = centred.square_().sum(dims, dtype=torch.float64)
    return sums, squares + pivot * (2 * sums - n * pivot), n
