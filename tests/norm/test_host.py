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
    x = torch.randn(2, 3, 256, 256, requires_grad=True)  # too many for one pass backward
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
