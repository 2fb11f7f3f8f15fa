"""Compares the layer on a GPU with the layer on the CPU; `make test-gpu` runs it.

With MEGDET_TEST_GPU=dry-run, as in `make gpu DRY=1`, the tests run on a CPU as far as they can. So
mistakes in them show before a GPU is at hand.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import collective, kernels
from tests.helpers.kernel_cases import (
    ACTIVATIONS,
    CASES,
    FINISH,
    INNERMOST,
    OUTERMOST,
    check_all,
    check_deviations,
    check_finish,
    check_layer,
    check_moments_are_robust,
    check_odd_sizes,
    check_relu_masks_agree,
    make_stats,
    moments,
)

DRY = os.environ.get("MEGDET_TEST_GPU") == "dry-run"
DEVICE = torch.device("cpu" if DRY else "cuda")
pytestmark = pytest.mark.skipif(
    not DRY and not torch.cuda.is_available(),
    reason="no GPU, or hidden from the tests: `make test-gpu`",
)
gpu_only = pytest.mark.skipif(DRY, reason="a CPU cannot do this")
with_triton = pytest.mark.skipif(
    DRY or not kernels.available(),
    reason="Triton is not installed, or it is a dry run: test_kernels.py interprets the kernels",
)

# (rtol, atol) of outputs and gradients.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (2e-2, 6e-2),
    torch.float16: (2e-3, 1e-2),
}
INPUTS = {
    "plain": lambda: torch.randn(4, 7, 9, 11, dtype=torch.float64) * 2 + 3,
    "constant channel": lambda: torch.randn(4, 7, 9, 11, dtype=torch.float64).index_fill(
        1, torch.tensor([2]), 5.0
    ),
    "far from zero": lambda: torch.randn(4, 7, 9, 11, dtype=torch.float64) + 1000,
    "2-D": lambda: torch.randn(16, 7, dtype=torch.float64),
    "5-D": lambda: torch.randn(2, 7, 3, 4, 5, dtype=torch.float64),
    "empty": lambda: torch.zeros(0, 7, 9, 11, dtype=torch.float64),
    "non-contiguous": lambda: torch.randn(4, 7, 18, 11, dtype=torch.float64)[:, :, ::2],
    "one image": lambda: torch.randn(1, 7, 9, 11, dtype=torch.float64),
    "one channel": lambda: torch.randn(4, 1, 9, 11, dtype=torch.float64),
    "one value an image": lambda: torch.randn(16, 7, 1, 1, dtype=torch.float64),
}


def run(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    parameters = (layer.weight.grad, layer.bias.grad)
    return [t.cpu() for t in (y.detach(), x.grad, *parameters, *layer.buffers())]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", INPUTS)
def test_equals_the_cpu(name, dtype, layout):
    x = INPUTS[name]().to(dtype)
    if layout is torch.channels_last:
        if x.dim() != 4:
            pytest.skip("channels_last is a layout of 4-D tensors")
        x = x.contiguous(memory_format=layout)
    channels = x.shape[1]
    layer = CrossGPUBatchNorm(channels, eps=1e-3)
    layer.weight.data = torch.linspace(-1, 2, channels)
    layer.bias.data = torch.linspace(1, -1, channels)
    if dtype == torch.float64:
        layer.double()
    twin = copy.deepcopy(layer).to(DEVICE)
    dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    rtol, atol = TOLERANCES[dtype]
    if name == "far from zero" and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("a half has no digits left there")
    if name == "far from zero" and DRY:
        pytest.skip("float32 on a CPU is less exact there")
    expected = run(layer, x, dy)
    if name == "far from zero":  # where the CPU's own float32 has an error of 4e-5
        exact = run(copy.deepcopy(layer).double(), x.double(), dy.double())
        expected = [e.to(o.dtype) for e, o in zip(exact, expected, strict=True)]
    for ours, reference in zip(run(twin, x.to(DEVICE), dy.to(DEVICE)), expected, strict=True):
        scale = 1 + float(x.numel() > 0) * 30 * float(ours.dim() == 1)  # sums over the batch
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 7, 1, 1), (4, 7, 9, 11)])
@pytest.mark.parametrize("relu", [False, True])
def test_an_expanded_gradient(shape, layout, relu):
    """Checks dy without memory for each value, as ``y.sum().backward()`` makes it."""
    layer = CrossGPUBatchNorm(7, eps=1e-3)
    layer.weight.data, layer.bias.data = torch.linspace(-1, 2, 7), torch.linspace(1, -1, 7)
    x, dy = torch.randn(4, 7, 9, 11).contiguous(memory_format=layout), torch.randn(shape)
    results = []
    for device in ("cpu", DEVICE):
        twin = copy.deepcopy(layer).to(device)
        leaf = x.detach().to(device).requires_grad_()
        gradient = dy.to(device).expand_as(x)
        y = twin(leaf, relu=relu)
        y.backward(gradient.clone() if device == "cpu" else gradient)
        results.append([t.cpu() for t in (y, leaf.grad, twin.weight.grad, twin.bias.grad)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@gpu_only
def test_one_value_gives_beta_and_is_counted():
    layer = CrossGPUBatchNorm(5).cuda()
    layer.bias.data = torch.arange(5.0, device="cuda")
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.randn(1, 5, 1, 1, device="cuda"))
    torch.testing.assert_close(y.flatten(), layer.bias.data)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
    assert layer.num_batches_skipped == 1


def penalty(layer, x, residual, relu):
    """Returns the gradients of a penalty on the gradient for x."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = layer(x, residual, relu)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(dx.pow(2).sum(), [x, residual, *parameters], allow_unused=True)
    return [torch.zeros(()) if g is None else g.cpu() for g in gradients]


@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives_equal_those_of_the_cpu(relu):
    layer = CrossGPUBatchNorm(5).double()
    x, residual = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    expected = penalty(layer, x, residual, relu)
    for found, right in zip(
        penalty(copy.deepcopy(layer).to(DEVICE), x.to(DEVICE), residual.to(DEVICE), relu),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9 * (1 + right.abs().max()))


@gpu_only
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_host_never_waits(dtype, momentum):
    layer = CrossGPUBatchNorm(8, momentum=momentum).cuda()
    x = torch.randn(2, 8, 16, 16, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def fake_group():
    """A group of two whose collectives return at once, so that one GPU runs all the code."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    collective._mismatch.clear()  # no process answers, so every message looks out of step
    dist.destroy_process_group()


@gpu_only
@pytest.mark.parametrize("activation", [{}, {"relu": True}, {"relu": True, "residual": True}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_a_group_the_host_never_waits_either(fake_group, layout, activation):
    layer = CrossGPUBatchNorm(64, process_group=fake_group).cuda()
    x = torch.randn(2, 64, 20, 24, device="cuda").to(memory_format=layout).requires_grad_()
    residual = torch.randn_like(x) if activation.get("residual") else None
    relu = activation.get("relu", False)
    layer(x, residual, relu).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, residual, relu).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_step_a_group_normalises_over_both_halves(fake_group, layout, monkeypatch):
    """Doubles the message: the other process has the same images and would send the same."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.mul_(2))
    layer = CrossGPUBatchNorm(16, process_group=fake_group).to(DEVICE)
    reference = torch.nn.BatchNorm2d(16).to(DEVICE)
    x = torch.randn(3, 16, 9, 7, device=DEVICE).to(memory_format=layout).requires_grad_()
    both = torch.cat([x.detach(), x.detach()]).requires_grad_()
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    y = layer(x)
    expected = reference(both)
    expected.backward(torch.cat([dy, dy]))
    torch.testing.assert_close(y, reference(both)[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, both.grad[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)
    collective.raise_if_out_of_step()  # nothing


@gpu_only
def test_out_of_step_is_noticed_on_the_device(fake_group):
    layer = CrossGPUBatchNorm(8, process_group=fake_group).cuda()
    layer(torch.randn(2, 8, 4, 4, device="cuda"))
    with pytest.raises(collective.OutOfStepError):
        collective.raise_if_out_of_step()


@gpu_only
def test_out_of_step_stays_noticed_when_the_next_layers_match(fake_group, monkeypatch):
    layer = CrossGPUBatchNorm(8, process_group=fake_group).cuda()
    x = torch.randn(2, 8, 4, 4, device="cuda")
    layer(x)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.mul_(2))  # in step
    layer(x)
    with pytest.raises(collective.OutOfStepError):
        collective.raise_if_out_of_step()
    layer(x)
    collective.raise_if_out_of_step()  # each is raised once


@with_triton
@pytest.mark.parametrize("layout", [OUTERMOST, INNERMOST])
@pytest.mark.parametrize(("relu", "addition"), ACTIVATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_on_the_kernels(layout, relu, addition, padded):
    check_layer("cuda", layout, relu, addition, padded)


@gpu_only
def test_a_layer_in_a_cuda_graph():
    layer = CrossGPUBatchNorm(64).cuda()
    x = torch.randn(2, 64, 20, 24, device="cuda", requires_grad=True)
    twin = copy.deepcopy(layer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(layer(x).square().sum(), x)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    layer.load_state_dict(twin.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    with torch.no_grad():
        x.normal_(mean=3)
    graph.replay()
    expected = twin(x)
    (dx_expected,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, dx_expected)
    torch.testing.assert_close(layer.running_var, twin.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    layer = CrossGPUBatchNorm(8).to(DEVICE)
    convolution = torch.nn.Conv2d(3, 8, 3).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        y = layer(convolution(torch.randn(2, 3, 16, 16, device=DEVICE)), relu=True)
    assert y.dtype == dtype and layer.running_mean.dtype == torch.float32
    y.float().square().sum().backward()
    gradients = [convolution.weight.grad, layer.weight.grad, layer.bias.grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert convolution.weight.grad.any()


class Block(nn.Module):
    """A block of a ResNet: two convolutions, the shortcut and ReLU in the last norm."""

    def __init__(self, channels, **options):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = CrossGPUBatchNorm(channels, **options)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = CrossGPUBatchNorm(channels, **options)

    def forward(self, x):
        y = self.norm1(self.first(x), relu=True)
        return self.norm2(self.second(y), x, relu=True)


def state(model):
    """Returns parameters and buffers, also those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def restore(model, saved):
    with torch.no_grad():
        for name, value in state(model).items():
            value.copy_(saved[name])


@gpu_only
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_whole_step_in_a_cuda_graph(fake_group, layout, monkeypatch):
    """Compares three replays of forward, backward and update with three such steps."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.mul_(2))
    model = Block(16, process_group=fake_group).cuda().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    xs = torch.randn(3, 4, 16, 12, 10, device="cuda")
    x = xs[0].clone(memory_format=layout)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    before = {name: value.detach().clone() for name, value in state(model).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()  # compiles, and chooses the convolutions' algorithms
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    results = []
    for run_step in (graph.replay, step):
        restore(model, before)
        for new in xs:
            x.copy_(new)
            run_step()
        results.append([value.detach().clone() for value in state(model).values()])
    for replayed, eager in zip(*results, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-5)
    assert model.norm1.num_batches_tracked == 3
    collective.raise_if_out_of_step()  # nothing


@gpu_only
@pytest.mark.parametrize("warm", [True, False], ids=["after a step", "first use"])
def test_a_captured_layer_reports_processes_out_of_step(fake_group, warm):
    """Checks the flag of a mismatch in a replayed graph, also if the graph is the first to use it.

    The group's collectives do nothing, so each message is out of step.
    """
    layer = CrossGPUBatchNorm(8, process_group=fake_group).cuda()
    twin = CrossGPUBatchNorm(8).cuda()
    x = torch.randn(2, 8, 4, 4, device="cuda")
    (layer if warm else twin)(x)  # compiles
    torch.cuda.synchronize()
    if warm:
        with pytest.raises(collective.OutOfStepError):
            collective.raise_if_out_of_step()
    layer._sync_name()  # makes the group and its flag, which a capture cannot do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    collective.raise_if_out_of_step()  # a capture runs nothing
    for _ in range(2):
        graph.replay()
        with pytest.raises(collective.OutOfStepError):
            collective.raise_if_out_of_step()


@gpu_only
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_side_stream_shares_no_memory_with_the_main_one(layout):
    """Runs steps on a side stream while the main one takes and fills the memory that is free."""
    model, stream = Block(32).cuda().to(memory_format=layout), torch.cuda.Stream()
    x = torch.randn(4, 32, 40, 56, device="cuda").to(memory_format=layout)
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    torch.cuda.synchronize()
    stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(20):
        with torch.cuda.stream(stream):
            loss = model(x).square().mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        for size in (64, 4099, 4 * 32 * 40 * 56):
            torch.full((size,), float("nan"), device="cuda")
    torch.cuda.synchronize()
    for gradients in found:
        for ours, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-5)


def test_a_loss_scaler_skips_a_step_and_the_layer_keeps_finite_statistics():
    model = Block(8).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**100, growth_interval=1)
    x = torch.randn(2, 8, 12, 10, device=DEVICE)
    before = copy.deepcopy(model)
    moved = []
    for scale in (4.0, None):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(scale)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved.append(any(not torch.equal(a, b) for a, b in pairs))
    assert moved == [False, True]  # the first gradients overflow, the second do not
    for norm in (model.norm1, model.norm2):
        assert norm.num_batches_tracked == 2 and norm.num_batches_skipped == 0
        assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


@gpu_only
def test_a_half_that_overflows_leaves_the_running_statistics():
    layer = CrossGPUBatchNorm(4).cuda()
    x = torch.randn(2, 4, 6, 5, device="cuda", dtype=torch.float16)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    x[0, 1, 2, 3] = float("inf")
    layer(x)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
    assert layer.num_batches_skipped == 1


@pytest.mark.skipif(
    DRY or torch.cuda.device_count() < 2, reason="takes two GPUs, of which another is the current"
)
def test_a_layer_on_another_device_than_the_current():
    x = torch.randn(4, 8, 9, 11)
    expected = run(CrossGPUBatchNorm(8), x, torch.ones_like(x))
    layer = CrossGPUBatchNorm(8).to("cuda:1")
    with torch.cuda.device(0):
        found = run(layer, x.to("cuda:1"), torch.ones_like(x).to("cuda:1"))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@gpu_only
def test_nccl_sends_the_message(port):
    """Sends the float64 message through NCCL, in a group of one."""
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        parts = torch.rand(9, device="cuda", dtype=torch.float64).split([8, 1])
        group = dist.new_group().group_name
        sums = collective.all_reduce(group, "layer", "forward", *parts)
        assert all(torch.equal(a, b) for a, b in zip(sums, parts, strict=True))
        collective.raise_if_out_of_step()  # nothing
    finally:
        collective._mismatch.clear()
        dist.destroy_process_group()


# --- the Triton kernels; what they must satisfy is in kernel_cases.py ----------------------------

# Besides those that the interpreter can do: real sizes, which take many programs and waves.
LARGE_CASES = [
    ((2, 64, 200, 336), OUTERMOST, torch.bfloat16),
    ((2, 64, 200, 336), INNERMOST, torch.bfloat16),
    ((2, 256, 25, 42), OUTERMOST, torch.float16),
    ((2, 256, 25, 42), INNERMOST, torch.float16),
    ((257, 65, 7, 7), OUTERMOST, torch.float32),
    ((257, 65, 7, 7), INNERMOST, torch.float32),
    ((2, 257, 50, 84), OUTERMOST, torch.float64),
]


@with_triton
@pytest.mark.parametrize("case", CASES + LARGE_CASES)
def test_kernels_equal_float64(case):
    check_all("cuda", case)


@with_triton
@pytest.mark.parametrize("innermost", [False, True])
def test_kernels_moments_hold_far_from_zero(innermost):
    check_moments_are_robust("cuda", innermost)


@with_triton
def test_kernels_on_odd_sizes_and_tensors_that_are_not_aligned():
    check_odd_sizes("cuda")


@with_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_mask_alike_forward_and_backward(dtype):
    check_relu_masks_agree("cuda", dtype)


@with_triton
@pytest.mark.parametrize("case", FINISH, ids=str)
def test_kernels_values_per_channel(case):
    check_finish("cuda", *case)


@with_triton
def test_kernels_deviations():
    check_deviations("cuda")


@with_triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_on_two_streams_at_once_count_their_programs_apart(layout):
    """Checks the counters of each stream, by which the last program of a group knows itself."""
    xs = [torch.randn(4, 64, 100, 168, device="cuda").to(memory_format=layout) for _ in range(2)]
    expected = [moments(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    messages = torch.empty(2, 20, 131, dtype=torch.float64, device="cuda")
    for repeat in range(20):
        for x, stream, own in zip(xs, streams, messages, strict=True):
            with torch.cuda.stream(stream):
                kernels.power_sums(x, None, own[repeat], 3)
    torch.cuda.synchronize()
    for own, (mean, _) in zip(messages, expected, strict=True):
        assert (own == own[0]).all() and torch.equal(own[0, :64] / own[0, 128], mean)


@with_triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_reach_past_two_gib_elements(layout):
    """Checks offsets of 64 bits: the last value of the last channel, at 2^31 + 2^26 elements."""
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip("16 GiB of GPU memory are not free")
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=layout)
    x[-1, -1, -1, -1] = 1024
    mean, var = moments(x)
    n = x.numel() // 64
    torch.testing.assert_close(mean[-1].item(), 1024 / n, rtol=1e-6, atol=0)
    torch.testing.assert_close(var[-1].item(), 1024**2 / n, rtol=1e-5, atol=0)
    ones = torch.ones(64, device="cuda")
    y = kernels.normalize(x, make_stats(0 * ones, 2 * ones, 2 * ones, ones))
    assert y[-1, -1, -1, -1] == 2048  # 2049 in float16
    assert y[-1, -1, -1, -2] == 1 and y[0, 0, 0, 0] == 1


@with_triton
def test_kernels_in_a_cuda_graph_and_the_host_never_waits():
    x = torch.randn(2, 64, 100, 168, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")

    def step():
        stats, count = x.new_empty(4, 64, dtype=torch.float32), x.new_empty(1, dtype=torch.float64)
        message, backward = x.new_empty(2, 200, dtype=torch.float64)
        kernels.power_sums(x, None, message, 7)
        nothing = [None] * 6
        kernels.finish(message, None, *nothing, 0.1, 1e-5, stats, count, 1, flag)
        y = kernels.normalize(x, stats, relu=True)
        sums = kernels.gradient_sums(dy, x, stats, True, None, backward, 7)
        dx, _ = kernels.input_gradient(dy, x, stats, backward, count, relu=True)
        return stats, y, sums, dx

    torch.cuda.synchronize()
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_(mean=5)
    dy.normal_()
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)  # sums have one order, too


@gpu_only
@pytest.mark.parametrize("relu", [False, True])
def test_compiles_into_one_graph(relu):
    layer = CrossGPUBatchNorm(8).cuda()
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(2, 2, 8, 6, 5, device="cuda")
    results = []
    for call, module in ((torch.compile(layer, fullgraph=True), layer), (twin, twin)):
        leaf = x.clone().requires_grad_()
        y = call(leaf, relu=relu)
        y.backward(dy)
        results.append([y, leaf.grad, module.weight.grad, module.bias.grad, *module.buffers()])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def one_of_two(rank, port, images):
    """Compares this rank's part of a batch with batch norm of the whole batch in float64."""
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, dy = torch.randn(2, sum(images), 7, 9, 11).unbind()
    reference = nn.BatchNorm2d(7).double()
    all_x = whole.double().requires_grad_()
    all_y = reference(all_x)
    all_y.backward(dy.double())
    begin = sum(images[:rank])
    mine = slice(begin, begin + images[rank])

    layer = CrossGPUBatchNorm(7).cuda()
    x = whole[mine].cuda().requires_grad_()
    y = layer(x)
    y.backward(dy[mine].cuda())
    gradients = torch.stack([layer.weight.grad, layer.bias.grad])
    dist.all_reduce(gradients)
    collective.raise_if_out_of_step()
    for ours, expected in (
        (y, all_y[mine]),
        (x.grad, all_x.grad[mine]),
        (gradients, torch.stack([reference.weight.grad, reference.bias.grad])),
        (layer.running_mean, reference.running_mean),
        (layer.running_var, reference.running_var),
    ):
        torch.testing.assert_close(ours.cpu(), expected.float(), rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two processes of NCCL take two GPUs")
@pytest.mark.parametrize("images", [(3, 2), (5, 0)])
def test_two_gpus_normalise_as_one(images, port):
    mp.spawn(one_of_two, args=(port, images), nprocs=2)
