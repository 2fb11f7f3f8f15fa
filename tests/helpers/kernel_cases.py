"""Checks of the Triton kernels, shared by test_kernels.py and test_cuda.py."""

import itertools

import pytest
import torch
from torch import Tensor

OUTERMOST, INNERMOST = "channels outermost", "channels innermost"
# Sizes are no multiples of a tile, and small because the interpreter is slow.
CASES = [
    ((3, 1, 5000), OUTERMOST, torch.float32),
    ((2, 3, 40, 33), OUTERMOST, torch.bfloat16),
    ((3, 2, 1026), OUTERMOST, torch.float16),
    ((20, 3, 7, 7), OUTERMOST, torch.float64),
    ((5, 3, 6), OUTERMOST, torch.bfloat16),
    ((300, 64), INNERMOST, torch.bfloat16),
    ((2, 64, 2, 3, 4), INNERMOST, torch.float64),
    ((5, 3, 1, 1), INNERMOST, torch.float32),
    ((2, 65, 5, 7), INNERMOST, torch.float16),
    ((2, 1, 9, 11), INNERMOST, torch.float32),
    ((40, 257), INNERMOST, torch.float32),
    ((3, 6, 5), INNERMOST, torch.float16),
]
ACTIVATIONS = list(itertools.product([False, True], [False, True]))  # (ReLU, addition)
# Relative error of one rounding to the dtype. The interpreter truncates to bfloat16, a GPU rounds.
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-21, torch.float64: 2**-48}


def make(case, seed: int = 0) -> Tensor:
    shape, layout, dtype = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _lay_out((2 * x + 3).to(dtype), layout)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == INNERMOST else x.contiguous()


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, torch.float64).view(-1, *[1] * (like.dim() - 2))


def channels_sum(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).sum(1)


def moments(x):
    """Returns mean and variance from the kernel's sums, computed as in the layer."""
    from megdet_d2.norm import kernels

    sums, squares = kernels.power_sums(x)
    n = x.numel() // x.shape[1]
    return sums / n, squares / n - (sums / n).square()


def check_all(device: str, case, activations=ACTIVATIONS) -> None:
    """Compares the four functions with float64."""
    from megdet_d2.norm import kernels

    layout, dtype = case[1:]
    x, residual, dy = (make(case, seed).to(device) for seed in range(3))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    other_layout = OUTERMOST if layout == INNERMOST else INNERMOST
    dy = _lay_out(dy, other_layout)  # the kernels must handle it
    exact, eps = x.double(), EPS[dtype]
    n = x.numel() // x.shape[1]

    mean, var = moments(x)
    assert mean.dtype == var.dtype == torch.float64
    mean64 = channels_sum(exact) / n
    var64 = channels_sum((exact - per_channel(mean64, x)).square()) / n
    tiny = 1e-6 if statistics == torch.float32 else 1e-13
    torch.testing.assert_close(mean, mean64, rtol=tiny, atol=tiny)
    torch.testing.assert_close(var, var64, rtol=tiny, atol=tiny)

    mean = mean.to(statistics)
    invstd = (var + 1e-3).rsqrt().to(statistics)
    scale = invstd * torch.linspace(-1, 2, len(var), device=device, dtype=statistics)
    bias = torch.linspace(1, -1, len(var), device=device, dtype=statistics)
    centred = exact - per_channel(mean, x)
    affine = centred * per_channel(scale, x) + per_channel(bias, x)
    for relu, addition in activations:
        added = residual if addition else None
        y = kernels.normalize(x, mean, scale, bias, added, relu)
        assert y.dtype == dtype and y.stride() == x.stride()
        y64 = affine if added is None else affine + added.double()
        y64 = y64.clamp(min=0) if relu else y64
        torch.testing.assert_close(y.double(), y64, rtol=eps, atol=16 * tiny)

        given = None if added is None else y
        masked = dy.double() * (y > 0) if relu else dy.double()
        sums = kernels.gradient_sums(
            dy, x, mean, invstd, *((scale, bias) if added is None else ()), relu=relu, y=given
        )
        xhat = centred * per_channel(invstd, x)
        for ours, terms in zip(sums, (masked, masked * xhat), strict=True):
            assert ours.dtype == statistics and ours.shape == mean.shape
            atol = 4 * tiny * float(channels_sum(terms.abs()).max())
            torch.testing.assert_close(ours.double(), channels_sum(terms), rtol=0, atol=atol)

        means = [s / n for s in sums]
        dx, dresidual = kernels.input_gradient(
            dy, x, mean, invstd, scale, bias, *means, relu, given, added is not None
        )
        m1, m2 = (per_channel(m, x) for m in means)
        dx64 = per_channel(scale, x) * (masked - m1 - xhat * m2)
        assert dx.dtype == dtype and dx.stride() == x.stride()
        torch.testing.assert_close(dx.double(), dx64, rtol=eps, atol=64 * tiny)
        if added is None:
            assert dresidual is None
        else:
            assert dresidual.dtype == dtype and dresidual.stride() == x.stride()
            assert torch.equal(dresidual.double(), masked)


def check_moments_are_robust(device: str, innermost: bool) -> None:
    """Checks float32 variance far from zero, and with untypical first values of a channel."""
    noise = torch.randn(2, 2, 2600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outlier = noise.clone()
    outlier[0, :, 0] = 1e4
    padded = noise + 1e3
    padded[0, :, :2100] = 0  # a whole tile of a channel, and more
    inputs = [(noise, 1e-6), (noise + 1e3, 1e-6), (noise + 1e4, 1e-5), (noise * 1e-5 + 1, 1e-5)]
    for x, tolerance in [*inputs, (outlier, 1e-6), (padded, 1e-6)]:
        if innermost:
            x = x[..., :330]
        x = _lay_out(x.float(), INNERMOST if innermost else OUTERMOST).to(device)
        exact = x.double().transpose(0, 1).flatten(1)
        mean, var = moments(x)
        torch.testing.assert_close(
            var, exact.var(1, correction=0), rtol=tolerance, atol=0, msg=lambda m, x=x: f"{x}: {m}"
        )
        assert ((mean - exact.mean(1)).abs() < 1e-7 * var.sqrt()).all()
    mean, var = moments(torch.full_like(x, 12345.6789))
    assert float((mean - float(x.new_tensor(12345.6789))).abs().max()) < 1e-9
    assert float(var.abs().max()) < 1e-6


def check_relu_masks_agree(device: str, dtype: torch.dtype) -> None:
    """Checks that dy' is dy exactly where y > 0, also for y near 0 or underflowing to 0."""
    from megdet_d2.norm import kernels

    x = make(((2, 3, 1500), OUTERMOST, dtype)).to(device)
    mean = torch.tensor([3.0, float(x[0, 1, 0]), 2.9], device=device)
    bias = torch.tensor([0.0, 0.0, -1e-3], device=device)
    nothing = torch.zeros_like(mean)
    for scale in (1e-7, 1.0):
        scale = torch.full_like(mean, scale)
        y = kernels.normalize(x, mean, scale, bias * scale, relu=True)
        backward = mean, scale, scale, bias * scale, nothing, nothing
        _, dy = kernels.input_gradient(torch.ones_like(x), x, *backward, True, None, True)
        assert torch.equal(dy != 0, y > 0)
        count, _ = kernels.gradient_sums(
            torch.ones_like(x), x, mean, scale, scale, bias * scale, True
        )
        assert torch.equal(count, channels_sum((y > 0).to(count)))
    assert 0 < int((y > 0).sum()) < y.numel()
    x[0, 0, 7] = float("nan")
    y = kernels.normalize(x, mean, scale, bias, relu=True)
    assert y[0, 0, 7].isnan() and int(y.isnan().sum()) == 1


def check_layer(device: str, layout: str, relu: bool, addition: bool, padded: bool) -> None:
    """Compares the layer with fused activations on these kernels with torch's single operators."""
    from megdet_d2 import CrossGPUBatchNorm
    from megdet_d2.norm import functional
    from megdet_d2.norm.padding import ValidRegion

    results = []
    for triton in (True, False):
        layer = CrossGPUBatchNorm(5, momentum=0.3).double().to(device)
        layer.weight.data = torch.linspace(-1, 2, 5, dtype=torch.float64, device=device)
        if padded:
            layer.valid_region = ValidRegion([(6, 4), (5, 7), (3, 3)], (6, 7))
        case = (3, 5, 6, 7), layout, torch.float64
        x, residual, dy = (make(case, seed).to(device) for seed in range(3))
        inputs = [t.requires_grad_() for t in ([x, residual] if addition else [x])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "use_triton", lambda _, triton=triton: triton)
            if triton:
                y = layer(*inputs, relu=relu)
            else:
                y = layer(x)
                y = y + residual if addition else y
                y = y.relu() if relu else y
            y.backward(_lay_out(dy, OUTERMOST))
        gradients = [t.grad for t in (*inputs, *layer.parameters())]
        results.append([y.detach(), *gradients, *layer.buffers()])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def check_errors() -> None:
    from megdet_d2.norm import kernels

    x, c = torch.randn(2, 3, 4, 6), torch.ones(3)
    with pytest.raises(ValueError, match=r"contiguous.*\(2, 3, 4, 3\)"):
        kernels.power_sums(x[..., ::2])
    with pytest.raises(ValueError, match="not empty"):
        kernels.power_sums(x[:0])
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        kernels.normalize(x, c, c, c, residual=x[:1])
    with pytest.raises(ValueError, match="relu=True needs y, or scale and bias"):
        kernels.gradient_sums(x, x, c, c, relu=True)
