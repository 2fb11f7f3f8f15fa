"""The kernels that reduce x to values per channel: its moments, and the sums of the backward.

Each program sums up the tiles of one split. The last program of a group to end merges the results
of all its splits, in their order. Counters of ended programs, the tickets, tell which one it is.
"""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

from .elementwise import before_relu, load_stats
from .jit import jit
from .per_channel import store_stamp
from .tiling import channels_of, load_valid, tile

try:
    import triton.language as tl
except ImportError:
    pass


@jit
def moments(
    message, own, partials, tickets, x, valid, end, stamp,
    rows, channels, vectors, groups, tiles, splits,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores Σ x, Σ x² and n in the message, and Σ(x - mean)² in ``own``, from the splits' moments.

    partials (3, splits, C) has n, mean and Σ(x - mean)² of each split.
    """
    group, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    # Sums of d = x - pivot and of d², where the pivot is the mean of the split's first tile with
    # values. With n₁ of them, (pivot - mean)² ≤ variance · n / n₁ for all data, so Σd² - (Σd)²/n
    # keeps its digits. Where the mean is far from zero, x - pivot is exact.
    channel, inside = channels_of(group, channels, vectors, LAYOUT, VECTOR, BLOCK_R, BLOCK_K)
    first = split
    pivot = tl.zeros_like(channel).to(ACC)
    n = tl.zeros_like(channel)
    sums = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    squares = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    if LOAD != VECTOR:  # the loop has no registers left for it
        values, mask, count = _tile_of_x(
            x, valid, split, group, rows, channels, vectors, LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K,
            ACC,
        )  # fmt: skip
        # The last tile of a row may have none of its values. Then the pivot is one of them.
        columns = vectors * VECTOR
        image = split // ((columns + LOAD - VECTOR + BLOCK_K - 1) // BLOCK_K)
        start = (image * channels + channel).to(tl.int64) * columns
        one = tl.load(x + start, mask=inside, other=0.0).to(ACC)
        pivot = tl.where(count > 0, _mean(values, mask, count, LAYOUT), one)
        sums = tl.where(mask, values - pivot, 0.0)
        squares = sums * sums
        n += count
        first += splits
    for t in tl.range(first, tiles, splits, num_stages=STAGES):
        values, mask, count = _tile_of_x(
            x, valid, t, group, rows, channels, vectors, LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K, ACC
        )
        if LOAD == VECTOR:  # here, so that the next tiles are on their way before it is computed
            is_first = t == split if valid is None else tl.max(n) == 0
            if is_first:
                pivot = _mean(values, mask, count, LAYOUT)
        d = tl.where(mask, values - pivot, 0.0)
        sums += d
        squares += d * d
        n += count
    sum_d = _sum(sums, LAYOUT).to(tl.float64)
    sum_d2 = _sum(squares, LAYOUT).to(tl.float64)
    values_or_1 = tl.maximum(n, 1)
    plane = splits * channels
    out = partials + split * channels + channel
    tl.store(out, n + tl.zeros_like(sum_d), mask=inside)
    tl.store(out + plane, pivot.to(tl.float64) + sum_d / values_or_1, mask=inside)
    tl.store(out + 2 * plane, sum_d2 - sum_d * sum_d / values_or_1, mask=inside)

    if _is_last(tickets, group, splits):
        # A quarter of a tile, with the splits where the tile has what is summed.
        height: tl.constexpr = BLOCK_R if LAYOUT == "outermost" else BLOCK_R // 4
        width: tl.constexpr = BLOCK_K // 4 if LAYOUT == "outermost" else BLOCK_K
        at_once: tl.constexpr = width if LAYOUT == "outermost" else height
        all_n = tl.zeros([height, width], tl.float64)
        all_x = tl.zeros([height, width], tl.float64)
        all_x2 = tl.zeros([height, width], tl.float64)
        for first in range(0, splits, at_once):
            at, there = _partials_at(
                partials, first, splits, channels, channel, inside, LAYOUT, at_once
            )
            ns = _load_partials(at, there)
            means = _load_partials(at + plane, there)
            all_n += ns
            all_x += ns * means
            all_x2 += _load_partials(at + 2 * plane, there) + ns * means * means
        sum_n = _sum(all_n, LAYOUT)
        sum_x = _sum(all_x, LAYOUT)
        tl.store(message + channel, sum_x, mask=inside)
        tl.store(message + channels + channel, _sum(all_x2, LAYOUT), mask=inside)
        if own is not None:
            mean = sum_x / tl.maximum(sum_n, 1.0)
            around = tl.zeros([height, width], tl.float64)
            for first in range(0, splits, at_once):
                at, there = _partials_at(
                    partials, first, splits, channels, channel, inside, LAYOUT, at_once
                )
                rest = tl.where(there, _load_partials(at + plane, there) - mean, 0.0)
                around += _load_partials(at + 2 * plane, there)
                around += _load_partials(at, there) * rest * rest
            tl.store(own + channel, sum_x, mask=inside)
            tl.store(own + channels + channel, _sum(around, LAYOUT), mask=inside)
        if group == 0:
            tl.store(message + 2 * channels + channel, sum_n, mask=channel == 0)
            if own is not None:
                tl.store(own + 2 * channels + channel, sum_n, mask=channel == 0)
            store_stamp(message, end, stamp)


@jit
def gradient_sums(
    message, totals, partials, tickets, dy, x, y, stats, end, stamp,
    rows, channels, vectors, groups, tiles, splits,
    RELU: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores Σ dy' and Σ dy' x̂ in the message and in totals (2, C), by way of the splits' sums.

    partials (2, splits, C) has the sums of each split.
    """
    group, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel, inside = channels_of(group, channels, vectors, LAYOUT, VECTOR, BLOCK_R, BLOCK_K)
    mean, invstd, scale, bias = load_stats(stats, channels, channel, inside, ACC)
    sums = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    products = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    for t in tl.range(split, tiles, splits, num_stages=STAGES):
        offsets, loaded, mask, _ = tile(
            t, group, rows, channels, vectors, LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K
        )
        values = tl.load(x + offsets, mask=loaded, other=0.0)
        gradient = tl.load(dy + offsets, mask=loaded, other=0.0).to(ACC)
        if RELU:
            gradient = before_relu(gradient, values, mean, scale, bias, y, offsets, loaded, ACC)
        d = values.to(ACC) - mean
        if LOAD != VECTOR:  # both, since the values of other rows may be NaN
            gradient = tl.where(mask, gradient, 0.0)
            d = tl.where(mask, d, 0.0)
        sums += gradient
        products += gradient * d
    plane = splits * channels
    out = partials + split * channels + channel
    tl.store(out, _sum(sums, LAYOUT), mask=inside)
    tl.store(out + plane, _sum(products, LAYOUT) * invstd, mask=inside)

    if _is_last(tickets, group, splits):
        # A quarter of a tile, with the splits where the tile has what is summed.
        height: tl.constexpr = BLOCK_R if LAYOUT == "outermost" else BLOCK_R // 4
        width: tl.constexpr = BLOCK_K // 4 if LAYOUT == "outermost" else BLOCK_K
        at_once: tl.constexpr = width if LAYOUT == "outermost" else height
        all_dy = tl.zeros([height, width], tl.float64)
        all_products = tl.zeros([height, width], tl.float64)
        for first in range(0, splits, at_once):
            at, there = _partials_at(
                partials, first, splits, channels, channel, inside, LAYOUT, at_once
            )
            all_dy += _load_partials(at, there)
            all_products += _load_partials(at + plane, there)
        sum_dy = _sum(all_dy, LAYOUT)
        sum_products = _sum(all_products, LAYOUT)
        tl.store(message + channel, sum_dy, mask=inside)
        tl.store(message + channels + channel, sum_products, mask=inside)
        tl.store(totals + channel, sum_dy, mask=inside)
        tl.store(totals + channels + channel, sum_products, mask=inside)
        if group == 0:
            store_stamp(message, end, stamp)


@jit
def _tile_of_x(
    x, valid, t, group, rows, channels, vectors,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Returns the values of tile t, the mask of those that count, and their number per channel."""
    offsets, loaded, mask, count = tile(
        t, group, rows, channels, vectors, LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K
    )
    values = tl.load(x + offsets, mask=loaded, other=0.0).to(ACC)
    if valid is not None:
        mask &= load_valid(
            valid, t, group, offsets, mask, rows, channels, vectors,
            LAYOUT, VECTOR, LOAD, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        count = _sum(mask.to(tl.int32), LAYOUT)
    return values, mask, count


@jit
def _mean(values, mask, count, LAYOUT: tl.constexpr):
    """Returns the mean of each channel in a tile, or 0 where no value counts."""
    return _sum(tl.where(mask, values, 0.0), LAYOUT) / tl.maximum(count, 1)


@jit
def _sum(values, LAYOUT: tl.constexpr):
    """Returns the sum of each channel in a tile, in the shape that channels_of returns."""
    return tl.sum(values, 1 if LAYOUT == "outermost" else 0, keep_dims=True)


@jit
def _is_last(tickets, group, splits):
    """Returns True in the program of a group that ends last; it can then read what all stored."""
    tl.debug_barrier()  # all threads of this program have stored
    last = splits == 1
    if splits > 1:
        # Acquire and release make the stores of each program visible to the last one. The barrier
        # before, and the one within the atomic operation, extend this to all their threads.
        last = tl.atomic_add(tickets + group, 1, sem="acq_rel", scope="gpu") == splits - 1
        if last:
            tl.store(tickets + group, 0)  # for the next kernel of the stream
    return last


@jit
def _partials_at(
    partials, first, splits, channels, channel, inside,
    LAYOUT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Returns addresses and mask of a channel's values of AT_ONCE splits, from ``first`` on."""
    split = first + tl.arange(0, AT_ONCE)
    if LAYOUT == "outermost":
        split = split[None, :]
    else:
        split = split[:, None]
    return partials + split * channels + channel, (split < splits) & inside


@jit
def _load_partials(at, mask):
    # From the L2 cache: programs on other multiprocessors have stored them.
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
