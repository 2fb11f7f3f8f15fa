"""Counts what the host does for a layer, and fails at one call more. It measures no time."""

import pytest
import torch
import torch.distributed as dist

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import collective, functional
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
    x = torch.randn(2, 3, 256, 256, requires_grad=True)  # too large for torch's own operator
    layer = CrossGPUBatchNorm(3, process_group=SELF)
    calls = []
    monkeypatch.setattr(functional, "watched", lambda x: calls.append(x) or False)
    expected = functional.normalize(x.detach(), torch.rand(4, 3), None, False)
    assert calls
    assert expected.shape == x.shape
    layer(x).sum().backward()
    assert len(calls) == 4  # three of the layer, and the one above


def test_a_change_of_the_statistics_is_seen_by_autograd():
    """Evaluation saves the running statistics for backward."""
    layer = CrossGPUBatchNorm(3, process_group=SELF)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 4), (2, 3, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_few_values_are_normalised_as_many_are(monkeypatch, shape, dtype, affine):
    from megdet_d2.norm import few_values

    x = (torch.randn(shape) * 2 + 5).to(dtype)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    dy = torch.randn(shape).to(dtype)
    results = []
    for most in (few_values._MOST_VALUES, 0):
        monkeypatch.setattr(few_values, "_MOST_VALUES", most)
        layer = CrossGPUBatchNorm(3, affine=affine, process_group=SELF)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        assert y.stride() == x.stride()
        results.append([y, layer.running_mean, layer.running_var, *gradients])
    tolerance = 2**-6 if dtype is torch.bfloat16 else 1e-5
    for few, many in zip(*results, strict=True):
        assert few.dtype == many.dtype
        torch.testing.assert_close(few, many, rtol=tolerance, atol=tolerance)
