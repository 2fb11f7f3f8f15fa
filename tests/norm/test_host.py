"""Counts what the host does for a layer, and fails at one call more. It measures no time."""

import pytest
import torch
import torch.distributed as dist

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import batch_norm, collective, functional
from megdet_d2.norm.groups import SELF


def run_look_ups(rank, explicit):
    group = dist.new_group([0, 1]) if explicit else None
    layer = CrossGPUBatchNorm(3, process_group=group)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer(x)  # makes the group of all processes
    names, resolve = [], collective._resolve_process_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            collective,
            "_resolve_process_group",
            lambda name: names.append(name) or resolve(name),
        )
        y = layer(x)
        forward = len(names)
        y.backward(torch.ones_like(y))
    return forward, len(names) - forward


# A group that the user has given is also compared with the ranks that it had.
@pytest.mark.parametrize(("explicit", "expected"), [(False, (1, 1)), (True, (2, 1))])
def test_a_pass_looks_up_its_group_once(pool2, explicit, expected):
    assert pool2.run(run_look_ups, explicit) == [expected, expected]


def operators_of(run):
    """Returns the operators that torch dispatches in ``run``, as its profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return [event.name for event in profile.events()]


def test_a_profile_shows_the_layers_operators():
    layer = CrossGPUBatchNorm(3, process_group=SELF)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    names = operators_of(lambda: layer(x).sum().backward())
    for name in ("statistics", "normalize"):
        assert f"megdet_d2::{name}" in names


def test_nothing_is_dispatched_that_nobody_watches(monkeypatch):
    x = torch.randn(2, 3, 256, 256, requires_grad=True)  # too many for one pass backward
    layer = CrossGPUBatchNorm(3, process_group=SELF)
    calls = []
    monkeypatch.setattr(functional, "watched", lambda x: calls.append(x) or False)
    expected = functional.normalize(x.detach(), torch.rand(4, 3), None, False)
    assert calls
    assert expected.shape == x.shape
    layer(x).sum().backward()
    assert len(calls) == 4  # three of the layer, and the one above


SMALL = [(16, 64, 8, 8), (2, 256, 2, 2), (1, 3, 7, 5), (3, 5, 9), (2, 4, 3, 3, 3), (8, 32, 16, 16)]


def run_small(shape, scale, offset, momentum, relu, affine):
    """Returns all that a layer computes in three steps."""
    torch.manual_seed(0)
    layer = CrossGPUBatchNorm(shape[1], process_group=SELF, momentum=momentum, affine=affine)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    results = []
    for _ in range(3):
        x = (torch.randn(shape) * scale + offset).requires_grad_()
        residual = torch.randn(shape).requires_grad_() if relu else None
        y = layer(x, residual, relu)
        inputs = [x, *layer.parameters(), *([residual] if relu else [])]
        results.append(y.detach())
        # As a convolution in another layout, a mean, and a sum give it.
        dys = [torch.randn(shape), torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])]
        dys += [torch.randn(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)]
        dys += [torch.ones(()).expand(shape)]
        for dy in dys:
            results += torch.autograd.grad(y, inputs, dy, retain_graph=True)
    return results + [buffer.clone() for buffer in layer.buffers()]


# The last scale makes variances that float32 cannot hold, which leave the running statistics.
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1, 1e4), (1e20, 0)])
@pytest.mark.parametrize("options", [(0.1, False, True), (None, True, True), (0.1, True, False)])
@pytest.mark.parametrize("shape", SMALL)
def test_a_small_layer_is_torchs_batch_norm_bit_by_bit(monkeypatch, shape, scale, offset, options):
    """So a step that something watches, as checkpointing does, equals one that nothing watches."""
    calls = []
    monkeypatch.setattr(
        batch_norm, "by_torch", lambda *a: calls.append(a) or functional.by_torch(*a)
    )
    fast = run_small(shape, scale, offset, *options)
    assert len(calls) == 3
    monkeypatch.setattr(functional, "watched", lambda x: True)
    watched = run_small(shape, scale, offset, *options)
    assert len(calls) == 3
    for a, b in zip(fast, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 2, 200, 200),  # ATen adds up so many value by value
        torch.randn(2, 3, 60, 60),  # more of a channel than float32 adds up exactly
        torch.randn(16, 4, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(16, 4, 8, 8, dtype=torch.float64),
        torch.randn(16, 4, 8, 8, dtype=torch.bfloat16),
        torch.randn(16, 4),
        torch.randn(0, 4, 8, 8),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
)
def test_torchs_batch_norm_is_not_taken_where_it_is_less_exact(x):
    assert not functional.runs_by_torch(x, None, None, 1e-5)


def test_a_change_of_the_statistics_is_seen_by_autograd():
    """Evaluation saves the running statistics for backward."""
    layer = CrossGPUBatchNorm(3, process_group=SELF)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
