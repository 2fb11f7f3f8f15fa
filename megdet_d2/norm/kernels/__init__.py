"""The passes of Algorithm 1 over x as Triton kernels; each pass reads its inputs once.

Memory bandwidth limits the speed of batch norm on large tensors, and the number of launches on
small ones. Two passes reduce x to values per channel (``power_sums``, ``gradient_sums``), and write
them as the message of the collective. Two passes map x to a tensor of its size (``normalize``,
``input_gradient``), and include a following addition and ReLU. ``finish`` does all that remains
per channel. So a layer launches three kernels forward and two backward, beside its collectives.

x is (N, C, *), 2-D to 5-D, with channels outermost (contiguous) or innermost (channels_last), and
not empty. Arithmetic is float64 for float64 inputs, and float32 for all others. No function waits
for the GPU, and the order of every sum is fixed.

The values of the channels are rows of one tensor, ``stats`` (4, C): mean, invstd = 1 / √(σ² + ε),
scale = γ · invstd, and bias = β. A ``message`` is a float64 vector: first the sums, and in its last
two places the stamp of the layer and its square, see ``collective``.

``launch`` has these functions. The kernels are in ``reductions``, ``elementwise`` and
``per_channel``; all divide x as ``tiling`` does.
"""

from .jit import available
from .launch import deviations, finish, gradient_sums, input_gradient, normalize, power_sums

__all__ = [
    "available",
    "deviations",
    "finish",
    "gradient_sums",
    "input_gradient",
    "normalize",
    "power_sums",
]
