"""Tests the operators: their schemas, the running statistics, derivatives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megdet_d2.norm import functional
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.groups import SELF
from megdet_d2.norm.padding import ValidRegion


def test_gradients_by_finite_differences():
    layer = CrossGPUBatchNorm(3).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x),
        (x, layer.weight, layer.bias),
    )


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
    stats, c, count = torch.rand(4, 4, dtype=dtype), torch.rand(4), torch.ones(1).double()
    running = torch.zeros(4), torch.ones(4), torch.tensor(0), torch.tensor(0)
    dy = torch.randn(x.shape).to(x)  # contiguous, whatever x is
    valid = torch.rand(len(x), 1, *x.shape[2:]) > 0.3
    checks = ("test_schema", "test_faketensor")
    for name, args in (
        ("statistics", (x, c, c, None, *running, 0.1, 1e-5, "", "one_reduce", "")),
        (
            "statistics",
            (x, None, None, valid, *4 * [None], None, 1e-5, "", "two_pass", ""),
        ),
        ("normalize", (x, stats, None, False)),
        ("normalize", (x, stats, x, True)),
        ("gradients", (dy, x, stats, count, valid, False, None, True, False, "", "")),
        ("gradients", (dy, x, stats, count, None, False, None, False, False, "", "")),
    ):
        op = getattr(torch.ops.megdet_d2, name).default
        torch.library.opcheck(op, args, test_utils=checks)


OPTIONS = {
    "plain": {},
    "without γ and β": {"affine": False},
    "without β": {"bias": False},
    "residual": {"residual": True},
    "residual and ReLU": {"residual": True, "relu": True},
    "padding": {"padding": True},
    "padding and ReLU": {"padding": True, "relu": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)])
def test_second_derivatives_by_finite_differences(shape, options):
    padding, relu = options.get("padding", False), options.get("relu", False)
    if padding and len(shape) == 2:
        pytest.skip("padding is around images")
    generator = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = {"x": x.detach().requires_grad_()}
    if options.get("residual"):
        inputs["residual"] = r.detach().requires_grad_()
    affine, bias = options.get("affine", True), options.get("bias", True)
    layer = CrossGPUBatchNorm(3, affine=affine, bias=bias, dtype=torch.float64)
    if padding:
        layer.valid_region = ValidRegion([(1, 2), (2, 1)], (2, 2))

    def run(*values):
        values = dict(zip([*inputs, *dict(layer.named_parameters())], values, strict=True))
        x, residual = values.pop("x"), values.pop("residual", None)
        return torch.func.functional_call(layer, values, (x, residual, relu))

    values = (*inputs.values(), *layer.parameters())
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


def penalty(norm, order, score):
    """Returns the parameters' gradients of a penalty on a derivative of the score."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), norm(3), nn.Conv2d(3, 2, 1))
        model.double()
        x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    value = score(model(x))
    for _ in range(order - 1):
        (value,) = torch.autograd.grad(value, x, create_graph=True)
        value = value.pow(3).sum()
    value.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in (*model[:2].parameters(), x)]


SCORES = {
    "linear": lambda y: (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(),
    "cubic": lambda y: y.pow(3).sum(),
}


class WrittenOut(nn.BatchNorm2d):
    """Batch norm by operations that autograd knows to any order; torch's own has two."""

    def forward(self, x):
        centred = x - x.mean((0, 2, 3), keepdim=True)
        var = centred.square().mean((0, 2, 3), keepdim=True)
        return F.conv2d(
            centred / (var + self.eps).sqrt(), self.weight.diag()[..., None, None], self.bias
        )


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_higher_derivatives(score, order):
    # A score that is linear in the output gives a dy without a graph (R1, WGAN-GP).
    ours, right = (penalty(norm, order, score) for norm in (CrossGPUBatchNorm, WrittenOut))
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * (1 + b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_create_graph_does_not_change_the_first_derivative(dtype):
    layer = CrossGPUBatchNorm(3)
    x = (torch.randn(4, 3, 5, 5) * 2 + 30).to(dtype).requires_grad_()
    dy = torch.randn(4, 3, 5, 5).to(dtype)
    results = []
    for create_graph in (False, True):
        calls = []
        handle = x.register_hook(calls.append)
        y = layer(x, relu=True)
        results.append(
            torch.autograd.grad(y, (x, *layer.parameters()), dy, create_graph=create_graph)
        )
        handle.remove()
        assert len(calls) == 1
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        rtol = 2**-7 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=1e-4)


def run_far_from_zero(rank, xs, padded):
    layer = CrossGPUBatchNorm(3, momentum=1.0).double()
    if padded:
        layer.valid_region = ValidRegion([(8, 8)] * len(xs[rank]), (9, 9))
    return layer(xs[rank]).detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("offset", [0, 1e4, 1e6, 1e8])
def test_float64_far_from_zero(pool2, offset, padded):
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    x[:, 1] += offset  # the other channels are around zero
    plain = nn.BatchNorm2d(3, momentum=1.0).double()
    expected = plain(x)
    # Of 16 digits, x itself has lost those of the offset.
    tolerance = 1e-12 + 1e-15 * offset
    one, two = [run_far_from_zero(0, [x], padded)], pool2.run(run_far_from_zero, x.split(2), padded)
    for results in (one, two):
        y = torch.cat([result[0] for result in results])
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        for _, mean, var in results:
            torch.testing.assert_close(mean, plain.running_mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(var, plain.running_var, rtol=tolerance, atol=0)


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
