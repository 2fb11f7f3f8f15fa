"""Compares CrossGPUBatchNorm in gloo processes with batch norm of the pooled batch in float64."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

import megdet_d2
from megdet_d2.norm import functional
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm, set_accumulation_steps
from megdet_d2.norm.groups import SELF, ranks_per_group
from tests.helpers.collectives import counted_all_reduces
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


def run_bn_size(rank, bn_size, images_per_gpu, cross_machine):
    model = nn.Sequential(CrossGPUBatchNorm(2), nn.Sequential(CrossGPUBatchNorm(2)))
    megdet_d2.set_bn_size(model, bn_size, images_per_gpu, cross_machine)
    groups = {layer._group_name for layer in (model[0], model[1][0])}
    assert len(groups) == 1
    model(torch.full((images_per_gpu, 2, 1, 2), float(rank)))
    # What the layer averaged over: running_mean = momentum * mean of the ranks in the group.
    return model[0].group_size(), round(float(model[0].running_mean[0]) * 10, 4)


def test_bn_size_groups_on_two_machines_of_two(two_machines):
    run = two_machines.run
    assert run(run_bn_size, -1, 4, False) == [(2, 0.5), (2, 0.5), (2, 2.5), (2, 2.5)]
    assert run(run_bn_size, 8, 4, False) == [(2, 0.5), (2, 0.5), (2, 2.5), (2, 2.5)]
    assert run(run_bn_size, 4, 4, False) == [(1, 0.0), (1, 1.0), (1, 2.0), (1, 3.0)]
    assert run(run_bn_size, -1, 4, True) == [(4, 1.5)] * 4
    assert run(run_bn_size, 16, 4, True) == [(4, 1.5)] * 4
    assert run(run_bn_size, 8, 4, True) == [(2, 0.5), (2, 0.5), (2, 2.5), (2, 2.5)]


def run_by_name(rank):
    """Runs the layers that "CGBN" builds, before a BN size is set."""
    from detectron2.layers import get_norm

    from megdet_d2.modeling.large_kernel import LargeKernelRPNHead

    options = {"in_channels": 2, "num_anchors": 1, "size": 3, "mid_channels": 2}

    found = []
    for layer in (
        get_norm("CGBN", 2),
        LargeKernelRPNHead(**options, norm="CGBN").conv.norm[0],
    ):
        layer(torch.full((1, 2, 1, 2), float(rank)))
        found.append((layer.group_size(), round(float(layer.running_mean[0]) * 10, 4)))
    assert found == [(2, 0.5 if rank < 2 else 2.5)] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
        with pytest.raises(RuntimeError, match="create_local_process_group"):
            get_norm("CGBN", 2)
        with pytest.raises(RuntimeError, match="create_local_process_group"):
            LargeKernelRPNHead(**options, norm="CGBN")


def test_by_name_a_layer_is_over_its_machine(two_machines):
    two_machines.run(run_by_name)


def test_impossible_bn_size_names_the_nearest():
    assert ranks_per_group(16, 2, 8) == 8
    assert ranks_per_group(-1, 2, 8) == 8
    with pytest.raises(ValueError, match=r"BN_SIZE is 12.*Nearest valid sizes: 8 and 16"):
        ranks_per_group(12, 2, 8)
    with pytest.raises(ValueError, match=r"BN_SIZE is 2.*Nearest valid sizes: 16 and 32"):
        ranks_per_group(2, 16, 2)
    with pytest.raises(ValueError, match="FrozenBN"):
        ranks_per_group(0, 2, 8)


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


def test_evaluation_of_an_empty_input():
    layer = CrossGPUBatchNorm(4).eval()
    assert layer(torch.zeros(0, 4, 7, 7)).shape == (0, 4, 7, 7)


def test_non_contiguous_input():
    x = torch.randn(4, 6, 9, 9)[::2, :, 1::2, ::3]
    torch.testing.assert_close(CrossGPUBatchNorm(6)(x), nn.BatchNorm2d(6)(x))


def test_gradients_by_finite_differences():
    layer = CrossGPUBatchNorm(3).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x),
        (x, layer.weight, layer.bias),
    )


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


def test_deepcopy_and_pickle_keep_the_group(pool2):
    pool2.run(run_copies)


def test_compiles_whole_for_two_sizes_without_a_third_compilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer = CrossGPUBatchNorm(3)
    eager = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for size in (4, 6, 8, 10):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(layer.running_var, eager.running_var)
    assert counter.frame_count <= 2


def run_compiled(rank):
    torch._dynamo.reset()
    layer = CrossGPUBatchNorm(3, process_group=dist.new_group([0, 1]))
    eager = copy.deepcopy(layer)
    x = torch.randn(2, 3, 4, 4)
    expected = eager(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(layer.running_mean, eager.running_mean)


def test_compiles_with_a_named_group(pool2):
    pool2.run(run_compiled)


def test_a_layer_of_a_group_that_is_no_more_is_plain_batch_norm():
    layer = CrossGPUBatchNorm(3)
    layer._group_name, layer._group_size = "gone", 2  # as unpickled where nothing is distributed
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("count", "var"), [(8, 2.0), (2, 0.0), (0, 0.0), (8, float("nan")), (8, float("inf")), (8, 1e6)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_device_updates_statistics_as_the_host_does(count, var, momentum, dtype):
    # On CPU tensors, so that the GPU's code is checked on machines without a GPU.
    results = []
    for update in (functional._update_on_host, functional._update_on_device):
        buffers = [torch.full((3,), 0.5, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)]
        buffers += [torch.tensor(4), torch.tensor(1)]
        mean = torch.tensor([1.0, -3.0, 0.0]).double()
        variance = torch.tensor([var, 1.0, 1.0]).double()
        update(*buffers, momentum, mean, variance, torch.tensor([float(count)]).double())
        results.append(buffers)
    host, device = results
    for a, b in zip(host, device, strict=True):
        torch.testing.assert_close(a, b)
    kept = count > 1 and var < torch.finfo(dtype).max
    assert (host[2], host[3]) == (4 + kept, 1 + (count > 0 and not kept))
    assert torch.equal(host[1], torch.full((3,), 2.0, dtype=dtype)) == (not kept)


def test_fused_activations_compile():
    layer = CrossGPUBatchNorm(4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = (torch.randn(2, 4, 5, 6, requires_grad=True) for _ in range(2))
    results = []
    for module in (layer, compiled):
        y = module(x, residual, relu=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, residual, layer.weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 4, 5),
        torch.randn(2, 4, 3, 2).to(memory_format=torch.channels_last),
        torch.randn(2, 4, 3, 2, dtype=torch.float64),
        torch.randn(0, 4, 3, 2, dtype=torch.bfloat16),
    ],
)
def test_operators_are_what_their_fakes_say(x):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    c, means, count = (
        torch.rand(4, dtype=dtype),
        torch.rand(2, 4, dtype=dtype),
        torch.ones(1).double(),
    )
    running = torch.zeros(4), torch.ones(4), torch.tensor(0), torch.tensor(0)
    dy = torch.randn(x.shape).to(x)  # contiguous, whatever x is
    valid = torch.rand(len(x), 1, *x.shape[2:]) > 0.3
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (functional.statistics, (x, None, *running, 0.1, "", "one_reduce", "")),
        (functional.statistics, (x, valid, *4 * [None], None, "", "two_pass", "")),
        (functional.normalize, (x, c, c, c, None, False)),
        (functional.normalize, (x, c, c, c, x, True)),
        (functional.gradient_sums, (dy, x, c, c, c, c, False, None, count, "", "")),
        (functional.input_gradient, (dy, x, c, c, c, c, means, False, None, False)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(CrossGPUBatchNorm(3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_selective_checkpointing_updates_statistics_once():
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    def policy(ctx, op, *args, **kwargs):
        saved = op is torch.ops.megdet_d2.statistics.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    plain = nn.Sequential(nn.Conv2d(2, 3, 1), CrossGPUBatchNorm(3), nn.ReLU())
    saving = copy.deepcopy(plain)
    x = torch.randn(2, 2, 4, 4)
    plain(x).square().sum().backward()
    checkpoint(
        saving, x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    ).square().sum().backward()  # fmt: skip
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b)


# --- conversion --------------------------------------------------------------------------------


def test_state_dict_goes_both_ways():
    from detectron2.layers import FrozenBatchNorm2d

    torch.manual_seed(0)
    trained = CrossGPUBatchNorm(4)
    for _ in range(3):
        trained(torch.randn(4, 4, 3, 3) * 2 + 1)
    trained.eval()
    x = torch.randn(2, 4, 3, 3)
    for other in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), FrozenBatchNorm2d(4)):
        state = trained.state_dict()
        if isinstance(other, FrozenBatchNorm2d):
            state.pop("num_batches_tracked")
        other.load_state_dict(state)
        torch.testing.assert_close(other.eval()(x), trained(x))
        back = CrossGPUBatchNorm(4).eval()
        back.load_state_dict(other.state_dict(), strict=not isinstance(other, FrozenBatchNorm2d))
        torch.testing.assert_close(back(x), trained(x))


@pytest.mark.parametrize("include_frozen", [False, True])
def test_convert_and_revert(include_frozen):
    from detectron2.layers import FrozenBatchNorm2d

    shared = nn.BatchNorm2d(3, eps=0.1, momentum=0.3)
    frozen = FrozenBatchNorm2d(3, eps=0.2)
    frozen.running_mean.fill_(0.5)
    for layer in (shared, frozen):
        layer.running_var.fill_(0.01)  # so that a lost ε is seen
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), shared, nn.Sequential(nn.SyncBatchNorm(3, momentum=0.2), frozen), shared
    ).eval()
    parameters = {name: p for name, p in model.named_parameters()}
    calls = []
    handle = shared.register_forward_hook(lambda *_, **__: calls.append(1), with_kwargs=True)
    x = torch.randn(2, 3, 4, 4)
    y = model(x)

    assert megdet_d2.convert_cgbn(model, process_group=SELF, include_frozen=include_frozen) is model
    assert isinstance(model[1], CrossGPUBatchNorm) and model[3] is model[1]
    assert model[2][0].momentum == 0.2 and model[2][0].process_group is SELF
    assert isinstance(model[2][1], CrossGPUBatchNorm) == include_frozen
    assert not model[1].training
    for name, p in parameters.items():
        assert model.get_parameter(name) is p
    torch.testing.assert_close(model(x), y)

    megdet_d2.revert_cgbn(model)
    assert not any(isinstance(m, CrossGPUBatchNorm) for m in model.modules())
    assert type(model[1]) is nn.BatchNorm2d and model[3] is model[1]
    assert (model[1].eps, model[1].momentum, model[2][0].momentum) == (0.1, 0.3, 0.2)
    torch.testing.assert_close(model(x), y)
    handle.remove()
    model(x)
    assert len(calls) == 6  # the shared layer, twice each in three forwards
    torch.testing.assert_close(
        megdet_d2.convert_cgbn(nn.BatchNorm2d(3)).eval()(x), nn.BatchNorm2d(3).eval()(x)
    )


def test_converted_where_the_model_is():
    """Converts on the device of the state, as for a model that Detectron2 has built on a GPU."""
    model = megdet_d2.convert_cgbn(nn.Sequential(nn.BatchNorm2d(3)).to("meta"))
    devices = {name: buffer.device.type for name, buffer in model[0].named_buffers()}
    assert set(devices.values()) == {"meta"} and "num_batches_skipped" in devices


def test_a_norm_that_does_more_is_not_converted():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(WithActivation(3)))
    with pytest.raises(ValueError, match="layer '1.0' is a WithActivation, whose forward may"):
        megdet_d2.convert_cgbn(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_mean_gradient_does_not_blur_the_rest(dtype):
    """Checks that dx, whose sum over a channel is zero, is rounded once; dy is that of a bias."""
    x = torch.randn(8, 4, 12, 12).to(dtype)
    dy = (1 + 0.05 * torch.randn(8, 4, 12, 12)).to(dtype)
    layer = CrossGPUBatchNorm(4, process_group=SELF)
    nn.init.constant_(layer.weight, 0.7)
    reference = nn.BatchNorm2d(4).double()
    reference.load_state_dict(layer.state_dict())
    dx, expected = (
        torch.autograd.grad(norm(inputs), inputs, dy.to(inputs.dtype))[0].double()
        for norm, inputs in (
            (layer, x.clone().requires_grad_()),
            (reference, x.double().requires_grad_()),
        )
    )
    assert (dx - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_revert_gives_back_the_dimensions():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm3d(3))
    megdet_d2.convert_cgbn(model)
    model[0](torch.randn(4, 3)), model[1](torch.randn(2, 3, 2, 2, 2))
    megdet_d2.revert_cgbn(model)
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.BatchNorm3d]
