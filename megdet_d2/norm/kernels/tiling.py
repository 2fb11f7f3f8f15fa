"""The tiles of x, on the host and in a kernel.

All kernels treat x as a matrix and divide it into tiles in the same way::

    channels outermost  x[n, c, s]   rows (n, c), columns s      a tile has one channel
    channels innermost  x[m, c]      rows m = (n, s), columns c  a tile has BLOCK_K channels

The tiles of one channel, or of one block of channels, form a group. A program of a reduction takes
every ``splits``-th tile of a group.
"""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .jit import jit

try:
    import triton.language as tl
except ImportError:
    tl = None

# Values in a tile: 16 for each of 128 threads, which are two 16-byte loads in half precision and
# four in float32. A tile is one row, or NARROW columns of several rows. NARROW is a cache line in
# half precision, and wastes little on 7x7 regions.
TILE, NARROW, NUM_WARPS = 2048, 64, 4
# Programs of a reduction: about four for each of the 132 multiprocessors of an H100. The registers
# suffice to run them at once, and each has STAGES - 1 loads of tiles in flight.
PROGRAMS, STAGES = 512, 4


class Tiling(NamedTuple):
    groups: int
    tiles: int  # per group
    splits: int  # programs per group in a reduction
    sizes: tuple[int, int, int, int]  # rows of a group, channels, vectors in a row, groups
    constants: dict  # compile-time constants of a kernel


def tiling_of(x: Tensor) -> Tiling:
    """Returns the tiling of x.

    A kernel is compiled per shape of a tile (two), layout (two), width of a load and dtype.
    """
    innermost = channels_innermost(x)
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
) -> Tiling:
    rows, columns = (n * size, channels) if innermost else (n, size)
    tile = TILE // 2 if dtype == torch.float64 else TILE  # STAGES tiles fit into shared memory
    block_k = NARROW if innermost or size < tile // 2 else tile
    block_r = tile // block_k
    row_tiles, column_tiles = -(-rows // block_r), -(-columns // block_k)
    groups, tiles = (column_tiles, row_tiles) if innermost else (channels, row_tiles * column_tiles)
    # A load is as wide as the alignment of the rows, at most 16 bytes. Triton checks an argument's
    # divisibility by 16 only, and would load a row of 50x84 values one by one.
    vector = math.gcd(columns, 16 // dtype.itemsize)
    return Tiling(
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


def channels_innermost(x: Tensor) -> bool | None:
    """Returns True for channels innermost in memory, False for outermost, None for neither."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]  # (N, C, 1, 1) is both
    return True if x.movedim(1, -1).is_contiguous() else None


def laid_out_as(x: Tensor, other: Tensor, name: str) -> Tensor:
    if other.shape != x.shape:
        raise ValueError(
            f"kernels: {name} must have the shape of x, {tuple(x.shape)}; got {tuple(other.shape)}"
        )
    if channels_innermost(other) == channels_innermost(x):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


# --- in a kernel ----------------------------------------------------------------------------------


@jit
def tile(
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


@jit
def load_valid(
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


@jit
def channels_of(
    group, vectors, INNERMOST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Returns a group's channels and their mask, (1, BLOCK_K) or (1, 1), to broadcast to tiles."""
    if INNERMOST:
        channel = group * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        inside = channel < vectors * VECTOR
    else:
        channel = group + tl.zeros([1, 1], tl.int32)
        inside = channel >= 0
    return channel, inside
