"""Checks properties of all mini-batches, of any shape and split among ranks, by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm.functional import ALGORITHMS
from tests.helpers.pooled import (
    TOLERANCES,
    assert_equals_pooled,
    make_inputs,
    pooled_reference,
    run_layer,
)

thirty = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@st.composite
def parts(draw, ranks):
    """Draws a shape for every rank: equal dimensions and channels, all else arbitrary."""
    channels = draw(st.integers(1, 9))
    spatial = draw(st.integers(0, 3))
    shapes = [
        (draw(st.integers(0, 4)), channels, *(draw(st.integers(0, 5)) for _ in range(spatial)))
        for _ in range(ranks)
    ]
    values = sum(torch.Size(shape).numel() for shape in shapes) // channels
    return shapes if values >= 3 else [(3, *shape[1:2], *[1] * spatial) for shape in shapes]


def layouts(shapes):
    memory_formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return st.sampled_from(
        [torch.contiguous_format, memory_formats.get(len(shapes[0]), torch.contiguous_format)]
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_the_pooled_batch(request, ranks):
    pool = request.getfixturevalue(f"pool{ranks}")

    @thirty
    @given(st.data())
    def holds(data):
        shapes = data.draw(parts(ranks))
        dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.float16]))
        algorithm = data.draw(st.sampled_from(ALGORITHMS))
        layout = data.draw(layouts(shapes))
        xs, dys = make_inputs(shapes, dtype, seed=data.draw(st.integers(0, 99)))
        results = pool.run(run_layer, xs, dys, algorithm, None, layout)
        rtol, atol = TOLERANCES[dtype]
        # Of three values the smallest variance is small, and dx as much larger.
        assert_equals_pooled(results, pooled_reference(xs, dys), 4 * rtol, 4 * atol)

    holds()


def run_forward(rank, xs):
    x = xs[rank].requires_grad_()
    layer = CrossGPUBatchNorm(x.shape[1], eps=0.0, momentum=1.0).double()
    y = layer(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad, layer.running_mean, layer.running_var


@st.composite
def images(draw, ranks):
    sizes = [draw(st.integers(0, 3)) for _ in range(ranks)]
    sizes[0] += 2  # something to normalise
    xs, _ = make_inputs([(n, 3, 2, 3) for n in sizes], seed=draw(st.integers(0, 99)))
    return xs


def test_output_has_mean_0_and_variance_1_and_dx_sums_to_nothing(pool2):
    @thirty
    @given(images(2))
    def holds(xs):
        results = pool2.run(run_forward, xs)
        y, dx = (torch.cat([result[i] for result in results]) for i in (0, 1))
        n = y.numel() / 3
        zero, one = torch.zeros(3).double(), torch.ones(3).double()
        torch.testing.assert_close(y.mean((0, 2, 3)), zero, atol=1e-12, rtol=0)
        torch.testing.assert_close(y.square().mean((0, 2, 3)), one, atol=1e-11, rtol=0)
        # The loss is blind to a shift and to a scale of x, so dx is orthogonal to both.
        atol = 1e-9 * dx.abs().max().item() * n
        torch.testing.assert_close(dx.sum((0, 2, 3)), zero, atol=atol, rtol=0)
        torch.testing.assert_close((dx * y).sum((0, 2, 3)), zero, atol=atol, rtol=0)

    holds()


def test_a_shift_and_a_scale_of_all_ranks_do_not_matter(pool2):
    @thirty
    @given(images(2), st.floats(0.01, 100), st.floats(-100, 100))
    def holds(xs, scale, shift):
        before, after = (
            pool2.run(run_forward, inputs) for inputs in (xs, [x * scale + shift for x in xs])
        )
        for (y, dx, mean, var), (y2, dx2, mean2, var2) in zip(before, after, strict=True):
            spread = 1e-12 * (1 + (shift / scale) ** 2)
            torch.testing.assert_close(y2, y, rtol=0, atol=1e-11 + 10 * spread)
            torch.testing.assert_close(dx2 * scale, dx, rtol=1e-8, atol=1e-8 + 100 * spread)
            torch.testing.assert_close(mean2, mean * scale + shift, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(var2, var * scale**2, rtol=1e-10 + spread, atol=0)

    holds()


@thirty
@given(st.data())
def test_alone_it_is_batch_norm(data):
    (shape,) = data.draw(parts(1))
    layout = data.draw(layouts([shape]))
    (x,), (dy,) = make_inputs([shape], torch.float64, seed=data.draw(st.integers(0, 99)))
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    options = {
        "affine": data.draw(st.booleans()),
        "track_running_stats": data.draw(st.booleans()),
        "momentum": data.draw(st.sampled_from([None, 0.0, 0.1, 1.0])),
    }
    results = []
    for layer in (CrossGPUBatchNorm(shape[1], **options), kind(shape[1], **options)):
        leaf = x.clone(memory_format=layout).requires_grad_()
        y = layer.double()(leaf)
        y.backward(dy)
        evaluated = layer.eval()(leaf)
        grads = [p.grad for p in layer.parameters()]
        results.append([y, leaf.grad, evaluated, *grads, *layer.state_dict().values()])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
