"""The passes of Algorithm 1 over one process's values, by ATen's primitives, for any device.

Tensors of values are (N, C, *), contiguous or channels_last. Vectors are (C,), in the statistics'
dtype: float64 for float64 values, and float32 for all others. ``kernels`` has functions of the same
four names in Triton. Its gradients include the ReLU; here the caller has masked dy.
"""

import torch
from torch import Tensor

# Values that ATen's kernel may add up in float32: whole vectors at a time, or one by one.
_MOST_VALUES, _MOST_VALUES_INNERMOST = 4096, 512
# Values of a tensor up to which ATen's statistics in float64 are the fastest: contiguous, where it
# adds up one by one, or with the channels innermost.
_FEW_VALUES, _FEW_VALUES_INNERMOST = 2**16, 2**19


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Returns float64 for a float64 x, and float32 for any other, half precision included."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def has_few_values(x: Tensor) -> bool:
    """Returns True for a CPU tensor that is not empty and so small that ``moments`` is fastest."""
    values = x.numel()
    most = _FEW_VALUES if x.is_contiguous() else _FEW_VALUES_INNERMOST
    return 0 < values <= most and not x.is_cuda


def is_exact_in_torch(x: Tensor, weight: Tensor | None, eps: float) -> bool:
    """Returns True if torch's own batch norm of x is as exact as the passes here, and faster.

    That is a small CPU tensor of float32 values whose channels ATen adds up by whole vectors. With
    ε = 0 ATen's 1 / √(σ² + ε) of a constant channel is 0, and hides that it is infinite.
    """
    return (
        eps > 0
        and x.dtype == torch.float32
        and (weight is None or weight.dtype == torch.float32)
        and _is_summed_by_channel(x)
        and has_few_values(x)
        and _sums_up_well(x)
    )


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns torch's batch norm of x, for which ``is_exact_in_torch``.

    Returns:
        The output; the mean and 1 / √(σ² + ε) of each channel, (C,); the mean and the unbiased
        variance, (2, C).
    """
    # At a momentum of 1 the statistics of x take the place of the running ones.
    new = x.new_zeros(2, x.shape[1])
    means, variances = new.unbind()
    y, mean, invstd = torch.native_batch_norm(x, weight, bias, means, variances, True, 1.0, eps)
    return y, mean, invstd, new


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the biased variance of each channel, (C,), by sums in float64.

    They are float32 for a contiguous float32 x, and else float64. With the channels innermost ATen
    adds up in x's dtype. So x is converted there.
    """
    exact = x if _is_summed_by_channel(x) and x.dtype == torch.float32 else x.double()
    return torch.batch_norm_update_stats(exact, None, None, 0.0)


def power_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Σ x and Σ x² of each channel, (C,), float64; x is not empty.

    A float64 sum of squares is exact enough for the variance. With a mean of 10⁴ deviations, 8 of
    its 16 digits remain, more than a float32 input has. But on the CPU ATen's kernel accumulates in
    float32. So where |μ| > 2σ the sums are computed again around a pivot.
    """
    n = x.numel() // x.shape[1]
    if x.is_cuda:
        # Not batch_norm_stats: its 1 / √(σ² + ε) loses a small σ², and is 0 where both are 0.
        mean, var = (t.double() for t in torch.batch_norm_update_stats(x, None, None, 0.0))
        return n * mean, n * torch.addcmul(var, mean, mean)
    if has_few_values(x):
        exact = x.double()
        mean, var = torch.batch_norm_update_stats(exact, None, None, 0.0)
        # ATen adds up a mean value by value, so for float64 it serves as a pivot only.
        sums = exact.sum([d for d in range(x.dim()) if d != 1])
        return sums, torch.addcmul(n * var, mean, 2 * sums - n * mean)
    # ATen's statistics are slow (contiguous) or lose five digits (channels_last). So the sums come
    # from ATen's kernel for gradients.
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
    """Returns Σ dy and Σ dy x̂, (C,), with x̂ = (x - mean) · invstd; x is not empty."""
    dy = like_layout(dy, x)
    if x.is_cuda:
        ones = torch.ones_like(mean)
        _, _, products, sums = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, ones, False, True, True
        )
        return sums, products
    sums, products = _sums_of_products(dy, x, mean)
    return sums.to(mean.dtype), (products * invstd).to(mean.dtype)


def in_one_pass(x: Tensor, weight: Tensor | None) -> bool:
    """Returns True if ATen's own backward of batch norm is exact enough for x, for one process.

    It adds up in x's dtype, so a channel may have few values only; see ``_sums_of_products``. Few
    values in all are converted to float64.
    """
    if x.is_cuda or x.numel() == 0 or x.dtype != statistics_dtype(x):
        return False
    return has_few_values(x) or _needs_no_conversion(x, weight)


def _needs_no_conversion(x: Tensor, weight: Tensor | None) -> bool:
    return _sums_up_well(x) and (weight is None or weight.dtype == x.dtype)


def _sums_up_well(x: Tensor) -> bool:
    """Returns True if a channel of x has few enough values to be added up in x's dtype."""
    n = x.numel() // x.shape[1]
    return n <= (_MOST_VALUES if _is_summed_by_channel(x) else _MOST_VALUES_INNERMOST)


def _is_summed_by_channel(x: Tensor) -> bool:
    """Returns True where the values of a channel are neighbours, False where the channels are."""
    return x.is_contiguous() and x.numel() // x.shape[1] > len(x)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx, dγ and dβ where B is in this process, by one operator; see ``in_one_pass``.

    Args:
        needed: which of the three.
    """
    backward = torch.ops.aten.native_batch_norm_backward
    if _needs_no_conversion(x, weight):
        # Where torch's own batch norm may run instead, dy stays as autograd gives it to that.
        if not (has_few_values(x) and _is_summed_by_channel(x)):
            dy = like_layout(dy, x)
        return backward(dy, x, weight, None, None, mean, invstd, True, 0.0, needed)
    dy = like_layout(dy, x)
    wide = (None if t is None else t.double() for t in (dy, x, weight))
    results = backward(*wide, None, None, mean.double(), invstd.double(), True, 0.0, needed)
    dx, dweight, dbias = (None if t is None else t.to(x.dtype) for t in results)
    return dx, dweight, dbias


def normalize(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """Returns y = (x - mean) · scale + bias [+ residual], or max(0, y) with ``relu``."""
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
    """Returns dx = scale · (dy - mean_dy - x̂ mean_dy_xhat), with x̂ = (x - mean) · invstd.

    dx has x's shape, dtype and layout; x is not empty.
    """
    dy = like_layout(dy, x)
    if x.is_cuda:
        # The kernel divides sums by an int32 count. The arguments here are means already, and a
        # count of 1 cannot overflow.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, scale / invstd, mean_dy, mean_dy_xhat / invstd, one
        )
    # Round to half precision once, at the end: mean_dy may be far larger than the difference.
    dtype, x = x.dtype, x.to(mean.dtype)
    dx = _affine(x, mean, -scale * invstd * mean_dy_xhat, -scale * mean_dy)
    return dx.addcmul_(dy.to(dx.dtype), per_channel(scale, dx).to(dx.dtype)).to(dtype)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Returns the vector (C,) in a shape that broadcasts against x (N, C, *)."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def like_layout(dy: Tensor, x: Tensor) -> Tensor:
    """Returns dy in x's dtype and layout, as the primitives need it."""
    if dy.stride() == x.stride() and dy.dtype == x.dtype:
        return dy
    return torch.empty_like(x).copy_(dy)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # Batch norm in evaluation: one read, one write. Variance 1 and ε 0 leave the scale unchanged.
    if x.is_cuda:
        return torch.batch_norm_elemt(x, scale, bias, mean, torch.ones_like(mean), 0.0)
    ones = torch.ones_like(mean)
    return torch.native_batch_norm(x, scale, bias, mean, ones, False, 0.0, 0.0)[0]


def _sums_of_products(a: Tensor, b: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns Σ a and Σ a (b - mean), (C,), float64; a and b are CPU tensors of one layout.

    ATen adds up in float32. So each channel is divided into lanes with short sums, and the lanes
    are added up in float64.
    """
    in_float64 = has_few_values(b) and not _sums_up_well(b)
    if in_float64:
        a, b = a.double(), b.double()
    channels, n = a.shape[1], a.numel() // a.shape[1]
    ones = torch.ones(channels, dtype=statistics_dtype(a))
    means = torch.zeros_like(ones) if mean is None else mean.to(ones.dtype)
    if in_float64:
        return _native_sums(a, b, means, ones)
    if _is_summed_by_channel(a):  # by whole vectors
        size = n // len(a)
        fewest = -(-n // _MOST_VALUES)
        lanes = next((g for g in range(fewest, size) if size % g == 0), size)
        if lanes > 1:
            a, b = (t.view(len(t), channels * lanes, -1) for t in (a, b))
            ones, means = (t.repeat_interleave(lanes) for t in (ones, means))
        sums, products = _native_sums(a, b, means, ones)
        return (
            sums.double().view(channels, lanes).sum(1),
            products.double().view(channels, lanes).sum(1),
        )
    # Channels are innermost, and ATen sums a channel's values one by one.
    lanes = -(-n // _MOST_VALUES_INNERMOST)
    if lanes == 1:
        sums, products = _native_sums(a, b, means, ones)
        return sums.double(), products.double()
    a, b = (t.movedim(1, -1).reshape(n, channels) for t in (a, b))
    whole = n // lanes * lanes
    sums, products = _native_sums(
        a[:whole].view(-1, lanes * channels),
        b[:whole].view(-1, lanes * channels),
        means.repeat(lanes),
        ones.repeat(lanes),
    )
    sums, products = (t.double().view(lanes, channels).sum(0) for t in (sums, products))
    if whole < n:
        rest = _native_sums(a[whole:], b[whole:], means, ones)
        sums, products = sums + rest[0], products + rest[1]
    return sums, products


def _native_sums(a: Tensor, b: Tensor, mean: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    # With training=False the kernel uses the given statistics. The mask asks for the sums of γ and
    # β only. Variance 1 and ε 0 leave b - mean unchanged.
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        a, b, ones, mean, ones, None, None, False, 0.0, (False, True, True)
    )
    return sums, products
