"""Algorithm 1 of MegDet (§3.3): batch normalisation over the mini-batch B = B_1 ∪ … ∪ B_n that the
n processes of a group hold between them.

Forward, over all |B| values of a channel::

    μ_B  = Σ x / |B|            σ²_B = Σ (x - μ_B)² / |B|
    x̂    = (x - μ_B) / √(σ²_B + ε)          y = γ x̂ + β

Backward, with the sums again over the whole of B::

    dx = γ / √(σ²_B + ε) · (dy - Σ dy / |B| - x̂ · Σ dy x̂ / |B|)
    dγ = Σ dy x̂     dβ = Σ dy      (over this process's B_i: DDP averages parameters' gradients)

Statistics and collectives live in ``torch.library`` custom operators which take their group by
name. So ``torch.compile`` traces through them, and selective activation checkpointing that saves
``megdet_d2::statistics`` repeats neither a collective nor an update of the running statistics.

Every operator takes x of shape (N, C, *), 2-D to 5-D, contiguous or channels_last, of any floating
dtype; N may be 0 and may differ, as may the sizes behind it, from process to process. Statistics
are float32 for half precision and float32 inputs, float64 for float64; the sums travel as float64.
"""

import torch
from torch import Tensor

from .collective import all_reduce

ALGORITHMS = ("one_reduce", "two_pass")


def cross_gpu_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    momentum: float | None,
    eps: float,
    group: str,
    algorithm: str = "one_reduce",
    layer: str = "",
) -> Tensor:
    """y = CGBN(x), in x's shape and dtype.

    Args:
        x: (N, C, *), this process's part of the mini-batch; N = 0 is an ordinary part.
        weight, bias: γ and β, (C,), or None for 1 and 0.
        running_mean, running_var, num_batches_tracked: updated in place where given, as
            ``nn.BatchNorm2d`` does (unbiased variance), unless the whole mini-batch has fewer than
            two values a channel or its statistics are not finite: then they keep what they had.
        num_batches_skipped: counts the mini-batches for which they did, where there was a value.
        momentum: weight of the new statistics; None for the cumulative average.
        eps: ε.
        group: name of the process group to normalise over; "" for this process alone.
        algorithm: "one_reduce" sends |B_i|, Σx and Σx² together; "two_pass" is the paper's order, a
            reduction for μ_B and, from it, another for σ²_B.
        layer: a name for errors, the same on every process.

    Raises:
        ValueError: on CPU, in every process of the group, where the mini-batch holds one value a
            channel. On CUDA, where asking would stall the host, such a batch yields β.
    """
    mean, var, count = statistics(
        x.detach(),
        running_mean,
        running_var,
        num_batches_tracked,
        num_batches_skipped,
        momentum,
        group,
        algorithm,
        layer,
    )
    if weight is not None:
        weight = weight.to(mean.dtype)
    if bias is not None:
        bias = bias.to(mean.dtype)
    return normalize(x, weight, bias, mean, var, count, eps, group, layer)


# --- forward: statistics -------------------------------------------------------------------------


@torch.library.custom_op(
    "megdet_d2::statistics",
    mutates_args=("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped"),
)
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    momentum: float | None,
    group: str,
    algorithm: str,
    layer: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """μ_B and σ²_B (C,) in the statistics' dtype, and |B| (1,) in float64: lines 1 to 10."""
    n = x.numel() // x.shape[1]
    local_mean, local_var = _local_moments(x)
    local_count = local_mean.new_full((1,), n)
    if algorithm == "one_reduce":
        # Σx² = n (σ² + μ²). Float64 leaves room for means of 10⁵ deviations before the difference
        # below loses the digits a float32 input has.
        count, total, squares = all_reduce(
            group,
            layer,
            "forward",
            local_count,
            n * local_mean,
            n * (local_var + local_mean.square()),
        )
        mean = total / count.clamp(min=1)
        var = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    else:
        count, total = all_reduce(group, layer, "forward", local_count, n * local_mean)
        mean = total / count.clamp(min=1)
        # Line 7's Σ (x - μ_B)² over B_i, by the local moments instead of another pass over x.
        squares = n * (local_var + (local_mean - mean).square())
        (squares,) = all_reduce(group, layer, "forward, variance", squares)
        var = squares / count.clamp(min=1)

    if x.device.type == "cpu" and count == 1:
        raise ValueError(
            "CrossGPUBatchNorm: expected more than 1 value per channel over the group in training, "
            f"got input size {tuple(x.shape)}. Use a larger batch or BN size."
        )
    if running_mean is not None:
        # `where`, not `if`: on CUDA the host never waits to learn |B|.
        keep = (count > 1) & mean.isfinite().all() & var.isfinite().all()
        batches = num_batches_tracked + keep.squeeze(0)
        num_batches_tracked.copy_(batches)
        num_batches_skipped += ((count > 0) & ~keep).squeeze(0)
        factor = 1.0 / batches.clamp(min=1).double() if momentum is None else momentum
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            old = running.double()
            running.copy_(torch.where(keep, (1 - factor) * old + factor * new, old))

    dtype = _statistics_dtype(x)
    return mean.to(dtype), var.to(dtype), count


@statistics.register_fake
def _(x, running_mean, running_var, tracked, skipped, momentum, group, algorithm, layer):
    mean = x.new_empty(x.shape[1], dtype=_statistics_dtype(x))
    return mean, torch.empty_like(mean), x.new_empty(1, dtype=torch.float64)


# --- forward: normalisation ----------------------------------------------------------------------


@torch.library.custom_op("megdet_d2::normalize", mutates_args=())
def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    group: str,
    layer: str,
) -> Tensor:
    """Line 11: y = γ (x - μ_B) / √(σ²_B + ε) + β. Its gradient holds the backward all-reduce."""
    return _affine(_dense(x), weight, bias, mean, var, eps)


@normalize.register_fake
def _(x, weight, bias, mean, var, count, eps, group, layer):
    return torch.empty_like(_dense(x))


def _save_for_backward(ctx, inputs, output):
    x, weight, _, mean, var, count, ctx.eps, ctx.group, ctx.layer = inputs
    ctx.save_for_backward(x, weight, mean, var, count)


def _normalize_backward(ctx, dy):
    x, weight, mean, var, count = ctx.saved_tensors
    # The collective is unconditional: whether x needs a gradient may differ between processes
    # (one without proposals builds its empty input itself), and a peer must never wait in vain.
    sum_dy, sum_dy_xhat, mean_dy, mean_dy_xhat = gradient_sums(
        dy, x, mean, var, count, ctx.eps, ctx.group, ctx.layer
    )
    dx = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(dy, x, weight, mean, var, mean_dy, mean_dy_xhat, ctx.eps)
    dweight = sum_dy_xhat if ctx.needs_input_grad[1] else None
    dbias = sum_dy if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias, None, None, None, None, None, None


normalize.register_autograd(_normalize_backward, setup_context=_save_for_backward)


# --- backward ------------------------------------------------------------------------------------


@torch.library.custom_op("megdet_d2::gradient_sums", mutates_args=())
def gradient_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    group: str,
    layer: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ dy and Σ dy x̂ over this process's B_i, then both over B divided by |B|; each (C,)."""
    sum_dy, sum_dy_xhat = _local_gradient_sums(dy, x, mean, var, eps)
    total_dy, total_dy_xhat = all_reduce(
        group, layer, "backward", sum_dy.double(), sum_dy_xhat.double()
    )
    total = count.clamp(min=1)
    return sum_dy, sum_dy_xhat, (total_dy / total).to(mean), (total_dy_xhat / total).to(mean)


@gradient_sums.register_fake
def _(dy, x, mean, var, count, eps, group, layer):
    return tuple(torch.empty_like(mean) for _ in range(4))


@torch.library.custom_op("megdet_d2::input_gradient", mutates_args=())
def input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    eps: float,
) -> Tensor:
    """dx = γ / √(σ²_B + ε) · (dy - mean_dy - x̂ mean_dy_xhat), in x's shape, dtype and layout."""
    x = _dense(x)
    dy = _like_layout(dy, x)
    invstd = torch.rsqrt(var + eps)
    if x.is_cuda and x.numel() > 0:
        # The kernel divides the sums it is given by the count: here they are means already, and a
        # count of 1 cannot overflow its int32.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat / invstd, one
        )
    scale = invstd if weight is None else weight * invstd
    dx = _affine(x, -scale * mean_dy_xhat, -scale * mean_dy, mean, var, eps)
    return dx.addcmul_(dy, scale.to(dx.dtype).view(-1, *[1] * (x.dim() - 2)))


@input_gradient.register_fake
def _(dy, x, weight, mean, var, mean_dy, mean_dy_xhat, eps):
    return torch.empty_like(_dense(x))


# --- the arithmetic of one process, from ATen's primitives ---------------------------------------


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _local_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of this process's values, float64; zeros where it has none."""
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        return zeros, zeros
    x = _dense(x)
    if x.is_cuda:
        # Not batch_norm_stats, whose 1 / √(σ² + ε) damages a small σ², and is 0 where both are.
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean.double(), var.double()
    # ATen's own statistics are slow (contiguous) or lose five digits (channels_last), so the sums
    # come from the kernel that is meant for gradients. σ² as Σx²/n - μ² keeps its digits where the
    # mean is within two deviations of zero, as it mostly is; elsewhere x is centred first.
    mean, var = _raw_moments(x)
    if bool((mean.square() > 4 * var).any()):
        pivot = mean.to(_statistics_dtype(x))
        mean, var = _raw_moments(x - pivot.view(-1, *[1] * (x.dim() - 2)))
        mean += pivot
    return mean, var


def _raw_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.numel() // x.shape[1]
    zeros = torch.zeros(x.shape[1], dtype=_statistics_dtype(x))
    total, squares = _sums_of_products(x, x, zeros)
    mean = total / n
    return mean, (squares / n - mean.square()).clamp(min=0)


def _local_gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Σ dy and Σ dy x̂ (C,) of this process's values."""
    if x.numel() == 0:
        zeros = torch.zeros_like(mean)
        return zeros, torch.zeros_like(mean)
    x = _dense(x)
    dy = _like_layout(dy, x)
    invstd = torch.rsqrt(var + eps)
    if x.is_cuda:
        _, _, sum_dy_xhat, sum_dy = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, torch.ones_like(mean), False, True, True
        )
        return sum_dy, sum_dy_xhat
    sum_dy, sum_dy_xmu = _sums_of_products(dy, x, mean)
    return sum_dy.to(mean), (sum_dy_xmu * invstd).to(mean)


def _sums_of_products(a: Tensor, b: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ a and Σ a (b - mean), (C,) in float64, of dense CPU tensors of one layout.

    ATen adds up in float32. So each channel is cut into lanes, whose sums are short, and the lanes
    are added up in float64.
    """
    channels, n = a.shape[1], a.numel() // a.shape[1]
    if a.dim() == 2 or not a.is_contiguous():  # channels are innermost, and summed one by one
        lanes = _num_lanes(a.shape[-1] if a.dim() > 2 else 1, n, 512)
        a, b = (t.movedim(1, -1).reshape(-1, lanes * channels) for t in (a, b))
        mean, layout, across = mean.repeat(lanes), (lanes, channels), 0
    else:  # channels are outermost, and summed by whole vectors
        lanes = _num_lanes(a.shape[2], n, 4096)
        a, b = (t.view(len(t), channels * lanes, -1) for t in (a, b))
        mean, layout, across = mean.repeat_interleave(lanes), (channels, lanes), 1
    # With training=False the kernel takes the statistics it is given, and the mask ends it at the
    # sums for γ and β. Variance 1 and ε 0 leave b - mean as it is.
    ones = torch.ones_like(mean)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        a, b, ones, mean, ones, None, None, False, 0.0, (False, True, True)
    )
    return tuple(t.view(layout).sum(across, dtype=torch.float64) for t in (sums, products))


def _num_lanes(size: int, length: int, longest: int) -> int:
    """The least divisor of ``size`` that cuts ``length`` values into lanes of ``longest``."""
    return next((g for g in range(1, size) if size % g == 0 and length <= g * longest), size)


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """weight · (x - mean) / √(var + eps) + bias: one read, one write."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, torch.rsqrt(var + eps), eps)
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _dense(x: Tensor) -> Tensor:
    """x itself where the primitives take its layout as it is, a contiguous copy otherwise."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.is_contiguous() or (
        x.dim() in layouts and x.is_contiguous(memory_format=layouts[x.dim()])
    ):
        return x
    return x.contiguous()


def _like_layout(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's dtype and layout, which the primitives expect of it."""
    if dy.stride() == x.stride() and dy.dtype == x.dtype:
        return dy
    return torch.empty_like(x).copy_(dy)
