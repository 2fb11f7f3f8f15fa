"""The passes of Algorithm 1 over x as Triton kernels; each pass reads its inputs once.

Memory bandwidth limits the speed of batch norm. Two passes reduce x to values per channel
(``power_sums``, ``gradient_sums``). Two passes map x to a tensor of its size (``normalize``,
``input_gradient``), and include a following addition and ReLU.

x is (N, C, *), 2-D to 5-D, with channels outermost (contiguous) or innermost (channels_last), and
not empty. All kernels treat it as a matrix and divide it into tiles in the same way::

    channels outermost  x[n, c, s]   rows (n, c), columns s      a tile has one channel
    channels innermost  x[m, c]      rows m = (n, s), columns c  a tile has BLOCK_K channels

The tiles of one channel, or of one block of channels, form a group. A program of a reduction takes
every ``splits``-th tile of a group. Arithmetic is float64 for float64 inputs, and float32 for all
others. No function waits for the GPU, and the order of every sum is fixed.

Values of the channels, such as mean or scale, are (C,), contiguous, on x's device.
"""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

import math
import os
import shutil
import sysconfig
from typing import NamedTuple

import torch
from torch import Tensor

from .aten import statistics_dtype

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU wheels do not include it
    triton = None

# Values in a tile: 16 for each of 128 threads, which are two 16-byte loads in half precision and
# four in float32. A tile is one row, or NARROW columns of several rows. NARROW is a cache line in
# half precision, and wastes little on 7x7 regions.
TILE, NARROW, NUM_WARPS = 2048, 64, 4
# Programs of a reduction: about four for each of the 132 multiprocessors of an H100. The registers
# suffice to run them at once, and each has STAGES - 1 loads of tiles in flight.
PROGRAMS, STAGES = 512, 4


def available() -> bool:
    """Returns True if Triton is installed and can compile, as the functions of this module need.

    Triton builds its launchers with a C compiler and Python's headers. Slim containers, and
    distributions without development packages, do not have them.
    """
    return triton is not None and _CAN_BUILD


# Computed at import, because torch.compile cannot trace calls to the file system.
_CAN_BUILD = bool(
    os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
) and os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))


# --- public functions ----------------------------------------------------------------------------


def power_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Σ x and Σ x² of each channel, exact enough to compute the variance from them.

    Args:
        x: (N, C, *), float16, bfloat16, float32 or float64, contiguous or channels_last, not empty.

    Returns:
        two vectors (C,), float64.

    Raises:
        ValueError: x is empty, or neither contiguous nor channels_last.
    """
    tiling = _tiling(x)
    channels, splits = x.shape[1], tiling.splits
    partials = x.new_empty(3, channels, splits, dtype=torch.float64)
    sums, squares = x.new_empty(2, channels, dtype=torch.float64)
    with torch.cuda.device_of(x):
        _moments[(tiling.groups * splits,)](
            partials, x, *tiling.sizes, tiling.tiles, splits, **tiling.constants, STAGES=STAGES
        )
        block = triton.next_power_of_2(PROGRAMS)
        _merge[(channels,)](sums, squares, partials, channels, splits, block)
    return sums, squares


def gradient_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns Σ dy' and Σ dy' x̂ of each channel, with x̂ = (x - mean) · invstd.

    dy' is the gradient before the ReLU: dy where the output was positive, and 0 elsewhere. Without
    ``relu`` it is dy.

    Args:
        dy: x's shape, any floating dtype and layout. Another layout than x's costs a copy.
        x: as in :func:`power_sums`.
        mean, invstd: (C,), float32 or float64.
        scale, bias: as in :func:`normalize`. Required with ``relu`` and without y.
        relu: the output went through a ReLU. Its sign comes from y if that is given, which is
            required after an addition. Otherwise it is computed again from x, bit by bit.
        y: the output after the ReLU, x's shape.

    Returns:
        two vectors (C,), float64 for a float64 x, and float32 for any other.

    Raises:
        ValueError: x is not valid, see :func:`power_sums`; dy or y does not have x's shape; or the
            sign of the output cannot be computed.
    """
    tiling = _tiling(x)
    dy, y = _gradient_inputs(dy, x, scale, bias, relu, y)
    partials = x.new_empty(2, x.shape[1], tiling.splits, dtype=statistics_dtype(x))
    with torch.cuda.device_of(x):
        _gradient_sums[(tiling.groups * tiling.splits,)](
            partials, dy, x, y, mean, invstd, scale, bias,
            *tiling.sizes, tiling.tiles, tiling.splits, relu, **tiling.constants, STAGES=STAGES,
        )  # fmt: skip
    # Float32 is enough here: at most PROGRAMS terms, and torch adds them up in a tree.
    sum_dy, sum_dy_xhat = partials.sum(2)
    return sum_dy, sum_dy_xhat


def normalize(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns y = (x - mean) · scale + bias [+ residual], or max(y, 0) with ``relu``.

    Args:
        x: as in :func:`power_sums`. y has its shape, dtype and layout.
        mean, scale, bias: (C,), float32 or float64; scale = γ / √(σ² + ε).
        residual: x's shape, any floating dtype and layout.
        relu: applies ReLU at the end.

    Raises:
        ValueError: x is not valid, see :func:`power_sums`; or the residual does not have x's shape.
    """
    tiling = _tiling(x)
    if residual is not None:
        residual = _laid_out_as(x, residual, "residual")
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _normalize[(tiling.groups * tiling.tiles,)](
            y, x, residual, mean, scale, bias, *tiling.sizes, relu, **tiling.constants
        )
    return y


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    relu: bool = False,
    y: Tensor | None = None,
    needs_residual_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns dx = scale · (dy' - mean_dy - x̂ · mean_dy_xhat) and dy', the residual's gradient.

    Args:
        dy, x, mean, invstd, scale, bias, relu, y: as in :func:`gradient_sums`.
        mean_dy, mean_dy_xhat: (C,), float32 or float64, means over the whole mini-batch.
        needs_residual_grad: also returns dy'.

    Returns:
        both in x's shape, dtype and layout; the second is None without ``needs_residual_grad``.

    Raises:
        ValueError: an argument is not valid, see :func:`gradient_sums`.
    """
    tiling = _tiling(x)
    dy, y = _gradient_inputs(dy, x, scale, bias, relu, y)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if needs_residual_grad else None
    with torch.cuda.device_of(x):
        _input_gradient[(tiling.groups * tiling.tiles,)](
            dx, dresidual, dy, x, y, mean, invstd, scale, bias, mean_dy, mean_dy_xhat,
            *tiling.sizes, relu, **tiling.constants,
        )  # fmt: skip
    return dx, dresidual


# --- tiles of x ----------------------------------------------------------------------------------


class _Tiling(NamedTuple):
    groups: int
    tiles: int  # per group
    splits: int  # programs per group in a reduction
    sizes: tuple[int, int, int, int]  # rows of a group, channels, vectors in a row, groups
    constants: dict  # compile-time constants of a kernel


def _tiling(x: Tensor) -> _Tiling:
    """Returns the tiling of x.

    A kernel is compiled per shape of a tile (two), layout (two), width of a load and dtype.
    """
    innermost = _channels_innermost(x)
    if innermost is None or x.numel() == 0:
        raise ValueError(
            "kernels: x must be contiguous or channels_last, and not empty; got shape "
            f"{tuple(x.shape)}, strides {x.stride()}. Use x.contiguous()."
        )
    n, channels = x.shape[:2]
    size = x.numel() // (n * channels)
    rows, columns = (n * size, channels) if innermost else (n, size)
    tile = TILE // 2 if x.dtype == torch.float64 else TILE  # STAGES tiles fit into shared memory
    block_k = NARROW if innermost or size < tile // 2 else tile
    block_r = tile // block_k
    row_tiles, column_tiles = -(-rows // block_r), -(-columns // block_k)
    groups, tiles = (column_tiles, row_tiles) if innermost else (channels, row_tiles * column_tiles)
    # A load is as wide as the alignment of the rows, at most 16 bytes. Triton checks an argument's
    # divisibility by 16 only, and would load a row of 50x84 values one by one.
    vector = math.gcd(columns, 16 // x.element_size())
    return _Tiling(
        groups,
        tiles,
        splits=min(tiles, -(-PROGRAMS // groups)),
        sizes=(rows, channels, columns // vector, groups),
        constants={
            "INNERMOST": innermost,
            "VECTOR": vector,
            "BLOCK_R": block_r,
            "BLOCK_K": block_k,
            "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "num_warps": NUM_WARPS,
        },
    )


def _channels_innermost(x: Tensor) -> bool | None:
    """Returns True for channels innermost in memory, False for outermost, None for neither."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]  # (N, C, 1, 1) is both
    return True if x.movedim(1, -1).is_contiguous() else None


def _laid_out_as(x: Tensor, other: Tensor, name: str) -> Tensor:
    if other.shape != x.shape:
        raise ValueError(
            f"kernels: {name} must have the shape of x, {tuple(x.shape)}; got {tuple(other.shape)}"
        )
    if _channels_innermost(other) == _channels_innermost(x):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _gradient_inputs(dy, x, scale, bias, relu, y) -> tuple[Tensor, Tensor | None]:
    if relu and y is None and (scale is None or bias is None):
        raise ValueError("kernels: relu=True needs y, or scale and bias to compute its sign from x")
    y = _laid_out_as(x, y, "y") if relu and y is not None else None
    return _laid_out_as(x, dy, "dy"), y


# --- the kernels ---------------------------------------------------------------------------------


def _jit(kernel):
    # A kernel is compiled for its constants and dtypes, and then serves every size. So Triton must
    # not specialise on sizes. VECTOR holds the alignment that wide loads need.
    sizes = ["rows", "channels", "vectors", "groups", "tiles", "splits"]
    return triton.jit(kernel, do_not_specialize=sizes) if available() else kernel


@_jit
def _tile(
    t, group, rows, channels, vectors,
    INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns offsets and mask (BLOCK_R, BLOCK_K) of a group's tile t, and the values per channel.

    Row numbers fit into 32 bits; offsets may not.
    """
    columns = vectors * VECTOR
    if INNERMOST:
        first_row = t * BLOCK_R
        first_column = group * BLOCK_K
        count = tl.minimum(rows - first_row, BLOCK_R)
    else:
        across = (columns + BLOCK_K - 1) // BLOCK_K
        first_row = t // across * BLOCK_R
        first_column = t % across * BLOCK_K
        count = tl.minimum(rows - first_row, BLOCK_R) * tl.minimum(columns - first_column, BLOCK_K)
    row = first_row + tl.arange(0, BLOCK_R)
    column = first_column + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if not INNERMOST:
        row = row * channels + group
    return row.to(tl.int64)[:, None] * columns + column[None, :], mask, count


@_jit
def _channel(group, vectors, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr):
    """Returns a group's channels and their mask, (1, BLOCK_K) or (1, 1), to broadcast to tiles."""
    if INNERMOST:
        channel = group * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        inside = channel < vectors * VECTOR
    else:
        channel = group + tl.zeros([1, 1], tl.int32)
        inside = channel >= 0
    return channel, inside


@_jit
def _of(values, channel, inside, ACC: tl.constexpr):
    """Returns the channels' entries of a (C,) tensor, or None if the tensor is None."""
    if values is None:
        return None
    else:  # without the else Triton would compile both returns
        return tl.load(values + channel, mask=inside, other=0.0).to(ACC)


@_jit
def _sum(tile, INNERMOST: tl.constexpr):
    """Returns the sum of each channel in a tile, in the shape that _channel returns."""
    total = tl.sum(tile, 0, keep_dims=True)
    if not INNERMOST:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@_jit
def _affine(x, mean, scale, bias):
    # An explicit fma: forward and backward must round in the same way, or the mask of the ReLU
    # would differ from y's sign.
    return tl.fma(x - mean, scale, bias)


@_jit
def _before_relu(dy, x, mean, scale, bias, y, offsets, mask, ACC: tl.constexpr):
    """Returns dy', the gradient before the ReLU. A NaN passes, as in torch's ReLU."""
    if y is None:
        # Rounded to x's dtype, as y was.
        output = _affine(x.to(ACC), mean, scale, bias).to(x.dtype).to(ACC)
    else:
        output = tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
    return tl.where(output <= 0, 0.0, dy)


@_jit
def _moments(
    partials, x, rows, channels, vectors, groups, tiles, splits,
    INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores n, mean and Σ(x - mean)² of one split of a group in partials (3, C, splits)."""
    group, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    # Sums of d = x - pivot and of d², where the pivot is the mean of the split's first tile. With
    # n₁ values in it, (pivot - mean)² ≤ variance · n / n₁ for all data, so Σd² - (Σd)²/n keeps its
    # digits. Where the mean is far from zero, x - pivot is exact.
    offsets, mask, n = _tile(
        split, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K
    )
    values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    pivot = _sum(values, INNERMOST) / n
    sums = tl.where(mask, values - pivot, 0.0)
    squares = sums * sums
    for t in tl.range(split + splits, tiles, splits, num_stages=STAGES):
        offsets, mask, count = _tile(
            t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K
        )
        values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
        d = tl.where(mask, values - pivot, 0.0)
        sums += d
        squares += d * d
        n += count
    sum_d = _sum(sums, INNERMOST).to(tl.float64)
    sum_d2 = _sum(squares, INNERMOST).to(tl.float64)
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    out = partials + channel * splits + split
    plane = channels * splits
    tl.store(out, n + tl.zeros_like(sum_d), mask=inside)
    tl.store(out + plane, pivot.to(tl.float64) + sum_d / n, mask=inside)
    tl.store(out + 2 * plane, sum_d2 - sum_d * sum_d / n, mask=inside)


@_jit
def _merge(sums, squares, partials, channels, splits, BLOCK: tl.constexpr):
    """Merges the splits of a channel in one program, from float32 moments to float64 sums."""
    channel = tl.program_id(0)
    split = tl.arange(0, BLOCK)
    mask = split < splits
    at = partials + channel * splits + split
    plane = channels * splits
    n = tl.load(at, mask=mask, other=0.0)
    means = tl.load(at + plane, mask=mask, other=0.0)
    deviations = tl.load(at + 2 * plane, mask=mask, other=0.0)
    tl.store(sums + channel, tl.sum(n * means, 0))
    tl.store(squares + channel, tl.sum(deviations + n * means * means, 0))


@_jit
def _gradient_sums(
    partials, dy, x, y, mean, invstd, scale, bias, rows, channels, vectors, groups, tiles, splits,
    RELU: tl.constexpr, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores Σ dy' and Σ dy' x̂ of one split of a group in partials (2, C, splits)."""
    group, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    mean = _of(mean, channel, inside, ACC)
    invstd = _of(invstd, channel, inside, ACC)
    scale = _of(scale, channel, inside, ACC)
    bias = _of(bias, channel, inside, ACC)
    sums = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    products = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    for t in tl.range(split, tiles, splits, num_stages=STAGES):
        offsets, mask, _ = _tile(
            t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K
        )
        values = tl.load(x + offsets, mask=mask, other=0.0)
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(ACC)
        if RELU:
            gradient = _before_relu(gradient, values, mean, scale, bias, y, offsets, mask, ACC)
        sums += gradient
        products += gradient * (values.to(ACC) - mean)
    out = partials + channel * splits + split
    tl.store(out, _sum(sums, INNERMOST), mask=inside)
    tl.store(out + channels * splits, _sum(products, INNERMOST) * invstd, mask=inside)


@_jit
def _normalize(
    y, x, residual, mean, scale, bias, rows, channels, vectors, groups,
    RELU: tl.constexpr, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores y of one tile."""
    group, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    offsets, mask, _ = _tile(t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    mean = _of(mean, channel, inside, ACC)
    scale = _of(scale, channel, inside, ACC)
    bias = _of(bias, channel, inside, ACC)
    output = _affine(values, mean, scale, bias)
    if residual is not None:
        output += tl.load(residual + offsets, mask=mask, other=0.0).to(ACC)
    if RELU:
        output = tl.where(output <= 0, 0.0, output)  # keeps a NaN, unlike maximum
    tl.store(y + offsets, output, mask=mask)


@_jit
def _input_gradient(
    dx, dresidual, dy, x, y, mean, invstd, scale, bias, mean_dy, mean_dy_xhat, rows, channels,
    vectors, groups,
    RELU: tl.constexpr, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores dx of one tile, and dy' where dresidual is given."""
    group, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    offsets, mask, _ = _tile(t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    values = tl.load(x + offsets, mask=mask, other=0.0)
    gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(ACC)
    mean = _of(mean, channel, inside, ACC)
    invstd = _of(invstd, channel, inside, ACC)
    scale = _of(scale, channel, inside, ACC)
    bias = _of(bias, channel, inside, ACC)
    mean_dy = _of(mean_dy, channel, inside, ACC)
    mean_dy_xhat = _of(mean_dy_xhat, channel, inside, ACC)
    if RELU:
        gradient = _before_relu(gradient, values, mean, scale, bias, y, offsets, mask, ACC)
    if dresidual is not None:
        tl.store(dresidual + offsets, gradient, mask=mask)
    xhat = (values.to(ACC) - mean) * invstd
    tl.store(dx + offsets, scale * (gradient - mean_dy - xhat * mean_dy_xhat), mask=mask)
