"""The arithmetic of one process, from ATen's primitives: any device, and CPU above all.

Tensors of values are dense, contiguous or channels_last, with channels second; vectors are (C,) in
the statistics' dtype, float64 for float64 values and float32 for all others. ``kernels`` has
functions of the same four names in Triton; its gradients also undo a ReLU, while here the caller
has masked dy.
"""

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Float64 for float64, float32 for every other input, half precision included."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def power_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x and Σ x² of each channel, (C,) in float64; x is not empty.

    Float64 holds a sum of squares exactly enough to take the variance from it: with a mean of 10⁴
    deviations 8 of its 16 digits remain, more than a float32 input has. But on the CPU ATen's
    kernel accumulates in float32, so where |μ| > 2σ the sums are taken again around a pivot.
    """
    n = x.numel() // x.shape[1]
    if x.is_cuda:
        # Not batch_norm_stats, whose 1 / √(σ² + ε) damages a small σ², and is 0 where both are.
        mean, var = (t.double() for t in torch.batch_norm_update_stats(x, None, None, 0.0))
        return n * mean, n * torch.addcmul(var, mean, mean)
    # ATen's own statistics are slow (contiguous) or lose five digits (channels_last), so the sums
    # come from the kernel that is meant for gradients.
    sums, squares = _sums_of_products(x, x, None)
    if bool((sums.square() > 0.8 * n * squares).any()):  # |μ| > 2σ
        pivot = (sums / n).to(statistics_dtype(x))
        centred = x - per_channel(pivot, x)
        pivot = pivot.double()
        rest, squares = _sums_of_products(centred, centred, None)
        sums = rest + n * pivot
        squares += pivot * (sums + rest)
    return sums, squares


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy and Σ dy x̂, (C,), with x̂ = (x - mean) · invstd; x is not empty."""
    dy = like_layout(dy, x)
    if x.is_cuda:
        ones = torch.ones_like(mean)
        _, _, products, sums = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, ones, False, True, True
        )
        return sums, products
    sums, products = _sums_of_products(dy, x, mean)
    return sums.to(mean.dtype), (products * invstd).to(mean.dtype)


def normalize(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """(x - mean) · scale + bias, then + residual where there is one, then max(0, ·) on demand."""
    y = _affine(x, mean, scale, bias)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    """dx = scale · (dy - mean_dy - x̂ mean_dy_xhat), in x's dtype and layout; x is not empty."""
    dy = like_layout(dy, x)
    if x.is_cuda:
        # The kernel divides the sums it is given by the count: here they are means already, and a
        # count of 1 cannot overflow its int32.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, scale / invstd, mean_dy, mean_dy_xhat / invstd, one
        )
    # Half precision is rounded once, at the end: mean_dy may be far larger than what is left of dy.
    dtype, x = x.dtype, x.to(mean.dtype)
    dx = _affine(x, mean, -scale * invstd * mean_dy_xhat, -scale * mean_dy)
    return dx.addcmul_(dy.to(dx.dtype), per_channel(scale, dx).to(dx.dtype)).to(dtype)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) in the shape that broadcasts against x (N, C, *)."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def like_layout(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's dtype and layout, which the primitives expect of it."""
    if dy.stride() == x.stride() and dy.dtype == x.dtype:
        return dy
    return torch.empty_like(x).copy_(dy)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # Batch norm's evaluation: one read, one write. Variance 1 and ε 0 leave the scale as it is.
    if x.is_cuda:
        return torch.batch_norm_elemt(x, scale, bias, mean, torch.ones_like(mean), 0.0)
    ones = torch.ones_like(mean)
    return torch.native_batch_norm(x, scale, bias, mean, ones, False, 0.0, 0.0)[0]


def _sums_of_products(a: Tensor, b: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ a and Σ a (b - mean), (C,) in float64, of CPU tensors of one layout.

    ATen adds up in float32. So each channel is cut into lanes, whose sums are short, and the lanes
    are added up in float64.
    """
    channels, n = a.shape[1], a.numel() // a.shape[1]
    ones = torch.ones(channels, dtype=statistics_dtype(a))
    means = torch.zeros_like(ones) if mean is None else mean
    if n > len(a) and a.is_contiguous():  # a channel is summed by whole vectors
        size = n // len(a)
        lanes = next((g for g in range(-(-n // 4096), size) if size % g == 0), size)
        if lanes > 1:
            a, b = (t.view(len(t), channels * lanes, -1) for t in (a, b))
            ones, means = (t.repeat_interleave(lanes) for t in (ones, means))
        sums = _native_sums(a, b, means, ones)
        return tuple(t.double().view(channels, lanes).sum(1) for t in sums)
    # Channels are innermost, and a channel's values are summed one by one.
    lanes = -(-n // 512)
    if lanes == 1:
        return tuple(t.double() for t in _native_sums(a, b, means, ones))
    a, b = (t.movedim(1, -1).reshape(n, channels) for t in (a, b))
    whole = n // lanes * lanes
    cut = (t[:whole].view(-1, lanes * channels) for t in (a, b))
    sums = _native_sums(*cut, means.repeat(lanes), ones.repeat(lanes))
    rest = _native_sums(a[whole:], b[whole:], means, ones) if whole < n else (0.0, 0.0)
    return tuple(
        t.double().view(lanes, channels).sum(0) + r for t, r in zip(sums, rest, strict=True)
    )


def _native_sums(a: Tensor, b: Tensor, mean: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    # With training=False the kernel takes the statistics it is given, and the mask ends it at the
    # sums for γ and β. Variance 1 and ε 0 leave b - mean as it is.
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        a, b, ones, mean, ones, None, None, False, 0.0, (False, True, True)
    )
    return sums, products
