"""The launches of the kernels on tensors, one kernel a function."""

import contextlib

import torch
from torch import Tensor

from . import elementwise, per_channel, reductions
from .tiling import NUM_WARPS, STAGES, laid_out_as, tiling_of

# Channels that a program of the kernels without x takes at a time.
CHANNELS = 1024
_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Returns a context in which x's GPU is the current one, which Triton launches on."""
    index = x.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return _HERE  # torch.cuda.device_of would take the host four times as long
    return torch.cuda.device(index)


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
    tiling = tiling_of(x, True)
    partials = x.new_empty(3, tiling.splits, x.shape[1], dtype=torch.float64)
    with on_device_of(x):
        reductions.moments[(tiling.groups * tiling.splits,)](
            message, own, partials, _tickets(x, tiling.groups), x, _bytes(valid),
            message.numel() - 2, stamp, *tiling.sizes, tiling.tiles, tiling.splits,
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
    channels = own.numel() // 2
    with on_device_of(own):
        per_channel.deviations[(-(-channels // CHANNELS),)](
            second, own, message, channels, second.numel() - 2, stamp, BLOCK=CHANNELS
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
    with on_device_of(stats):
        per_channel.finish[(1,)](
            stats, count, message, second, weight, bias, running_mean, running_var,
            num_batches_tracked, num_batches_skipped, mismatch, channels, message.numel() - 2,
            0 if second is None else second.numel() - 2, processes, momentum or 0.0,
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
    dy, y = _gradient_inputs(dy, x, relu, y)
    tiling = tiling_of(x, True, dy, y)
    partials = stats.new_empty(2, tiling.splits, x.shape[1])
    sums = stats.new_empty(2, x.shape[1])
    with on_device_of(x):
        reductions.gradient_sums[(tiling.groups * tiling.splits,)](
            message, sums, partials, _tickets(x, tiling.groups), dy, x, y, stats,
            message.numel() - 2, stamp, *tiling.sizes, tiling.tiles, tiling.splits, relu,
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
    tiling = tiling_of(x, False)
    if residual is not None:
        residual = laid_out_as(x, residual, "residual")
    y = torch.empty_like(x)
    with on_device_of(x):
        elementwise.normalize[(tiling.groups * tiling.tiles,)](
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
    tiling = tiling_of(x, False)
    dy, y = _gradient_inputs(dy, x, relu, y)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if needs_residual else None
    with on_device_of(x):
        elementwise.input_gradient[(tiling.groups * tiling.tiles,)](
            dx, dresidual, dy, x, y, stats, message, count, _bytes(valid), mismatch,
            message.numel() - 2, processes, *tiling.sizes, relu, **tiling.constants,
        )  # fmt: skip
    return dx, dresidual


def _gradient_inputs(
    dy: Tensor, x: Tensor, relu: bool, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    y = laid_out_as(x, y, "y") if relu and y is not None else None
    return laid_out_as(x, dy, "dy"), y


def _bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.view(torch.uint8)


# --- tickets -------------------------------------------------------------------------------------

# For each device and stream, a counter per group of tiles. They are 0 between two kernels.
_counters: dict[tuple[int, int], Tensor] = {}


def _tickets(x: Tensor, groups: int) -> Tensor:
    """Returns counters, all 0, by which the programs of a group find out which one is the last.

    The last program sets its counter to 0 again. The kernels of a stream run one after another. So
    the counters of a stream serve all its kernels, without a launch that clears them.
    """
    device, stream = x.get_device(), 0
    if x.is_cuda:  # and not Triton's interpreter
        if torch.cuda.is_current_stream_capturing():
            # A graph may run beside other work of the stream that has recorded it.
            return x.new_zeros(groups, dtype=torch.int32)
        stream = torch._C._cuda_getCurrentRawStream(device)  # as Triton's launcher asks for it
    key = device, stream
    if key not in _counters or len(_counters[key]) < groups:
        _counters[key] = x.new_zeros(max(CHANNELS, groups), dtype=torch.int32)
    return _counters[key]
