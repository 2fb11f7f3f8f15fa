"""Compares CrossGPUBatchNorm in gloo processes with batch norm of the pooled batch in float64."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import megdet_d2
from megdet_d2.norm import functional
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm, set_accumulation_steps
from tests.helpers.collectives import counted_all_reduces
from tests.helpers.gloo_pool import GlooPool
from tests.helpers.pooled import (
    PARTS,
    TOLERANCES,
    assert_equals_pooled,
    make_inputs,
    pooled_reference,
    run_layer,
)


@pytest.mark.parametrize("algorithm", functional.ALGORITHMS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_pooled_batch_norm(request, world_size, parts, algorithm):
    pool = request.getfixturevalue(f"pool{world_size}")
    for dtype in (torch.float64, torch.float32):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            xs, dys = make_inputs(PARTS[parts][:world_size], dtype)
            results = pool.run(run_layer, xs, dys, algorithm, None, memory_format)
            assert_equals_pooled(results, pooled_reference(xs, dys), *TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", ["unequal N", "one empty"])
def test_half_precision_input_has_float32_statistics(pool2, parts, dtype):
    xs, dys = make_inputs(PARTS[parts][:2], dtype)
    results = pool2.run(run_layer, xs, dys, "one_reduce", None, torch.channels_last)
    assert_equals_pooled(results, pooled_reference(xs, dys), *TOLERANCES[dtype])


@pytest.mark.parametrize("parts", ["equal", "unequal N", "one empty"])
def test_groups_of_two_in_four_are_independent(pool4, parts):
    xs, dys = make_inputs(PARTS[parts])
    results = pool4.run(run_layer, xs, dys, "one_reduce", 2, torch.contiguous_format)
    for first in (0, 2):
        pair = slice(first, first + 2)
        reference = pooled_reference(xs[pair], dys[pair])
        assert_equals_pooled(results[pair], reference, *TOLERANCES[torch.float64])
    assert not torch.equal(results[0]["running_mean"], results[2]["running_mean"])


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 7), (2, 5, 2, 3), (2, 5, 2, 3, 2)])
def test_dimensions(pool2, shape):
    xs, dys = make_inputs([shape, (1, *shape[1:])])
    results = pool2.run(run_layer, xs, dys, "one_reduce", None, torch.contiguous_format)
    assert_equals_pooled(results, pooled_reference(xs, dys), *TOLERANCES[torch.float64])


def run_variance(rank, xs, algorithm, layout):
    layer = CrossGPUBatchNorm(3, momentum=1.0, algorithm=algorithm)
    layer(xs[rank].to(memory_format=layout))
    return layer.running_var


# Targets of the layer, over 2 processes: (offset in deviations, error of the variance).
@pytest.mark.parametrize("algorithm", functional.ALGORITHMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset, error", [(0, 1e-6), (1e3, 1e-6), (1e4, 1e-5)])
def test_variance_far_from_zero(pool2, offset, error, layout, algorithm):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 64, 48)
    xs = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).float()
        for _ in range(2)
    ]
    expected = torch.cat(xs).double().var((0, 2, 3))
    for running_var in pool2.run(run_variance, xs, algorithm, layout):
        torch.testing.assert_close(running_var.double(), expected, rtol=error, atol=0)


def run_empty_everywhere(rank):
    layer = CrossGPUBatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.eq(0).all() and layer.bias.grad.eq(0).all()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_empty_on_every_rank_changes_nothing(pool2):
    pool2.run(run_empty_everywhere)


def run_one_value(rank):
    layer = CrossGPUBatchNorm(3)
    x = torch.ones(1 - rank, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)


def test_one_value_in_the_whole_group_is_an_error_on_every_rank(pool2):
    pool2.run(run_one_value)


def run_one_inf(rank):
    layer = CrossGPUBatchNorm(3)
    layer(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 3, 4, 4)
    if rank == 1:
        x[0, 1, 2, 3] = float("inf")
    layer(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert layer.num_batches_skipped == 1


def test_inf_on_one_rank_leaves_the_running_statistics_of_all(pool2):
    pool2.run(run_one_inf)


def run_counting(rank, algorithm):
    with counted_all_reduces() as calls:
        layer = CrossGPUBatchNorm(7, algorithm=algorithm)
        y = layer(torch.randn(2, 7, 3, 3))
        forward = len(calls)
        y.sum().backward()  # x needs no gradient, but the collective runs
        backward = len(calls) - forward
        layer.eval()(torch.randn(2, 7, 3, 3))
        assert len(calls) == forward + backward, "evaluation must not communicate"
    return forward, backward


def test_collectives(pool2):
    assert pool2.run(run_counting, "one_reduce") == [(1, 1)] * 2
    assert pool2.run(run_counting, "two_pass") == [(2, 1)] * 2


def test_one_process_is_plain_batch_norm():
    torch.manual_seed(0)
    ours, plain = CrossGPUBatchNorm(6), nn.BatchNorm2d(6)
    for training in (True, True, False):
        ours.train(training), plain.train(training)
        x = torch.randn(3, 6, 5, 4)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        dy = torch.randn_like(x)
        for layer, leaf in zip((ours, plain), inputs, strict=True):
            layer(leaf).backward(dy)
        torch.testing.assert_close(ours(x), plain(x))
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": 0.0},
        {"momentum": 1.0},
    ],
)
def test_options_mean_what_they_mean_for_batch_norm(options):
    ours, plain = CrossGPUBatchNorm(4, **options), nn.BatchNorm2d(4, **options)
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3)
        torch.testing.assert_close(ours(x), plain(x))
    ours.eval(), plain.eval()
    torch.testing.assert_close(ours(x), plain(x))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def switched_off(layer):
    """Turns tracking off for a forward, as virtual adversarial training does."""
    layer(inputs())
    layer.track_running_stats = False
    layer(inputs(100))
    layer.track_running_stats = True
    layer(inputs())


def adapted(layer):
    """Normalises by the batch in both modes, as test-time adaptation (TENT) does."""
    layer(inputs())
    layer.track_running_stats = False
    layer.running_mean = layer.running_var = None
    layer(inputs(100))


def uncounted(layer):
    layer.num_batches_tracked = None
    layer(inputs(100))


def without_bias(layer):
    layer.bias = None
    layer(inputs(100))


def inputs(offset=0):
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(offset)) + offset


LIVE_CHANGES = [switched_off, adapted, uncounted, without_bias]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("change", LIVE_CHANGES)
def test_changes_of_a_live_layer_mean_what_they_mean_for_batch_norm(change, momentum):
    ours, plain = CrossGPUBatchNorm(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    assert_same_changes(change, ours, plain)


def assert_same_changes(change, ours, plain):
    for layer in (ours, plain):
        change(layer)
    torch.testing.assert_close(ours(inputs()), plain(inputs()))
    torch.testing.assert_close(ours.eval()(inputs()), plain.eval()(inputs()))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    assert ours.num_batches_skipped == 0


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_one_running_statistic_alone_is_refused_as_by_torch(statistic):
    layer = CrossGPUBatchNorm(4)
    setattr(layer, statistic, None)
    for training in (True, False):
        with pytest.raises((ValueError, RuntimeError), match="running_mean|running_var"):
            layer.train(training)(inputs())


def run_live_changes(rank):
    for change in LIVE_CHANGES:
        # Both ranks have the same values, so that a plain batch norm of one rank has them too.
        # Momentum 0 keeps the variance, whose factor n / (n - 1) is another one.
        ours, plain = CrossGPUBatchNorm(4, momentum=0.0), nn.BatchNorm2d(4, momentum=0.0)
        assert_same_changes(change, ours, plain)


def test_changes_of_a_live_layer_over_two_ranks(pool2):
    pool2.run(run_live_changes)


def test_the_device_code_knows_live_changes(monkeypatch):
    """Runs the update for GPUs on a CPU."""
    monkeypatch.setattr(functional, "_update_on_host", functional._update_on_device)
    for change in LIVE_CHANGES:
        for momentum in (0.1, None):
            ours = CrossGPUBatchNorm(4, momentum=momentum)
            assert_same_changes(change, ours, nn.BatchNorm2d(4, momentum=momentum))


def to_empty(layer):
    return layer.to("meta").to_empty(device="cpu")


def assigned(layer):
    with torch.device("meta"):
        empty = CrossGPUBatchNorm(4)
    empty.load_state_dict(layer.state_dict(), assign=True)
    return empty


@pytest.mark.parametrize("move", [to_empty, assigned])
def test_skipped_mini_batches_are_counted_from_0_after_meta(move):
    layer = CrossGPUBatchNorm(4)
    state = copy.deepcopy(layer.state_dict())
    layer = move(layer)
    layer.load_state_dict(state)
    assert layer.num_batches_skipped == 0
    layer(inputs() * float("nan"))
    assert layer.num_batches_skipped == 1
    assert layer.to(torch.float64).num_batches_skipped == 1
    assert nn.Sequential(layer).to_empty(device="cpu")[0].num_batches_skipped == 1
    layer.reset_running_stats()
    assert layer.num_batches_skipped == 0


def test_eps_that_makes_nan_is_refused():
    x = inputs()
    with pytest.raises(ValueError, match="CGBN layer .*: eps is -1.0; give it above 0"):
        CrossGPUBatchNorm(4, eps=-1.0)(x)
    layer = CrossGPUBatchNorm(4, eps=0.0)
    assert layer(x).isfinite().all()
    x[:, 2] = 3.0
    with pytest.raises(ValueError, match="eps is 0, and all values of a channel are equal"):
        layer(x)


def test_evaluation_of_an_empty_input():
    layer = CrossGPUBatchNorm(4).eval()
    assert layer(torch.zeros(0, 4, 7, 7)).shape == (0, 4, 7, 7)


def test_non_contiguous_input():
    x = torch.randn(4, 6, 9, 9)[::2, :, 1::2, ::3]
    torch.testing.assert_close(CrossGPUBatchNorm(6)(x), nn.BatchNorm2d(6)(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="algorithm is 'fast'; use one of one_reduce, two_pass"):
        CrossGPUBatchNorm(3, algorithm="fast")
    with pytest.raises(ValueError, match="expected 3 channels, got 4"):
        CrossGPUBatchNorm(3)(torch.zeros(2, 4, 1, 1))
    with pytest.raises(ValueError, match="2-D to 5-D"):
        CrossGPUBatchNorm(3)(torch.zeros(3))
    with pytest.raises(ValueError, match="not in the given process group"):
        CrossGPUBatchNorm(3, process_group=dist.GroupMember.NON_GROUP_MEMBER)


def run_copies(rank):
    layer = CrossGPUBatchNorm(3, process_group=dist.new_group([0, 1]))
    x = torch.randn(2, 3, 2, 2)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.process_group is layer.process_group
        torch.testing.assert_close(other(x), y)


def run_meshes(rank):
    x = inputs(rank)
    flat = init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "dp"))
    y = CrossGPUBatchNorm(4)(x)
    for mesh in (flat, grid["dp"]):
        layer = CrossGPUBatchNorm(4, process_group=mesh)
        assert layer.group_size() == 2
        torch.testing.assert_close(layer(x), y)
    alone = CrossGPUBatchNorm(4, process_group=grid["replicate"])
    torch.testing.assert_close(alone(x), nn.BatchNorm2d(4)(x))
    with pytest.raises(ValueError, match="DeviceMesh of 2 dimensions .*'replicate', 'dp'"):
        CrossGPUBatchNorm(4, process_group=grid)
    other = DeviceMesh("cpu", [1])  # every process has to create it
    if rank == 0:
        with pytest.raises(ValueError, match="not in the given DeviceMesh"):
            CrossGPUBatchNorm(4, process_group=other)


def test_device_meshes(pool2):
    pool2.run(run_meshes)


def run_dead_group(rank):
    group = dist.new_group([0, 1])
    layer = CrossGPUBatchNorm(4, process_group=group)
    megdet_d2.name_layers(nn.Sequential(layer))
    dist.destroy_process_group(group)
    for use in (lambda: layer(inputs()), lambda: layer.process_group):
        with pytest.raises(RuntimeError, match="CGBN layer 0: .*Assign layer.process_group, or"):
            use()
    layer.eval()(inputs())
    copy.deepcopy(layer)
    layer.train().process_group = dist.new_group([0, 1])
    layer(inputs())


def test_a_destroyed_group_is_named_with_the_way_out(pool2):
    pool2.run(run_dead_group)


def run_second_start(rank, file):
    layer = CrossGPUBatchNorm(4, process_group=dist.new_group([0, 1]))
    name, saved = layer.process_group.group_name, pickle.dumps(layer)
    everywhere = CrossGPUBatchNorm(4)
    everywhere(inputs())
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    # torch numbers the groups from 1 again.
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [0], [1])]
    assert rank == 1 or name == groups[1].group_name, "the name has gone to another group"
    for old in (layer, pickle.loads(saved)):
        with pytest.raises(RuntimeError, match="CGBN layer .* does not exist"):
            old(inputs())
        old.process_group = groups[0]
        old(inputs())
    everywhere(inputs())


def test_another_group_of_the_same_name_is_not_taken(tmp_path):
    pool = GlooPool(2)
    try:
        pool.run(run_second_start, tmp_path / "store")
    finally:
        pool.close()


def test_deepcopy_and_pickle_keep_the_group(pool2):
    pool2.run(run_copies)


def test_a_layer_of_a_group_that_is_no_more_is_plain_batch_norm():
    layer = CrossGPUBatchNorm(3)
    layer._group_name, layer._group_size = "gone", 2  # as unpickled where nothing is distributed
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_accumulated_forwards_move_the_statistics_as_one(steps):
    layer = CrossGPUBatchNorm(3, momentum=0.1)
    layer.running_mean.fill_(5.0)
    set_accumulation_steps(layer, steps)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(steps):
        layer(x)
    expected = 0.9 * 5.0 + 0.1 * x.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, expected)
    assert ("accumulation_steps=8" in repr(layer)) == (steps == 8)


def test_no_accumulation_of_nothing():
    with pytest.raises(ValueError, match="steps is 0"):
        set_accumulation_steps(CrossGPUBatchNorm(3), 0)
