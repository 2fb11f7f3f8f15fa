"""The tiles of x, on the host and in a kernel.

All kernels treat x as a matrix and divide it into tiles of BLOCK_R rows and BLOCK_K columns::

    channels outermost  x[n, c, s]   a tile has rows c and columns s, of one image n
    channels innermost  x[m, c]      a tile has rows m = (n, s) and columns c
    flat                x[n, (c, s)] a tile has rows n and columns (c, s)

The tiles with the same channels form a group. A program of a reduction takes every ``splits``-th
tile of a group. Channels outermost with odd sizes, such as 7x7, would be loaded value by value,
since most rows do not start at a multiple of 16 bytes. There an elementwise kernel takes x as flat.
A reduction loads whole multiples of 16 bytes, and leaves out what belongs to the next rows.
"""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .jit import jit

try:
    import triton.language as tl
except ImportError:
    tl = None

# Values in a tile: 16 for each of 128 threads, which are two 16-byte loads in half precision and
# four in float32. NARROW is a cache line in half precision, and wastes little on 7x7 regions. Rows
# of 256 values or more have tiles of WIDE columns.
TILE, NARROW, WIDE, NUM_WARPS = 2048, 64, 512, 4
# Programs of a reduction: about four for each of the 132 multiprocessors of an H100. The registers
# suffice to run them at once, and each has STAGES - 1 loads of tiles in flight.
PROGRAMS, STAGES = 512, 4


class Tiling(NamedTuple):
    groups: int
    tiles: int  # per group
    splits: int  # programs per group in a reduction
    sizes: tuple[int, int, int, int]  # rows, channels, vectors in a row, groups
    constants: dict  # compile-time constants of a kernel


def tiling_of(x: Tensor, reduces: bool, *others: Tensor | None) -> Tiling:
    """Returns the tiling of x for a reduction that also reads the others, or for another kernel.

    A kernel is compiled per shape of a tile, layout, width of a load and dtype.
    """
    # Two tensors of float32 would need more than the 128 registers of four programs. Their single
    # values are 4 bytes, which asynchronous copies can load.
    aligned = reduces and x.itemsize <= (2 if others else 4) and _is_aligned(x)
    for other in others:
        aligned = aligned and _is_aligned(other)
    return _tiling(x.shape, x.stride(), x.dtype, reduces, aligned, PROGRAMS)


@functools.lru_cache(4096)  # a detector has tens of sizes; the host would compute them each time
def _tiling(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    reduces: bool,
    aligned: bool,
    programs: int,
) -> Tiling:
    innermost = _innermost(shape, strides)
    if innermost is None or shape.numel() == 0:
        raise ValueError(
            "kernels: x must be contiguous or channels_last, and not empty; got shape "
            f"{tuple(shape)}, strides {strides}. Use x.contiguous()."
        )
    n, channels = shape[:2]
    size = shape.numel() // (n * channels)
    rows, columns = (n * size, channels) if innermost else (n, size)
    tile = TILE // 2 if dtype == torch.float64 else TILE  # STAGES tiles fit into shared memory
    widest = 16 // dtype.itemsize
    block_k = NARROW if innermost or size < 4 * NARROW else WIDE * tile // TILE
    flat = math.gcd(channels * size, widest) > math.gcd(size, widest)
    flat = flat and not innermost and not reduces
    if flat:
        columns = channels * size
        block_k = NARROW if n >= tile // NARROW else tile // min(n, 2)
    block_r = tile // block_k
    # A load is as wide as the alignment of the rows, at most 16 bytes. Triton checks an argument's
    # divisibility by 16 only, and would load a row of 50x84 values one by one.
    vector = math.gcd(columns, widest)
    load = widest if aligned and not innermost else vector
    if innermost or flat:
        groups, tiles = -(-columns // block_k), -(-rows // block_r)
    else:
        groups, tiles = -(-channels // block_r), rows * -(-(columns + load - vector) // block_k)
    return Tiling(
        groups,
        tiles,
        splits=min(tiles, -(-programs // groups)),
        sizes=(rows, channels, columns // vector, groups),
        constants={
            "LAYOUT": "flat" if flat else "innermost" if innermost else "outermost",
            "VECTOR": vector,
            "LOAD": load,
            "BLOCK_R": block_r,
            "BLOCK_K": block_k,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": NUM_WARPS,
        },
    )


def _is_aligned(x: Tensor | None) -> bool:
    # Not data_ptr(), which fake tensors do not have. Allocations are aligned to 512 bytes.
    return x is None or bool(x.storage_offset() * x.itemsize % 16 == 0)


def channels_innermost(x: Tensor) -> bool | None:
    """Returns True for channels innermost in memory, False for outermost, None for neither."""
    return _innermost(x.shape, x.stride())


@functools.lru_cache(4096)
def _innermost(shape: torch.Size, strides: tuple[int, ...]) -> bool | None:
    if _is_contiguous(shape, strides):
        return shape.numel() == shape[0] * shape[1]  # (N, C, 1, 1) is both
    n, channels, *sizes = zip(shape, strides, strict=True)
    return True if _is_contiguous(*zip(n, *sizes, channels, strict=True)) else None


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def laid_out_as(x: Tensor, other: Tensor, name: str) -> Tensor:
    if other.shape != x.shape:
        raise ValueError(
            f"kernels: {name} must have the shape of x, {tuple(x.shape)}; got {tuple(other.shape)}"
        )
    if other.stride() == x.stride() or channels_innermost(other) == channels_innermost(x):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


# --- in a kernel ---------------------------------------------------------------------------------


@jit
def tile(
    t, group, rows, channels, vectors,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns offsets (BLOCK_R, BLOCK_K) of a group's tile t, two masks, and values per channel.

    The first mask has what is loaded, the second one what belongs to the tile. Row numbers fit into
    32 bits; offsets may not.
    """
    columns = vectors * VECTOR
    if LAYOUT == "outermost":
        across = (columns + LOAD - VECTOR + BLOCK_K - 1) // BLOCK_K
        first_column = t % across * BLOCK_K
        row = group * BLOCK_R + tl.arange(0, BLOCK_R)
        column = (first_column + tl.arange(0, BLOCK_K))[None, :]
        inside = (row < channels)[:, None]
        start = (t // across * channels + row).to(tl.int64)[:, None] * columns
        if LOAD == VECTOR:
            mask = inside & (column < columns)
            loaded = mask
            count = tl.minimum(columns - first_column, BLOCK_K)
        else:
            # Moved back to a multiple of LOAD. A load has values of the rows before and after.
            start = start.to(tl.uint64)
            shift = (start % LOAD).to(tl.int32)
            start = start // LOAD * LOAD
            end = shift + columns
            # One comparison for each value: below the shift an unsigned difference is too large.
            length = tl.where(inside, columns, 0).to(tl.uint32)
            mask = (column - shift).to(tl.uint32) < length
            units = tl.where(inside, end + LOAD - 1, 0).to(tl.uint32) // LOAD
            loaded = column.to(tl.uint32) // LOAD < units
            count = tl.minimum(end, first_column + BLOCK_K) - tl.maximum(shift, first_column)
            count = tl.maximum(count, 0)
    else:
        row = t * BLOCK_R + tl.arange(0, BLOCK_R)
        column = (group * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        start = row.to(tl.int64)[:, None] * columns
        mask = (row < rows)[:, None] & (column < columns)
        loaded = mask
        count = tl.minimum(rows - t * BLOCK_R, BLOCK_R)
    return start + column, loaded, mask, count


@jit
def load_valid(
    valid, t, group, offsets, mask, rows, channels, vectors,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the mask (N, 1, *) of tile t, in a shape that broadcasts to (BLOCK_R, BLOCK_K)."""
    columns = vectors * VECTOR
    if LAYOUT == "innermost":
        at = (t * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        return tl.load(valid + at, mask=at < rows, other=0) != 0
    elif LAYOUT == "flat":
        size = columns // channels
        row = (t * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        column = (group * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        return tl.load(valid + row * size + column % size, mask=mask, other=0) != 0
    else:
        across = (columns + LOAD - VECTOR + BLOCK_K - 1) // BLOCK_K
        channel = group * BLOCK_R + tl.arange(0, BLOCK_R)
        before = (t // across * (channels - 1) + channel).to(tl.int64)[:, None] * columns
        return tl.load(valid + (offsets - before), mask=mask, other=0) != 0


@jit
def channels_of(
    group, channels, vectors,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns a group's channels and their mask, in a shape that broadcasts to tiles."""
    if LAYOUT == "outermost":
        channel = group * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    else:
        channel = group * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        if LAYOUT == "flat":
            channel = channel // (vectors * VECTOR // channels)
    return channel, channel < channels
