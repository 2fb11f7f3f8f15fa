"""Checks ranks without values, and ranks outside of the group: none of them hangs."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm.functional import ALGORITHMS
from megdet_d2.norm.groups import SELF
from tests.helpers.collectives import counted_all_reduces
from tests.helpers.pooled import (
    EPS,
    MOMENTUM,
    TOLERANCES,
    assert_equals_pooled,
    make_inputs,
    pooled_reference,
    run_layer,
)

E = (0, 5, 4, 3)
PARTS = {
    "first empty": [E, (2, 5, 4, 3), (3, 5, 4, 3), (1, 5, 4, 3)],
    "all but one empty": [E, E, (4, 5, 4, 3), E],
    "empty in height": [(2, 5, 0, 3), (2, 5, 4, 3), (2, 5, 4, 0), (1, 5, 4, 3)],
    "two values in all": [(1, 5, 1, 1), E, (0, 5, 1, 1), (1, 5, 1, 1)],
    "one value a rank, 2-D": [(1, 5)] * 4,
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", PARTS)
def test_some_ranks_empty(pool4, parts, dtype, algorithm):
    xs, dys = make_inputs(PARTS[parts], dtype)
    results = pool4.run(run_layer, xs, dys, algorithm, None, torch.contiguous_format)
    rtol, atol = TOLERANCES[dtype]
    # Between so few values y and dx are steep: dx is as large as γ/σ.
    assert_equals_pooled(results, pooled_reference(xs, dys), rtol, 2 * atol)


def run_all_empty(rank, dtype, algorithm):
    layer = CrossGPUBatchNorm(5, algorithm=algorithm)
    layer(torch.randn(2, 5, 3, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 5, 4, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and y.dtype == x.grad.dtype == dtype
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros(5))
    assert layer.num_batches_skipped == 0  # nothing was lost


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_ranks_empty_in_half_precision(pool4, dtype, algorithm):
    pool4.run(run_all_empty, dtype, algorithm)


def run_outsider(rank, members, xs, dys):
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(ValueError, match="not in the given process group"):
            CrossGPUBatchNorm(5, process_group=group)
        assert_plain(CrossGPUBatchNorm(5, process_group=SELF))
        return None
    x = xs[members.index(rank)].requires_grad_()
    layer = CrossGPUBatchNorm(5, EPS, MOMENTUM, process_group=group).double()
    assert layer.group_size() == len(members) and layer.process_group is group
    layer(x).backward(dys[members.index(rank)])
    return x.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("members", [[0, 2, 3], [1, 3]])
def test_a_rank_outside_the_group(pool4, members):
    xs, dys = make_inputs([(i + 1, 5, 4, 3) for i in range(len(members))])
    x = torch.cat(xs).requires_grad_()
    plain = nn.BatchNorm2d(5, EPS, MOMENTUM).double()
    plain(x).backward(torch.cat(dys))
    results = pool4.run(run_outsider, members, xs, dys)
    inside = [result for result in results if result is not None]
    assert len(inside) == len(members)
    torch.testing.assert_close(torch.cat([dx for dx, _, _ in inside]), x.grad)
    for _, mean, var in inside:
        torch.testing.assert_close(mean, plain.running_mean)
        torch.testing.assert_close(var, plain.running_var)


def assert_plain(layer):
    """Compares forward, backward and statistics with nn.BatchNorm2d on this process's values."""
    plain, x = nn.BatchNorm2d(5), torch.randn(2, 5, 3, 3)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((layer, plain), leaves, strict=True):
        module(leaf).square().sum().backward()
        module(leaf * 2)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def run_alone(rank):
    own = [dist.new_group([i]) for i in range(2)][rank]
    with counted_all_reduces() as calls:
        for group in (SELF, own):
            assert_plain(CrossGPUBatchNorm(5, process_group=group))
    assert calls == []


def test_a_group_of_one_rank_does_not_communicate(pool2):
    pool2.run(run_alone)


def test_a_world_of_one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_plain(CrossGPUBatchNorm(5))
        assert_plain(CrossGPUBatchNorm(5, process_group=dist.group.WORLD))
    finally:
        dist.destroy_process_group()
    assert_plain(CrossGPUBatchNorm(5))


def run_one_layer_more(rank):
    if rank == 0:
        CrossGPUBatchNorm(5)  # of a model that only the main process builds, to count its flops
    CrossGPUBatchNorm(5)(torch.randn(2, 5, 3, 3))


def test_a_rank_may_have_built_another_layer_before(pool2):
    pool2.run(run_one_layer_more)


def run_evaluation_on_one_rank(rank, track_running_stats):
    layer = CrossGPUBatchNorm(5, track_running_stats=track_running_stats)
    x = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(rank))
    layer(x)
    if rank == 0:
        layer.eval()
        plain = nn.BatchNorm2d(5, track_running_stats=track_running_stats).eval()
        plain.load_state_dict(layer.state_dict())
        for _ in range(3):
            torch.testing.assert_close(layer(x), plain(x))
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        layer.train()
    y = layer(x)  # together again: an evaluation that communicated would be out of step
    return y.detach(), x


@pytest.mark.parametrize("track_running_stats", [True, False])
def test_evaluation_on_a_subset_of_ranks(pool2, track_running_stats):
    results = pool2.run(run_evaluation_on_one_rank, track_running_stats, timeout=20)
    ys, xs = (torch.cat(parts) for parts in zip(*results, strict=True))
    torch.testing.assert_close(ys, nn.BatchNorm2d(5)(xs))


def run_steps(rank, steps):
    layer = CrossGPUBatchNorm(5, EPS, MOMENTUM).double()
    grads = []
    for parts, dys in steps:
        x = parts[rank].requires_grad_()
        layer(x).backward(dys[rank])
        grads.append(x.grad)
    return grads, layer.running_mean, layer.running_var, layer.num_batches_tracked


def test_sizes_that_differ_by_step(pool4):
    shapes = [
        [(2, 5, 4, 3), (1, 5, 2, 2), (0, 5, 4, 3), (3, 5, 1, 7)],
        [(0, 5, 4, 3), (3, 5, 2, 5), (1, 5, 1, 1), (1, 5, 6, 6)],
        [(0, 5, 1, 1)] * 4,
        [(1, 5, 8, 8)] * 4,
    ]
    steps = [make_inputs(parts, seed=seed) for seed, parts in enumerate(shapes)]
    results = pool4.run(run_steps, steps)

    plain, tracked = nn.BatchNorm1d(5, EPS, MOMENTUM).double(), 0
    for step, (xs, dys) in enumerate(steps):
        if not sum(x.numel() for x in xs):
            continue  # and the statistics of all stay as they are
        flat = [torch.cat([t.movedim(1, -1).reshape(-1, 5) for t in ts]) for ts in (xs, dys)]
        flat[0].requires_grad_()
        plain(flat[0]).backward(flat[1])
        tracked += 1
        dx = torch.cat([grads[step].movedim(1, -1).reshape(-1, 5) for grads, *_ in results])
        torch.testing.assert_close(dx, flat[0].grad)
    for _, mean, var, batches in results:
        torch.testing.assert_close(mean, plain.running_mean)
        torch.testing.assert_close(var, plain.running_var)
        assert batches == tracked
