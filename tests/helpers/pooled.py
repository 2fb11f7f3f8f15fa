"""Compares a layer over several processes with batch norm of the pooled mini-batch in float64."""

import torch
from torch import nn

from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.groups import consecutive_group

EPS, MOMENTUM = 1e-3, 0.3
# Shapes by rank; the reference does not care how the mini-batch was cut.
PARTS = {
    "equal": [(2, 5, 4, 3)] * 4,
    "unequal N": [(1, 5, 4, 3), (4, 5, 4, 3), (2, 5, 4, 3), (3, 5, 4, 3)],
    "unequal H and W": [(2, 5, 1, 7), (2, 5, 6, 3), (1, 5, 4, 4), (2, 5, 2, 2)],
    "one empty": [(3, 5, 4, 3), (0, 5, 4, 3), (2, 5, 4, 3), (2, 5, 4, 3)],
    "one value": [(1, 5, 1, 1), (1, 5, 1, 1), (1, 5, 1, 1), (1, 5, 1, 1)],
}
# Relative and absolute, by the dtype of the input.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 3e-5),
    torch.bfloat16: (2e-2, 6e-2),
    torch.float16: (2e-3, 1e-2),
}


def make_inputs(shapes, dtype=torch.float64, seed=0):
    """Makes an x and a dy for every rank; content and scale differ between the ranks."""
    generator = torch.Generator().manual_seed(seed)
    xs, dys = [], []
    for i, shape in enumerate(shapes):
        channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        xs.append((x * (i + 1) + 3 * channel - 2 * i).to(dtype))
        dys.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    return xs, dys


def affine(channels, dtype=torch.float64):
    """Returns a weight and a bias that differ by channel."""
    weight = torch.linspace(-1, 2, channels, dtype=torch.float64)
    bias = torch.linspace(1, -1, channels, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype)


def pooled_reference(xs, dys, steps=2):
    """Runs nn.BatchNorm1d in float64 on all values of all ranks at once."""
    channels = xs[0].shape[1]

    def flat(t):
        return t.double().movedim(1, -1).reshape(-1, channels)

    sizes = [flat(x).shape[0] for x in xs]
    x = torch.cat([flat(x) for x in xs]).requires_grad_()
    dy = torch.cat([flat(dy) for dy in dys])
    layer = nn.BatchNorm1d(channels, EPS, MOMENTUM).double()
    layer.weight.data, layer.bias.data = affine(channels)
    for _ in range(steps):
        y = layer(x)
    y.backward(dy)

    def unflat(t):
        return [
            part.reshape(*old.movedim(1, -1).shape).movedim(-1, 1)
            for part, old in zip(t.split(sizes), xs, strict=True)
        ]

    return {
        "y": unflat(y.detach()),
        "dx": unflat(x.grad),
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def run_layer(rank, xs, dys, algorithm, group_size, memory_format, steps=2):
    """Runs the layer on this rank's part, forward and backward, after checks of the outputs."""
    x = xs[rank].to(memory_format=memory_format).requires_grad_()
    group = None if group_size is None else consecutive_group(group_size)
    layer = CrossGPUBatchNorm(x.shape[1], EPS, MOMENTUM, process_group=group, algorithm=algorithm)
    layer.weight.data, layer.bias.data = affine(x.shape[1], torch.float32)
    if x.dtype == torch.float64:
        layer.double()
        layer.weight.data, layer.bias.data = affine(x.shape[1])
    for _ in range(steps):
        y = layer(x)
    y.backward(dys[rank])
    assert y.shape == x.shape and y.dtype == x.dtype and x.grad.dtype == x.dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert layer.num_batches_tracked == steps
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def assert_equals_pooled(results, reference, rtol, atol):
    """Compares what ``run_layer`` returned on all ranks with ``pooled_reference``."""
    for rank, result in enumerate(results):
        for key in ("y", "dx"):
            torch.testing.assert_close(
                result[key].double(),
                reference[key][rank],
                rtol=rtol,
                atol=atol,
                msg=lambda m, at=f"rank {rank}, {key}": f"{at}: {m}",
            )
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(
                result[key].double(), reference[key], rtol=min(rtol, 1e-5), atol=1e-6
            )
            assert torch.equal(result[key], results[0][key]), (
                "ranks of a group must agree to the bit"
            )
    for key in ("dweight", "dbias"):
        total = sum(result[key].double() for result in results)
        torch.testing.assert_close(total, reference[key], rtol=rtol, atol=atol * 10)
