"""Checks the layer under checkpointing, DDP, FSDP, autocast and copies.

Over two ranks the reference is the same model with nn.BatchNorm2d on both ranks' images at once.
"""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import megdet_d2
from megdet_d2 import CrossGPUBatchNorm
from megdet_d2._older_torch import CheckpointPolicy, create_selective_checkpoint_contexts
from megdet_d2.norm.functional import ALGORITHMS
from tests.helpers.collectives import counted_all_reduces

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def make_model():
    """Builds convolutions and batch norms in float64, with equal weights on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        ).double()  # fmt: skip


def images(seed=0):
    """Returns two images per rank, of a different scale; index by rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)


def loss_of(y):
    return y.square().mean()


def state_of(model):
    state = {name: p.grad for name, p in model.named_parameters()}
    return {**state, **dict(model.named_buffers())}


def assert_same_state(state, reference, prefix="", **tolerance):
    for name, value in reference.items():
        torch.testing.assert_close(
            state[prefix + name], value, **(tolerance or CLOSE),
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


# --- activation checkpointing --------------------------------------------------------------------


def save_statistics(ctx, op, *args, **kwargs):
    saved = op is torch.ops.megdet_d2.statistics.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective(module, x):
    return checkpoint(
        module, x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(save_statistics),
    )  # fmt: skip


def in_one_segment(model, x):
    return selective(model, x)


def in_two_segments(model, x):
    return selective(model[3:], selective(model[:3], x))


def nested(model, x):
    def outer(x):
        return model[3:](selective(model[:3], x))

    return selective(outer, x)


def one_module_twice(model, x):
    """Runs one norm in two segments, as RetinaNet's heads do over the levels."""
    norm = model[1]
    x = selective(lambda x: norm(model[0](x)), x)
    return selective(lambda x: model[3:](norm(x).relu()), x)


def one_module_twice_plain(model, x):
    return model[3:](model[1](model[1](model[0](x))).relu())


SEGMENTS = {
    "one segment": (in_one_segment, lambda model, x: model(x)),
    "two segments": (in_two_segments, lambda model, x: model(x)),
    "nested": (nested, lambda model, x: model(x)),
    "one module in two segments": (one_module_twice, one_module_twice_plain),
}


def run_selective(rank, name):
    x = images()[rank]
    results = []
    for forward in SEGMENTS[name]:
        model = megdet_d2.convert_cgbn(make_model())
        with counted_all_reduces() as calls:
            loss_of(forward(model, x)).backward()
        results.append((state_of(model), len(calls)))
    (checkpointed, calls), (plain, plain_calls) = results
    assert calls == plain_calls, "a recomputation must not communicate"
    for key, value in plain.items():
        assert torch.equal(checkpointed[key], value), key


@pytest.mark.parametrize("name", SEGMENTS)
def test_selective_checkpointing_communicates_and_updates_once(pool2, name):
    pool2.run(run_selective, name)


def run_checkpointed(rank):
    """Recomputes in the same order on every rank, so the repeated collectives match."""
    model, plain = (megdet_d2.convert_cgbn(make_model()) for _ in range(2))
    x = images()[rank]
    with counted_all_reduces() as calls:
        loss_of(checkpoint(model, x, use_reentrant=False)).backward()
    loss_of(plain(x)).backward()
    with torch.no_grad():
        plain(x)  # what the recomputation adds: one more update of the running statistics
    assert_same_state(state_of(model), state_of(plain))
    return len(calls)


def test_plain_checkpointing_has_the_gradients_but_updates_twice(pool2):
    # As with every batch norm under torch's checkpoint (pytorch 96136); "selective" avoids it.
    assert pool2.run(run_checkpointed) == [2 * 2 + 2] * 2


# --- DistributedDataParallel ---------------------------------------------------------------------


def run_ddp(rank, broadcast_buffers, steps):
    model = DistributedDataParallel(
        megdet_d2.convert_cgbn(make_model()), broadcast_buffers=broadcast_buffers
    )
    for step in range(steps):
        model.zero_grad()
        loss_of(model(images(step)[rank])).backward()
    return state_of(model)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_ddp_has_the_gradients_of_the_pooled_batch(pool2, broadcast_buffers):
    model, steps = make_model(), 2
    for step in range(steps):
        model.zero_grad()
        loss_of(model(images(step).flatten(0, 1))).backward()
    for state in pool2.run(run_ddp, broadcast_buffers, steps):
        assert_same_state(state, state_of(model), "module.")


def run_no_sync(rank):
    model = DistributedDataParallel(megdet_d2.convert_cgbn(make_model()))
    with model.no_sync():
        loss_of(model(images(0)[rank])).backward()
    loss_of(model(images(1)[rank])).backward()
    return state_of(model)


def test_gradient_accumulation_under_no_sync(pool2):
    model = make_model()
    for step in range(2):
        loss_of(model(images(step).flatten(0, 1))).backward()
    for state in pool2.run(run_no_sync):
        assert_same_state(state, state_of(model), "module.")


def run_two_forwards(rank):
    # DDP writes to the buffers before each forward: the first backward must not depend on them.
    model = DistributedDataParallel(megdet_d2.convert_cgbn(make_model()))
    first, second = model(images(0)[rank]), model(images(1)[rank])
    (loss_of(first) + 2 * loss_of(second)).backward()
    return state_of(model)


def test_two_forwards_and_one_backward(pool2):
    model = make_model()
    first, second = (model(images(step).flatten(0, 1)) for step in range(2))
    (loss_of(first) + 2 * loss_of(second)).backward()
    for state in pool2.run(run_two_forwards):
        assert_same_state(state, state_of(model), "module.")


def run_fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = megdet_d2.convert_cgbn(make_model())
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[1], model[3]):  # the last norm is the root's
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(model(images()[rank])).backward()
    return {
        **{name: p.grad.full_tensor() for name, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs a GPU"
)
def test_fully_sharded(pool2):
    model = make_model()
    loss_of(model(images().flatten(0, 1))).backward()
    for state in pool2.run(run_fsdp):
        assert_same_state(state, state_of(model))


# --- precision -----------------------------------------------------------------------------------


def run_autocast(rank, x):
    conv, norm = nn.Conv2d(3, 4, 1), CrossGPUBatchNorm(4, momentum=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        h = conv(x[rank])
        y = norm(h)
    assert h.dtype == y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert conv.weight.grad.dtype == norm.weight.grad.dtype == torch.float32
    return h.detach(), y.detach(), norm.running_mean, norm.running_var


def test_autocast_takes_bfloat16_and_keeps_float32_statistics(pool2):
    x = torch.randn(2, 3, 3, 9, 9, generator=torch.Generator().manual_seed(0)) + 3
    results = pool2.run(run_autocast, x)
    h = torch.cat([result[0] for result in results]).double()
    plain = nn.BatchNorm2d(4, momentum=1.0).double()
    expected = plain(h).split([3, 3])
    for (_, y, mean, var), whole in zip(results, expected, strict=True):
        torch.testing.assert_close(y.double(), whole, rtol=2**-7, atol=1e-2)
        torch.testing.assert_close(mean.double(), plain.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), plain.running_var, rtol=1e-5, atol=0)


def run_grad_scaler(rank):
    torch.manual_seed(0)
    layer = CrossGPUBatchNorm(3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    history = []
    for step in range(3):
        before = [p.detach().clone() for p in layer.parameters()]
        running = layer.running_mean.clone()
        x = torch.randn(2, 3, 4, 4)
        if step == 1 and rank == 1:
            x[0, 0, 0, 0] = float("inf")
        optimizer.zero_grad()
        scaler.scale(layer(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped = any(
            not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True)
        )
        history.append((stepped, not torch.equal(layer.running_mean, running), scaler.get_scale()))
    assert all(p.isfinite().all() for p in layer.state_dict().values())
    return history


def test_grad_scaler_skips_an_infinite_step_on_every_rank(pool2):
    # The statistics of all are not finite, so all skip, and the next step trains again.
    expected = [(True, True, 8.0), (False, False, 4.0), (True, True, 4.0)]
    assert pool2.run(run_grad_scaler) == [expected] * 2


def run_module_dtype(rank, x, dtype):
    layer = CrossGPUBatchNorm(4, momentum=1.0).to(dtype)
    leaf = x[rank].to(dtype).requires_grad_()
    y = layer(leaf)
    y.float().square().sum().backward()
    tensors = (y, leaf.grad, layer.weight.grad, layer.running_mean, layer.running_var)
    assert {t.dtype for t in tensors} == {dtype}
    evaluated = layer.eval()(leaf)
    assert evaluated.dtype == dtype
    return y.detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("dtype, digits", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_modules(pool2, dtype, digits):
    x = torch.randn(2, 3, 4, 9, 9, generator=torch.Generator().manual_seed(0)) + 3
    plain = nn.BatchNorm2d(4, momentum=1.0).double()
    expected = plain(x.to(dtype).double().flatten(0, 1)).split([3, 3])
    for (y, mean, var), whole in zip(pool2.run(run_module_dtype, x, dtype), expected, strict=True):
        torch.testing.assert_close(y.double(), whole, rtol=2 * digits, atol=2 * digits)
        # One rounding of float32 statistics, though they are kept in half precision.
        torch.testing.assert_close(mean.double(), plain.running_mean, rtol=digits, atol=0)
        torch.testing.assert_close(var.double(), plain.running_var, rtol=digits, atol=0)


# --- autograd ------------------------------------------------------------------------------------


def penalised(model, x, score, create_graph=True):
    """Returns the loss of a gradient penalty, after the score's gradient for x."""
    (dx,) = torch.autograd.grad(score(model(x)), x, create_graph=create_graph)
    return dx.pow(3).sum()


SCORES = {
    "linear": lambda y: (y * torch.linspace(-1, 1, 80).view(5, 4, 4)).sum(),
    "cubic": lambda y: y.pow(3).sum(),
}


def run_penalty(rank, parts, name, algorithm):
    model = megdet_d2.convert_cgbn(make_model())
    for layer in megdet_d2.norm.batch_norm.cgbn_layers(model):
        layer.algorithm = algorithm
    x = images().flatten(0, 1).split(parts)[rank].clone().requires_grad_()
    penalised(model, x, SCORES[name]).backward()
    return {**{name: p.grad for name, p in model.named_parameters()}, "x": x.grad}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("parts", [(2, 2), (1, 3), (4, 0)])
def test_double_backward_is_that_of_the_pooled_batch(pool2, parts, name, algorithm):
    model = make_model()
    x = images().flatten(0, 1).requires_grad_()
    penalised(model, x, SCORES[name]).backward()
    results = pool2.run(run_penalty, parts, name, algorithm)
    dx = torch.cat([result.pop("x") for result in results])
    torch.testing.assert_close(dx, x.grad, rtol=1e-7, atol=1e-9 * x.grad.abs().max())
    for key, p in model.named_parameters():
        total = sum(result[key] for result in results)  # DDP averages them
        largest = p.grad.abs().max() + 1
        torch.testing.assert_close(total, p.grad, rtol=1e-7, atol=1e-9 * largest, msg=key)


def run_ddp_penalty(rank, find_unused):
    model = megdet_d2.convert_cgbn(make_model())
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    penalised(ddp, images()[rank].clone().requires_grad_(), SCORES["linear"]).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_averages_the_gradients_of_a_penalty(pool2, find_unused):
    model = make_model()
    penalised(model, images().flatten(0, 1).requires_grad_(), SCORES["linear"]).backward()
    for gradients in pool2.run(run_ddp_penalty, find_unused):
        for found, p in zip(gradients, model.parameters(), strict=True):
            right = torch.zeros_like(p) if p.grad is None else p.grad
            found = torch.zeros_like(p) if found is None else found
            torch.testing.assert_close(2 * found, right, rtol=1e-7, atol=1e-9 * (1 + right.max()))


def run_input_without_gradient(rank):
    """Runs a layer without regions on rank 1: its empty input needs no gradient."""
    layer = CrossGPUBatchNorm(3).double()
    x = images()[0] if rank == 0 else torch.zeros(0, 3, 8, 8, dtype=torch.float64)
    x.requires_grad_(rank == 0)
    loss = layer(x).pow(3).sum()
    gradients = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    return layer.weight.grad, x.grad


def test_double_backward_beside_an_input_without_gradient(pool2):
    layer = nn.BatchNorm2d(3).double()
    x = images()[0].requires_grad_()
    loss = layer(x).pow(3).sum()
    gradients = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    (weight, dx), _ = pool2.run(run_input_without_gradient)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(weight, layer.weight.grad)


def run_create_graph_on_one_rank(rank):
    layer = CrossGPUBatchNorm(3).double()
    x = images()[rank].requires_grad_()
    with pytest.raises(megdet_d2.OutOfStepError, match="for create_graph"):
        torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=rank == 0)


def test_create_graph_on_one_rank_alone_is_an_error(pool2):
    pool2.run(run_create_graph_on_one_rank)


# --- copies --------------------------------------------------------------------------------------


def count_calls(module, args, output):
    module.calls = getattr(module, "calls", 0) + 1


def run_copies(rank):
    layer = megdet_d2.convert_cgbn(nn.BatchNorm2d(3), process_group=dist.new_group([0, 1]))
    layer.register_forward_hook(count_calls)
    layer(torch.randn(2, 3, 3, 3))
    layer.num_batches_skipped += 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(2, 3, 3, 3)
        before = copy.deepcopy(layer.state_dict())
        y = other(x)
        assert other.calls == 2 and layer.calls == 1, "the hook has come along, on its own module"
        assert other.name == layer.name and other.num_batches_skipped == 1
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key]), f"{key} is shared with the copy"
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), y)
        plain = megdet_d2.revert_cgbn(other)
        assert type(plain) is nn.BatchNorm2d
        plain.eval()(x)
        assert plain.calls >= 1


def test_copies_keep_hooks_and_state(pool2):
    pool2.run(run_copies)


# --- not finite ----------------------------------------------------------------------------------


def run_recovery(rank, bad, algorithm):
    layer = CrossGPUBatchNorm(3, momentum=None, algorithm=algorithm)
    for step in range(4):
        x = images(step)[rank].float()
        if step == 1 and rank == 1:
            x[0, 1, 2, 3] = bad
        layer(x)
    return layer.state_dict(), layer.num_batches_skipped


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_recovery_after_a_bad_batch_on_one_rank(pool2, bad, algorithm):
    # 3e38 is finite, but of such a batch a float32 running_var is not.
    plain = nn.BatchNorm2d(3, momentum=None)
    for step in (0, 2, 3):
        plain(images(step).flatten(0, 1).float())
    for state, skipped in pool2.run(run_recovery, bad, algorithm):
        assert skipped == 1
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(state[key], value)


def test_statistics_that_a_half_precision_module_cannot_hold_are_skipped():
    layer = CrossGPUBatchNorm(3, momentum=1.0).half()
    layer((torch.randn(8, 3, 8, 8) * 1000).half())  # a variance of 1e6
    assert layer.running_var.isfinite().all() and layer.num_batches_skipped == 1
