"""Tests the operators: their schemas, the running statistics, derivatives."""

import pytest
import torch
from torch import nn

from megdet_d2.norm import functional
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.groups import SELF


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
