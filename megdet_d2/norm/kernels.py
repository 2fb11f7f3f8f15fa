"""The passes of Algorithm 1 over x as Triton kernels; each pass reads its inputs once.

Memory bandwidth limits the speed of batch norm on large tensors, and the number of launches on
small ones. Two passes reduce x to values per channel (``power_sums``, ``gradient_sums``), and write
them as the message of the collective. Two passes map x to a tensor of its size (``normalize``,
``input_gradient``), and include a following addition and ReLU. ``finish`` does all that remains
per channel. So a layer launches three kernels forward and two backward, beside its collectives.

x is (N, C, *), 2-D to 5-D, with channels outermost (contiguous) or innermost (channels_last), and
not empty. All kernels treat it as a matrix and divide it into tiles in the same way::

    channels outermost  x[n, c, s]   rows (n, c), columns s      a tile has one channel
    channels innermost  x[m, c]      rows m = (n, s), columns c  a tile has BLOCK_K channels

The tiles of one channel, or of one block of channels, form a group. A program of a reduction takes
every ``splits``-th tile of a group. The last program of a group to end merges the others' results,
in the order of the splits. Arithmetic is float64 for float64 inputs, and float32 for all others.
No function waits for the GPU, and the order of every sum is fixed.

The values of the channels are rows of one tensor, ``stats`` (4, C): mean, invstd = 1 / √(σ² + ε),
scale = γ · invstd, and bias = β. A ``message`` is a float64 vector: first the sums, and in its last
two places the stamp of the layer and its square, see ``collective``.
"""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

import functools
import math
import os
import shutil
import sysconfig
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU wheels do not include it
    triton = None

# Values in a tile: 16 for each of 128 threads, which are two 16-byte loads in half precision and
# four in float32. A tile is one row, or NARROW columns of several rows. NARROW is a cache line in
# half precision, and wastes little on 7x7 regions.
TILE, NARROW, NUM_WARPS = 2048, 64, 4
# Channels that a program of the kernels without x takes at a time.
CHANNELS = 1024
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


def power_sums(
    x: Tensor,
    valid: Tensor | None,
    message: Tensor,
    stamp: int | None,
    own: Tensor | None = None,
) -> None:
    """Computes Σ x and Σ x² of each channel, exact enough to compute the variance from them.

    Args:
        x: (N, C, *), float16, bfloat16, float32 or float64, contiguous or channels_last, not empty.
        valid: bool, (N, 1, *), contiguous, true at the values that count; None if all do.
        message: 2 C + 1 values or more, takes Σ x (C), Σ x² (C) and the number of values.
        stamp: is stored at the end of the message, with its square; None stores nothing there.
        own: 2 C + 1 values, takes Σ x, Σ (x - m)² around the mean m of these values, and their
            number; or None.

    Raises:
        ValueError: x is empty, or neither contiguous nor channels_last.
    """
    tiling = _tiling(x)
    partials = x.new_empty(3, tiling.splits, x.shape[1], dtype=torch.float64)
    with torch.cuda.device_of(x):
        _moments[(tiling.groups * tiling.splits,)](
            message, own, partials, _tickets(x, tiling.groups), x, _bytes(valid),
            len(message) - 2, stamp, *tiling.sizes, tiling.tiles, tiling.splits,
            **tiling.constants, STAGES=STAGES,
        )  # fmt: skip


def deviations(own: Tensor, message: Tensor, second: Tensor, stamp: int | None) -> None:
    """Computes Σ (x - μ_B)² over the values of this process: line 7 of Algorithm 1.

    It follows from Σ (x - m)² around their own mean, so there is no second pass over x.

    Args:
        own: (2 C + 1,), of ``power_sums``.
        message: of ``power_sums``, summed over the group.
        second: C values or more, takes the result.
        stamp: as in ``power_sums``, for ``second``.
    """
    channels = len(own) // 2
    with torch.cuda.device_of(own):
        _deviations[(triton.cdiv(channels, CHANNELS),)](
            second, own, message, channels, len(second) - 2, stamp, BLOCK=CHANNELS
        )


def finish(
    message: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    momentum: float | None,
    eps: float,
    stats: Tensor,
    count: Tensor,
    processes: int = 1,
    mismatch: Tensor | None = None,
) -> None:
    """Computes ``stats`` and |B| from the sums over the group, and updates the running statistics.

    Args:
        message: of ``power_sums``, summed over the group.
        second: of ``deviations``, summed over the group; or None.
        weight, bias: γ and β, (C,), any floating dtype, or None for 1 and 0.
        running_mean, running_var, num_batches_tracked, num_batches_skipped, momentum: as in
            ``functional.statistics``.
        stats: (4, C), float64 for float64 values and float32 for others; is written.
        count: (1,), float64, takes |B|.
        processes: processes of the group.
        mismatch: (1,), int32, takes 1 if the stamps of the messages differ; None for no group.
    """
    channels = stats.shape[1]
    with torch.cuda.device_of(stats):
        _finish[(1,)](
            stats, count, message, second, weight, bias, running_mean, running_var,
            num_batches_tracked, num_batches_skipped, mismatch, channels, len(message) - 2,
            0 if second is None else len(second) - 2, processes, momentum or 0.0,
            EPS=eps, CUMULATIVE=momentum is None, BLOCK=CHANNELS, num_warps=2 * NUM_WARPS,
        )  # fmt: skip


def gradient_sums(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    relu: bool,
    y: Tensor | None,
    message: Tensor,
    stamp: int | None,
) -> Tensor:
    """Returns Σ dy' and Σ dy' x̂ of each channel, with x̂ = (x - mean) · invstd.

    dy' is the gradient before the ReLU: dy where the output was positive, and 0 elsewhere. Without
    ``relu`` it is dy.

    Args:
        dy: x's shape, any floating dtype and layout. Another layout than x's costs a copy.
        x: as in :func:`power_sums`.
        stats: (4, C), of :func:`finish`.
        relu: the output went through a ReLU. Its sign comes from y if that is given, which is
            required after an addition. Otherwise it is computed again from x, bit by bit.
        y: the output after the ReLU, x's shape.
        message: 2 C values or more, takes both sums as float64.
        stamp: as in :func:`power_sums`.

    Returns:
        (2, C), in the dtype of ``stats``.

    Raises:
        ValueError: x is not valid, see :func:`power_sums`; dy or y does not have x's shape.
    """
    tiling = _tiling(x)
    dy, y = _gradient_inputs(dy, x, relu, y)
    partials = stats.new_empty(2, tiling.splits, x.shape[1])
    sums = torch.empty_like(partials[:, 0])
    with torch.cuda.device_of(x):
        _gradient_sums[(tiling.groups * tiling.splits,)](
            message, sums, partials, _tickets(x, tiling.groups), dy, x, y, stats,
            len(message) - 2, stamp, *tiling.sizes, tiling.tiles, tiling.splits, relu,
            **tiling.constants, STAGES=STAGES,
        )  # fmt: skip
    return sums


def normalize(
    x: Tensor, stats: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Returns y = (x - mean) · scale + bias [+ residual], or max(y, 0) with ``relu``.

    Args:
        x: as in :func:`power_sums`. y has its shape, dtype and layout.
        stats: (4, C), of :func:`finish`.
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
            y, x, residual, stats, *tiling.sizes, relu, **tiling.constants
        )
    return y


def input_gradient(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    message: Tensor,
    count: Tensor,
    valid: Tensor | None = None,
    relu: bool = False,
    y: Tensor | None = None,
    needs_residual: bool = False,
    processes: int = 1,
    mismatch: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns dx = scale · (dy' - Σ dy' / |B| - x̂ · Σ dy' x̂ / |B|), and dy' for the residual.

    Args:
        dy, x, stats, relu, y: as in :func:`gradient_sums`.
        message: of :func:`gradient_sums`, summed over the group.
        count: |B|, (1,), float64.
        valid: as in :func:`power_sums`. Elsewhere dx is scale · dy'.
        needs_residual: also returns dy'.
        processes, mismatch: as in :func:`finish`.

    Returns:
        both in x's shape, dtype and layout; the second is None without ``needs_residual``.

    Raises:
        ValueError: an argument is not valid, see :func:`gradient_sums`.
    """
    tiling = _tiling(x)
    dy, y = _gradient_inputs(dy, x, relu, y)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if needs_residual else None
    with torch.cuda.device_of(x):
        _input_gradient[(tiling.groups * tiling.tiles,)](
            dx, dresidual, dy, x, y, stats, message, count, _bytes(valid), mismatch,
            len(message) - 2, processes, *tiling.sizes, relu, **tiling.constants,
        )  # fmt: skip
    return dx, dresidual


# --- tickets -------------------------------------------------------------------------------------

# For each device and stream, a counter per group of tiles. They are 0 between two kernels.
_counters: dict[tuple[int, int], Tensor] = {}


def _tickets(x: Tensor, groups: int) -> Tensor:
    """Returns counters, all 0, by which the programs of a group find out which one is the last.

    The last program sets its counter to 0 again. The kernels of a stream run one after another. So
    the counters of a stream serve all its kernels, without a launch that clears them.
    """
    if not x.is_cuda:  # Triton's interpreter
        return x.new_zeros(groups, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        # A graph may run beside other work of the stream that has recorded it.
        return x.new_zeros(groups, dtype=torch.int32)
    key = x.get_device(), torch.cuda.current_stream(x.device).cuda_stream
    if key not in _counters or len(_counters[key]) < groups:
        _counters[key] = x.new_zeros(max(CHANNELS, groups), dtype=torch.int32)
    return _counters[key]


def _bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.view(torch.uint8)


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
    return _tiles(innermost, n, channels, x.numel() // (n * channels), x.dtype, PROGRAMS)


@functools.lru_cache(4096)  # a detector has tens of sizes; the host would compute them each time
def _tiles(
    innermost: bool, n: int, channels: int, size: int, dtype: torch.dtype, programs: int
) -> _Tiling:
    rows, columns = (n * size, channels) if innermost else (n, size)
    tile = TILE // 2 if dtype == torch.float64 else TILE  # STAGES tiles fit into shared memory
    block_k = NARROW if innermost or size < tile // 2 else tile
    block_r = tile // block_k
    row_tiles, column_tiles = -(-rows // block_r), -(-columns // block_k)
    groups, tiles = (column_tiles, row_tiles) if innermost else (channels, row_tiles * column_tiles)
    # A load is as wide as the alignment of the rows, at most 16 bytes. Triton checks an argument's
    # divisibility by 16 only, and would load a row of 50x84 values one by one.
    vector = math.gcd(columns, 16 // dtype.itemsize)
    return _Tiling(
        groups,
        tiles,
        splits=min(tiles, -(-programs // groups)),
        sizes=(rows, channels, columns // vector, groups),
        constants={
            "INNERMOST": innermost,
            "VECTOR": vector,
            "BLOCK_R": block_r,
            "BLOCK_K": block_k,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
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


def _gradient_inputs(
    dy: Tensor, x: Tensor, relu: bool, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    y = _laid_out_as(x, y, "y") if relu and y is not None else None
    return _laid_out_as(x, dy, "dy"), y


# --- the kernels ---------------------------------------------------------------------------------


def _jit(kernel):
    # A kernel is compiled for its constants and dtypes, and then serves every size. So Triton must
    # not specialise on sizes. VECTOR holds the alignment that wide loads need.
    sizes = ["rows", "channels", "vectors", "groups", "tiles", "splits", "processes"]
    sizes += ["end", "second_end", "stamp"]
    known = [name for name in sizes if name in kernel.__code__.co_varnames]
    return triton.jit(kernel, do_not_specialize=known) if available() else kernel


@_jit
def _tile(
    t, group, rows, channels, vectors,
    INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns offsets and mask (BLOCK_R, BLOCK_K) of a group's tile t, and its values per channel.

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
def _load_valid(
    valid, t, rows, vectors,
    INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the mask (N, 1, *) of tile t, in a shape that broadcasts to (BLOCK_R, BLOCK_K)."""
    if INNERMOST:
        at = (t * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        inside = at < rows
    else:
        columns = vectors * VECTOR
        across = (columns + BLOCK_K - 1) // BLOCK_K
        row = t // across * BLOCK_R + tl.arange(0, BLOCK_R)
        column = t % across * BLOCK_K + tl.arange(0, BLOCK_K)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(valid + at, mask=inside, other=0) != 0


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
def _stats(stats, channels, channel, inside, ACC: tl.constexpr):
    """Returns mean, invstd, scale and bias of the channels."""
    at = stats + channel
    mean = tl.load(at, mask=inside, other=0.0).to(ACC)
    invstd = tl.load(at + channels, mask=inside, other=0.0).to(ACC)
    scale = tl.load(at + 2 * channels, mask=inside, other=0.0).to(ACC)
    bias = tl.load(at + 3 * channels, mask=inside, other=0.0).to(ACC)
    return mean, invstd, scale, bias


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
def _is_last(tickets, group, splits):
    """Returns True in the program of a group that ends last; it can then read what all stored."""
    tl.debug_barrier()  # all threads of this program have stored
    # The default order, acquire and release, makes the stores of each program visible to the last.
    last = tl.atomic_add(tickets + group, 1) == splits - 1
    if last:
        tl.store(tickets + group, 0)
    return last


@_jit
def _partials_at(
    partials, first, splits, channels, channel, inside, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Returns addresses and mask of a channel's values of AT_ONCE splits, from ``first`` on."""
    split = first + tl.arange(0, AT_ONCE)[:, None]
    return partials + split * channels + channel, (split < splits) & inside


@_jit
def _load_partials(at, mask):
    # From the L2 cache: programs on other multiprocessors have stored them.
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)


@_jit
def _store_stamp(message, end, stamp):
    if stamp is not None:
        value = stamp.to(tl.float64)
        tl.store(message + end, value)
        tl.store(message + end + 1, value * value)


@_jit
def _compare_stamps(mismatch, message, end, processes):
    """Sets the flag if K Σ s² differs from (Σ s)²: K processes have sent different stamps."""
    total = tl.load(message + end)
    if processes.to(tl.float64) * tl.load(message + end + 1) != total * total:
        tl.store(mismatch, 1)


@_jit
def _moments(
    message, own, partials, tickets, x, valid, end, stamp,
    rows, channels, vectors, groups, tiles, splits,
    INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores Σ x, Σ x² and n in the message, and Σ(x - mean)² in ``own``, from the splits' moments.

    partials (3, splits, C) has n, mean and Σ(x - mean)² of each split.
    """
    group, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    # Sums of d = x - pivot and of d², where the pivot is the mean of the split's first tile. With
    # n₁ values in it, (pivot - mean)² ≤ variance · n / n₁ for all data, so Σd² - (Σd)²/n keeps its
    # digits. Where the mean is far from zero, x - pivot is exact.
    offsets, mask, n = _tile(
        split, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K
    )
    values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    if valid is not None:  # after the load of x, which is wide where the mask is of whole vectors
        mask &= _load_valid(valid, split, rows, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
        values = tl.where(mask, values, 0.0)
        n = _sum(mask.to(tl.int32), INNERMOST)
    pivot = _sum(values, INNERMOST) / tl.maximum(n, 1)
    sums = tl.where(mask, values - pivot, 0.0)
    squares = sums * sums
    for t in tl.range(split + splits, tiles, splits, num_stages=STAGES):
        offsets, mask, count = _tile(
            t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K
        )
        values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
        if valid is not None:
            mask &= _load_valid(valid, t, rows, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
            count = _sum(mask.to(tl.int32), INNERMOST)
        d = tl.where(mask, values - pivot, 0.0)
        sums += d
        squares += d * d
        n += count
    sum_d = _sum(sums, INNERMOST).to(tl.float64)
    sum_d2 = _sum(squares, INNERMOST).to(tl.float64)
    values_or_1 = tl.maximum(n, 1)
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    plane = splits * channels
    out = partials + split * channels + channel
    tl.store(out, n + tl.zeros_like(sum_d), mask=inside)
    tl.store(out + plane, pivot.to(tl.float64) + sum_d / values_or_1, mask=inside)
    tl.store(out + 2 * plane, sum_d2 - sum_d * sum_d / values_or_1, mask=inside)

    if _is_last(tickets, group, splits):
        at_once: tl.constexpr = BLOCK_R // 4 if INNERMOST else BLOCK_R * BLOCK_K // 16
        width: tl.constexpr = BLOCK_K if INNERMOST else 1
        all_n = tl.zeros([at_once, width], tl.float64)
        all_x = tl.zeros([at_once, width], tl.float64)
        all_x2 = tl.zeros([at_once, width], tl.float64)
        for first in range(0, splits, at_once):
            at, there = _partials_at(partials, first, splits, channels, channel, inside, at_once)
            ns = _load_partials(at, there)
            means = _load_partials(at + plane, there)
            all_n += ns
            all_x += ns * means
            all_x2 += _load_partials(at + 2 * plane, there) + ns * means * means
        sum_n = tl.sum(all_n, 0, keep_dims=True)
        sum_x = tl.sum(all_x, 0, keep_dims=True)
        tl.store(message + channel, sum_x, mask=inside)
        tl.store(message + channels + channel, tl.sum(all_x2, 0, keep_dims=True), mask=inside)
        if own is not None:
            mean = sum_x / tl.maximum(sum_n, 1.0)
            around = tl.zeros([at_once, width], tl.float64)
            for first in range(0, splits, at_once):
                at, there = _partials_at(
                    partials, first, splits, channels, channel, inside, at_once
                )
                rest = tl.where(there, _load_partials(at + plane, there) - mean, 0.0)
                around += _load_partials(at + 2 * plane, there)
                around += _load_partials(at, there) * rest * rest
            tl.store(own + channel, sum_x, mask=inside)
            tl.store(own + channels + channel, tl.sum(around, 0, keep_dims=True), mask=inside)
        if group == 0:
            tl.store(message + 2 * channels + channel, sum_n, mask=channel == 0)
            if own is not None:
                tl.store(own + 2 * channels + channel, sum_n, mask=channel == 0)
            _store_stamp(message, end, stamp)


@_jit
def _deviations(second, own, message, channels, end, stamp, BLOCK: tl.constexpr):
    """Stores Σ(x - μ)² = Σ(x - m)² + n (m - μ)² of each channel."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    mean = tl.load(message + channel, mask=inside, other=0.0)
    mean = mean / tl.maximum(tl.load(message + 2 * channels), 1.0)
    n = tl.load(own + 2 * channels)
    rest = tl.load(own + channel, mask=inside, other=0.0) / tl.maximum(n, 1.0) - mean
    around = tl.load(own + channels + channel, mask=inside, other=0.0)
    tl.store(second + channel, around + n * rest * rest, mask=inside)
    if tl.program_id(0) == 0:
        _store_stamp(second, end, stamp)


@_jit
def _mean_and_variance(message, second, channels, channel, inside, values):
    mean = tl.load(message + channel, mask=inside, other=0.0) / values
    if second is None:
        squares = tl.load(message + channels + channel, mask=inside, other=0.0)
        variance = squares / values - mean * mean
    else:
        variance = tl.load(second + channel, mask=inside, other=0.0) / values
    return mean, tl.where(variance < 0, 0.0, variance)  # keeps a NaN, unlike maximum


@_jit
def _towards(running, value, factor, mask):
    """Moves a running value as torch.lerp does."""
    old = tl.load(running, mask=mask, other=0.0).to(tl.float64)
    tl.store(running, old + factor * (value - old), mask=mask)


@_jit
def _finish(
    stats, values_of_all, message, second, weight, bias, running_mean, running_var, tracked,
    skipped, mismatch, channels, end, second_end, processes, momentum,
    EPS: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores stats and |B|, moves the running statistics, and compares the stamps."""
    if mismatch is not None:
        _compare_stamps(mismatch, message, end, processes)
        if second is not None:
            _compare_stamps(mismatch, second, second_end, processes)
    n = tl.load(message + 2 * channels)
    tl.store(values_of_all, n)
    values = tl.maximum(n, 1.0)
    unbias = n / tl.maximum(n - 1.0, 1.0)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        inside = channel < channels
        mean, variance = _mean_and_variance(message, second, channels, channel, inside, values)
        invstd = 1.0 / tl.sqrt(variance + EPS)
        scale = invstd
        if weight is not None:
            scale = invstd * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64)
        shift = tl.zeros([BLOCK], tl.float64)
        if bias is not None:
            shift += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float64)
        tl.store(stats + channel, mean, mask=inside)
        tl.store(stats + channels + channel, invstd, mask=inside)
        tl.store(stats + 2 * channels + channel, scale, mask=inside)
        tl.store(stats + 3 * channels + channel, shift, mask=inside)
        a = tl.abs(mean)
        b = tl.abs(variance * unbias)
        if running_mean is not None:
            # In the buffers' dtype: a variance may overflow in a module of half precision.
            a = a.to(running_mean.dtype.element_ty).to(tl.float64)
            b = b.to(running_var.dtype.element_ty).to(tl.float64)
        finite = (a < float("inf")) & (b < float("inf"))  # False for a NaN
        bad = tl.where(inside, tl.where(finite, bad, 1), bad)
    if tracked is not None or running_mean is not None:
        keep = tl.where(n > 1.0, tl.where(tl.max(bad, 0) == 0, 1, 0), 0)
        if skipped is not None:
            tl.store(skipped, tl.load(skipped) + tl.where(n > 0.0, 1 - keep, 0).to(tl.int64))
        factor = tl.full([], 0.0, tl.float64) + momentum
        if tracked is not None:
            updates = tl.load(tracked) + keep.to(tl.int64)
            tl.store(tracked, updates)
            if CUMULATIVE:
                factor = 1.0 / tl.maximum(updates, 1).to(tl.float64)
        if running_mean is not None:
            for first in range(0, channels, BLOCK):
                channel = first + tl.arange(0, BLOCK)
                inside = channel < channels * keep
                mean, variance = _mean_and_variance(
                    message, second, channels, channel, inside, values
                )
                _towards(running_mean + channel, mean, factor, inside)
                _towards(running_var + channel, variance * unbias, factor, inside)


@_jit
def _gradient_sums(
    message, totals, partials, tickets, dy, x, y, stats, end, stamp,
    rows, channels, vectors, groups, tiles, splits,
    RELU: tl.constexpr, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores Σ dy' and Σ dy' x̂ in the message and in totals (2, C), by way of the splits' sums.

    partials (2, splits, C) has the sums of each split.
    """
    group, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    mean, invstd, scale, bias = _stats(stats, channels, channel, inside, ACC)
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
    plane = splits * channels
    out = partials + split * channels + channel
    tl.store(out, _sum(sums, INNERMOST), mask=inside)
    tl.store(out + plane, _sum(products, INNERMOST) * invstd, mask=inside)

    if _is_last(tickets, group, splits):
        at_once: tl.constexpr = BLOCK_R // 4 if INNERMOST else BLOCK_R * BLOCK_K // 16
        width: tl.constexpr = BLOCK_K if INNERMOST else 1
        all_dy = tl.zeros([at_once, width], tl.float64)
        all_products = tl.zeros([at_once, width], tl.float64)
        for first in range(0, splits, at_once):
            at, there = _partials_at(partials, first, splits, channels, channel, inside, at_once)
            all_dy += _load_partials(at, there)
            all_products += _load_partials(at + plane, there)
        sum_dy = tl.sum(all_dy, 0, keep_dims=True)
        sum_products = tl.sum(all_products, 0, keep_dims=True)
        tl.store(message + channel, sum_dy, mask=inside)
        tl.store(message + channels + channel, sum_products, mask=inside)
        tl.store(totals + channel, sum_dy, mask=inside)
        tl.store(totals + channels + channel, sum_products, mask=inside)
        if group == 0:
            _store_stamp(message, end, stamp)


@_jit
def _normalize(
    y, x, residual, stats, rows, channels, vectors, groups,
    RELU: tl.constexpr, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores y of one tile."""
    group, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    offsets, mask, _ = _tile(t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    mean, _, scale, bias = _stats(stats, channels, channel, inside, ACC)
    output = _affine(values, mean, scale, bias)
    if residual is not None:
        output += tl.load(residual + offsets, mask=mask, other=0.0).to(ACC)
    if RELU:
        output = tl.where(output <= 0, 0.0, output)  # keeps a NaN, unlike maximum
    tl.store(y + offsets, output, mask=mask)


@_jit
def _input_gradient(
    dx, dresidual, dy, x, y, stats, message, values_of_all, valid, mismatch, end, processes,
    rows, channels, vectors, groups,
    RELU: tl.constexpr, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores dx of one tile, and dy' where dresidual is given."""
    if mismatch is not None:
        if tl.program_id(0) == 0:
            _compare_stamps(mismatch, message, end, processes)
    group, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    offsets, mask, _ = _tile(t, group, rows, channels, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
    channel, inside = _channel(group, vectors, INNERMOST, VECTOR, BLOCK_K)
    values = tl.load(x + offsets, mask=mask, other=0.0)
    gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(ACC)
    mean, invstd, scale, bias = _stats(stats, channels, channel, inside, ACC)
    # In float32 for most x: a division in float64 is a call, for which registers are spilled.
    n = tl.maximum(tl.load(values_of_all), 1.0).to(ACC)
    mean_dy = tl.load(message + channel, mask=inside, other=0.0).to(ACC) / n
    mean_products = tl.load(message + channels + channel, mask=inside, other=0.0).to(ACC) / n
    if RELU:
        gradient = _before_relu(gradient, values, mean, scale, bias, y, offsets, mask, ACC)
    if dresidual is not None:
        tl.store(dresidual + offsets, gradient, mask=mask)
    xhat = (values.to(ACC) - mean) * invstd
    through_statistics = mean_dy + xhat * mean_products
    if valid is not None:
        counted = _load_valid(valid, t, rows, vectors, INNERMOST, VECTOR, BLOCK_R, BLOCK_K)
        through_statistics = tl.where(counted, through_statistics, 0.0)
    tl.store(dx + offsets, scale * (gradient - through_statistics), mask=mask)
