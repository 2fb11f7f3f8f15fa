"""The kernels that need no x: what remains per channel, and the stamps of the messages."""

from __future__ import annotations  # the annotation tl.constexpr works without Triton

from .jit import jit

try:
    import triton.language as tl
except ImportError:
    pass


@jit
def deviations(second, own, message, channels, end, stamp, BLOCK: tl.constexpr):
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
        store_stamp(second, end, stamp)


@jit
def finish(
    stats, values_of_all, message, second, weight, bias, running_mean, running_var, tracked,
    skipped, mismatch, channels, end, second_end, processes, momentum,
    EPS: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores stats and |B|, moves the running statistics, and compares the stamps."""
    if mismatch is not None:
        compare_stamps(mismatch, message, end, processes)
        if second is not None:
            compare_stamps(mismatch, second, second_end, processes)
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


@jit
def _mean_and_variance(message, second, channels, channel, inside, values):
    mean = tl.load(message + channel, mask=inside, other=0.0) / values
    if second is None:
        squares = tl.load(message + channels + channel, mask=inside, other=0.0)
        variance = squares / values - mean * mean
    else:
        variance = tl.load(second + channel, mask=inside, other=0.0) / values
    return mean, tl.where(variance < 0, 0.0, variance)  # keeps a NaN, unlike maximum


@jit
def _towards(running, value, factor, mask):
    """Moves a running value as torch.lerp does."""
    old = tl.load(running, mask=mask, other=0.0).to(tl.float64)
    tl.store(running, old + factor * (value - old), mask=mask)


@jit
def store_stamp(message, end, stamp):
    if stamp is not None:
        value = stamp.to(tl.float64)
        tl.store(message + end, value)
        tl.store(message + end + 1, value * value)


@jit
def compare_stamps(mismatch, message, end, processes):
    """Sets the flag if K Σ s² differs from (Σ s)²: K processes have sent different stamps."""
    total = tl.load(message + end)
    if processes.to(tl.float64) * tl.load(message + end + 1) != total * total:
        tl.store(mismatch, 1)
