"""The kernels that map x to a tensor of its size: y, and the gradient of x."""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

from .jit import jit
from .per_channel import compare_stamps
from .tiling import channels_of, load_valid, tile

try:
    import triton.language as tl
except ImportError:
    pass


@jit
def load_stats(stats, channels, channel, inside, ACC: tl.constexpr):
    """Returns mean, invstd, scale and bias of the channels."""
    at = stats + channel
    mean = tl.load(at, mask=inside, other=0.0).to(ACC)
    invstd = tl.load(at + channels, mask=inside, other=0.0).to(ACC)
    scale = tl.load(at + 2 * channels, mask=inside, other=0.0).to(ACC)
    bias = tl.load(at + 3 * channels, mask=inside, other=0.0).to(ACC)
    return mean, invstd, scale, bias


@jit
def affine(x, mean, scale, bias):
    # An explicit fma: forward and backward must round in the same way, or the mask of the ReLU
    # would differ from y's sign.
    return tl.fma(x - mean, scale, bias)


@jit
def before_relu(dy, x, mean, scale, bias, y, offsets, mask, ACC: tl.constexpr):
    """Returns dy', the gradient before the ReLU. A NaN passes, as in torch's ReLU."""
    if y is None:
        # Rounded to x's dtype, as y was.
        output = affine(x.to(ACC), mean, scale, bias).to(x.dtype).to(ACC)
    else:
        output = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
    return tl.where(output <= 0, 0.0, dy)


@jit
def normalize(
    y, x, residual, stats, rows, channels, vectors, groups,
    RELU: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores y of one tile."""
    group, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    offsets, _, mask, _ = tile(
        t, group, rows, channels, vectors, LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K
    )
    channel, inside = channels_of(group, channels, vectors, LAYOUT, VECTOR, BLOCK_R, BLOCK_K)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    mean, _, scale, bias = load_stats(stats, channels, channel, inside, ACC)
    output = affine(values, mean, scale, bias)
    if residual is not None:
        output += tl.load(residual + offsets, mask=mask, other=0.0).to(ACC)
    if RELU:
        output = tl.where(output <= 0, 0.0, output)  # keeps a NaN, unlike maximum
    tl.store(y + offsets, output, mask=mask)


@jit
def input_gradient(
    dx, dresidual, dy, x, y, stats, message, values_of_all, valid, mismatch, end, processes,
    rows, channels, vectors, groups,
    RELU: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores dx of one tile, and dy' where dresidual is given."""
    if mismatch is not None:
        if tl.program_id(0) == 0:
            compare_stamps(mismatch, message, end, processes)
    group, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    offsets, _, mask, _ = tile(
        t, group, rows, channels, vectors, LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K
    )
    channel, inside = channels_of(group, channels, vectors, LAYOUT, VECTOR, BLOCK_R, BLOCK_K)
    values = tl.load(x + offsets, mask=mask, other=0.0)
    gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(ACC)
    mean, invstd, scale, bias = load_stats(stats, channels, channel, inside, ACC)
    # In float32 for most x: a division in float64 is a call, for which registers are spilled.
    n = tl.maximum(tl.load(values_of_all), 1.0).to(ACC)
    mean_dy = tl.load(message + channel, mask=inside, other=0.0).to(ACC) / n
    mean_products = tl.load(message + channels + channel, mask=inside, other=0.0).to(ACC) / n
    if RELU:
        gradient = before_relu(gradient, values, mean, scale, bias, y, offsets, mask, ACC)
    if dresidual is not None:
        tl.store(dresidual + offsets, gradient, mask=mask)
    xhat = (values.to(ACC) - mean) * invstd
    through_statistics = mean_dy + xhat * mean_products
    if valid is not None:
        counted = load_valid(
            valid, t, group, offsets, mask, rows, channels, vectors,
            LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        through_statistics = tl.where(counted, through_statistics, 0.0)
    tl.store(dx + offsets, scale * (gradient - through_statistics), mask=mask)
