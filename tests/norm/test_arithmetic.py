"""Compares the layer with the pooled batch in float64 for any parts, offsets and scales.

The bounds follow from the arithmetic, with room for constants. u is half an ulp. The sums Σx² are
float64. So with the mean k deviations from zero, the variance has a relative error of a few
u₆₄ (1 + k²), for any dtype of the input. The rounding of a float32 input is no error, because the
reference has the same input. The mean has the statistics' dtype, so y has an error of a few
u (1 + k).
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm.functional import ALGORITHMS
from tests.helpers.pooled import (
    EPS,
    MOMENTUM,
    TOLERANCES,
    affine,
    assert_equals_pooled,
    make_inputs,
    pooled_reference,
    run_layer,
)

U32, U64 = 2.0**-24, 2.0**-53
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


# --- the cut of the mini-batch -------------------------------------------------------------------


def cut(tensor, sizes):
    return list(tensor.split(sizes))


CUTS = {
    2: [(16, 0), (8, 8), (1, 15)],
    3: [(5, 5, 6), (0, 15, 1)],
    4: [(4, 4, 4, 4), (1, 2, 4, 9), (0, 7, 0, 9)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world_size", CUTS)
def test_the_cut_does_not_matter(request, world_size, dtype):
    pool = request.getfixturevalue(f"pool{world_size}")
    (x,), (dy,) = make_inputs([(16, 5, 4, 3)], dtype)
    # Images of very different content, so that the cut changes each process's own statistics.
    x = x + torch.arange(16, dtype=dtype).view(16, 1, 1, 1)
    whole = pooled_reference([x], [dy])
    for sizes in CUTS[world_size]:
        xs, dys = cut(x, sizes), cut(dy, sizes)
        results = pool.run(run_layer, xs, dys, "one_reduce", None, CONTIGUOUS)
        pieces = {key: cut(whole[key][0], sizes) for key in ("y", "dx")}
        assert_equals_pooled(results, {**whole, **pieces}, *TOLERANCES[dtype])


def test_the_order_of_the_ranks_does_not_matter(pool4):
    xs, dys = make_inputs([(1, 5, 4, 3), (4, 5, 2, 3), (0, 5, 4, 3), (2, 5, 3, 3)])
    first = pool4.run(run_layer, xs, dys, "one_reduce", None, CONTIGUOUS)
    for order in ((3, 2, 1, 0), (2, 0, 3, 1)):
        permuted = pool4.run(
            run_layer, [xs[i] for i in order], [dys[i] for i in order],
            "one_reduce", None, CONTIGUOUS,
        )  # fmt: skip
        for result, i in zip(permuted, order, strict=True):
            for key, value in result.items():
                torch.testing.assert_close(value, first[i][key], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("world_size", [3, 8])
def test_other_world_sizes(request, world_size):
    pool = request.getfixturevalue(f"pool{world_size}")
    shapes = [(i % 4, 5, 2 + i, 3) for i in range(1, world_size + 1)]
    for dtype in (torch.float64, torch.float32):
        xs, dys = make_inputs(shapes, dtype)
        results = pool.run(run_layer, xs, dys, "one_reduce", None, CHANNELS_LAST)
        assert_equals_pooled(results, pooled_reference(xs, dys), *TOLERANCES[dtype])


def run_many_steps(rank, dtype, algorithm):
    layer = CrossGPUBatchNorm(7, algorithm=algorithm)
    same = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(10):
        n = (rank + step) % 3
        own = (torch.randn(n, 7, 3, 3) * (rank + 1) + 10 * rank).to(dtype)
        y = layer(torch.cat([same, own]))
    return layer.running_mean, layer.running_var, y[:2].detach()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ranks_agree_to_the_bit(pool3, pool4, dtype, algorithm):
    for pool in (pool3, pool4):
        results = pool.run(run_many_steps, dtype, algorithm)
        for result in results[1:]:
            # and an image gives the same on any rank
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# --- where a channel lies ------------------------------------------------------------------------


def run_once(rank, xs, dys, eps, algorithm="one_reduce", layout=CONTIGUOUS):
    """Runs a training step; the running statistics are those of the mini-batch (momentum 1)."""
    x = xs[rank].to(memory_format=layout).requires_grad_()
    layer = CrossGPUBatchNorm(x.shape[1], eps, momentum=1.0, algorithm=algorithm)
    if x.dtype == torch.float64:
        layer.double()
    y = layer(x)
    y.backward(dys[rank])
    return {
        "y": y.detach(),
        "dx": x.grad,
        "mean": layer.running_mean.double(),
        "var": layer.running_var.double(),
    }


def pooled_once(xs, dys, eps):
    """Computes the pooled batch in float64, by the formula with centred squares."""
    x, dy = torch.cat(xs).double().requires_grad_(), torch.cat(dys).double()
    n = x.numel() // x.shape[1]
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    y = (x - mean) / (var + eps).sqrt()
    y.backward(dy)
    return {
        "y": y.detach(), "dx": x.grad,
        "mean": mean.detach().flatten(), "var": var.detach().flatten() * n / (n - 1),
    }  # fmt: skip


def images(mean, deviation, dtype, shape=(2, 3, 16, 12), ranks=2):
    generator = torch.Generator().manual_seed(0)

    def randn():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    xs = [(randn() * deviation + mean).to(dtype) for _ in range(ranks)]
    return xs, [randn().to(dtype) for _ in range(ranks)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("offset", [0, 1, 10, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offset_in_deviations(pool2, dtype, offset, layout, algorithm):
    xs, dys = images(offset, 1.0, dtype)
    expected = pooled_once(xs, dys, 1e-5)
    u = U32 if dtype == torch.float32 else U64
    # Local sums are short ones in the input's precision, of x as it is up to two deviations from
    # zero. Then, in the float64 sums over the ranks, there is the cancellation of Σx²/n - μ².
    # The paper's two passes have only the difference of two means.
    cancelled = 8 * U64 * (offset**2 if algorithm == "one_reduce" else offset)
    of_var = 64 * u + cancelled
    of_y = 8 * u * (1 + offset) + 4 * of_var
    for rank, result in enumerate(pool2.run(run_once, xs, dys, 1e-5, algorithm, layout)):
        torch.testing.assert_close(result["mean"], expected["mean"], rtol=4 * u, atol=16 * u)
        torch.testing.assert_close(result["var"], expected["var"], rtol=of_var, atol=0)
        for key in ("y", "dx"):
            whole = expected[key].split([len(x) for x in xs])[rank]
            torch.testing.assert_close(result[key].double(), whole, rtol=0, atol=of_y)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_content_shifted_between_ranks(pool4, algorithm):
    # Each rank sees a constant: all the variance lies between the ranks.
    levels = [0.0, 100.0, -7.0, 3.0]
    xs = [torch.full((i + 1, 3, 2, 2), level) for i, level in enumerate(levels)]
    dys = make_inputs([x.shape for x in xs], torch.float32)[1]
    expected = pooled_once(xs, dys, EPS)
    results = pool4.run(run_once, xs, dys, EPS, algorithm)
    for key in ("y", "dx"):
        together = torch.cat([result[key] for result in results]).double()
        torch.testing.assert_close(together, expected[key], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0]["var"], expected["var"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("variance", [1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
def test_small_variance(pool2, variance, eps):
    deviation = variance**0.5
    for mean in (0.0, 100 * deviation, 1e4 * deviation):
        xs, dys = images(mean, deviation, torch.float32)
        expected = pooled_once(xs, dys, eps)
        for rank, result in enumerate(pool2.run(run_once, xs, dys, eps)):
            torch.testing.assert_close(result["var"], expected["var"], rtol=1e-5, atol=0)
            for key in ("y", "dx"):
                whole = expected[key].split([2, 2])[rank]
                largest = whole.abs().max().item()  # eps may leave next to nothing of y
                bound = (8 * U32 * (1 + mean / deviation) + 1e-5) * largest
                torch.testing.assert_close(result[key].double(), whole, rtol=0, atol=bound)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_channels(pool2, dtype, algorithm):
    constants = torch.tensor([0.0, 0.1, -3.3, 1000.1, 60000.0]).to(dtype)
    xs = [constants.view(1, 5, 1, 1).expand(n, 5, 7, 5).contiguous() for n in (2, 3)]
    dys = make_inputs([x.shape for x in xs], dtype)[1]
    constants = constants.double()
    for result in pool2.run(run_once, xs, dys, 1e-5, algorithm):
        torch.testing.assert_close(result["mean"], constants, rtol=2 * U32, atol=0)
        assert (result["var"] <= 16 * U64 * constants.square()).all()
        # x̂ is the rounding of the mean, over √ε.
        bound = (4 * U32 * constants.abs() / 1e-5**0.5).view(1, 5, 1, 1)
        assert (result["y"].double().abs() <= bound).all()
        assert result["dx"].isfinite().all()


def test_float16_near_its_largest_value(pool2):
    generator = torch.Generator().manual_seed(0)
    for low, high in ((60000, 65504), (-65504, 65504)):
        xs = [
            (torch.rand(4, 3, 16, 16, generator=generator) * (high - low) + low).half()
            for _ in range(2)
        ]
        xs[0][0, :, 0, 0] = high
        dys = [torch.randn(x.shape, generator=generator).half() for x in xs]
        expected = pooled_once(xs, dys, 1e-5)
        for rank, result in enumerate(pool2.run(run_once, xs, dys, 1e-5)):
            for key in ("mean", "var"):
                torch.testing.assert_close(result[key], expected[key], rtol=1e-5, atol=1e-5 * high)
            y = expected["y"].split([4, 4])[rank]
            torch.testing.assert_close(result["y"].double(), y, rtol=1e-3, atol=1e-3)
            assert result["dx"].isfinite().all()


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 4096, 4099), (4096 * 4099, 1), (4096 * 4099, 1, 1, 1)])
def test_more_values_than_float32_can_count(shape):
    # More than 2²⁴, where 1 added to a float32 is lost.
    x = torch.ones(shape)
    x.view(-1)[::2] = 3.0
    layer = CrossGPUBatchNorm(1, momentum=1.0)
    y = layer(x)
    torch.testing.assert_close(layer.running_mean, torch.tensor([2.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var, torch.tensor([1.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(y.view(-1)[:4].detach(), torch.tensor([1.0, -1, 1, -1]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [33, 8192])
def test_counts_over_2_24_and_2_31(monkeypatch, world_size, algorithm):
    # torch's "fake" process group stands for many ranks in one process. Here all see this one's
    # batch, so the sum over them is world_size times its message, whatever is in it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    (x,), (dy,) = make_inputs([(8, 1, 256, 256)], torch.float32)
    assert x.numel() * 33 > 2**24 and x.numel() * 8192 > 2**31
    plain, x1, x2 = nn.BatchNorm2d(1), x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(x1).backward(dy)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        monkeypatch.setattr(dist, "all_reduce", lambda t, *_, **__: t.mul_(world_size))
        layer = CrossGPUBatchNorm(1, algorithm=algorithm)
        y = layer(x2)
        y.backward(dy)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(x2.grad, x1.grad)
    torch.testing.assert_close(layer.running_mean, plain.running_mean / (1 - 0.9**2) * 0.1)
    assert 1e-3 < layer.running_var - 0.9 < 1 and layer.num_batches_skipped == 0


# --- gradients -----------------------------------------------------------------------------------


def run_finite_differences(rank, shapes):
    xs, dys = make_inputs(shapes)
    x, w = xs[rank].requires_grad_(), dys[rank]
    layer = CrossGPUBatchNorm(x.shape[1], EPS).double()
    layer.weight.data, layer.bias.data = affine(x.shape[1])

    def joint_loss():
        """Returns a loss that is summed over the ranks and not linear in y."""
        loss = (layer(x).pow(3) * w).sum()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return loss, total

    joint_loss()[0].backward()
    dist.all_reduce(layer.weight.grad), dist.all_reduce(layer.bias.grad)
    # Every rank takes part in every difference. γ and β move on all, x on its owner alone.
    for tensor, owner in ((layer.weight, None), (layer.bias, None), (x, 0), (x, 1)):
        moves = owner in (None, rank)
        for i in range(tensor.numel() if owner is None else xs[owner].numel()):
            losses = []
            for step in (1e-5, -2e-5, 1e-5):  # up, down past the start, and back
                if moves:
                    tensor.data.view(-1)[i] += step
                losses.append(joint_loss()[1])
            if moves:
                numeric = (losses[0] - losses[1]) / 2e-5
                torch.testing.assert_close(tensor.grad.view(-1)[i], numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shapes", [[(2, 2, 2, 1), (1, 2, 3, 1)], [(3, 2), (0, 2)]])
def test_gradients_by_finite_differences_over_two_ranks(pool2, shapes):
    pool2.run(run_finite_differences, shapes)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_gamma_and_beta(pool2, frozen):
    xs, dys = make_inputs([(2, 5, 4, 3), (3, 5, 4, 3)])
    reference = pooled_reference(xs, dys, steps=1)
    for rank, result in enumerate(pool2.run(run_frozen, xs, dys, frozen)):
        torch.testing.assert_close(result.pop("dx"), reference["dx"][rank], rtol=1e-10, atol=1e-10)
        assert {name for name, grad in result.items() if grad is None} == set(frozen)


def run_frozen(rank, xs, dys, frozen):
    layer = CrossGPUBatchNorm(5, EPS, MOMENTUM).double()
    layer.weight.data, layer.bias.data = affine(5)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x = xs[rank].requires_grad_()
    layer(x).backward(dys[rank])
    return {"dx": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def run_first_layer(rank, xs, dys, with_gradient):
    layer = CrossGPUBatchNorm(5, EPS, MOMENTUM).double()
    layer.weight.data, layer.bias.data = affine(5)
    x = xs[rank].requires_grad_(rank in with_gradient)
    layer(x).backward(dys[rank])
    return layer.weight.grad, layer.bias.grad, x.grad


@pytest.mark.parametrize("with_gradient", [(), (1,)])
def test_first_layer_without_an_input_gradient(pool2, with_gradient):
    # One rank alone may have one: it still needs the sums of the other.
    xs, dys = make_inputs([(2, 5, 4, 3), (3, 5, 4, 3)])
    reference = pooled_reference(xs, dys, steps=1)
    results = pool2.run(run_first_layer, xs, dys, with_gradient)
    for i, key in enumerate(("dweight", "dbias")):
        total = results[0][i] + results[1][i]
        torch.testing.assert_close(total, reference[key], rtol=1e-10, atol=1e-10)
    for rank in range(2):
        if rank in with_gradient:
            torch.testing.assert_close(results[rank][2], reference["dx"][rank])
        else:
            assert results[rank][2] is None


# --- shapes and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 63, 64, 65, 257, 2048])
def test_channels(pool2, channels):
    xs, dys = make_inputs([(2, channels, 3, 2), (1, channels, 2, 5)], torch.float32)
    # Channels of one scale: make_inputs moves channel c to 3 c, which is another test's subject.
    xs = [x - 3 * torch.arange(channels).view(1, -1, 1, 1) for x in xs]
    reference = pooled_reference(xs, dys)
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        results = pool2.run(run_layer, xs, dys, "one_reduce", None, layout)
        assert_equals_pooled(results, reference, *TOLERANCES[torch.float32])


def run_algorithms(rank, xs, dys):
    return [run_once(rank, xs, dys, 1e-5, algorithm) for algorithm in ALGORITHMS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_one_reduce_is_two_pass(pool2, dtype):
    xs, dys = make_inputs([(3, 5, 4, 3), (1, 5, 2, 2)], dtype)
    for one, two in pool2.run(run_algorithms, xs, dys):
        for key, value in one.items():
            ulps = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
            torch.testing.assert_close(value, two[key], **ulps)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=CHANNELS_LAST),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels cut": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
}


def run_layouts(rank, xs, dys, of_x, of_dy):
    x = xs[rank].clone().requires_grad_()
    layer = CrossGPUBatchNorm(5, EPS, MOMENTUM).double()
    layer.weight.data, layer.bias.data = affine(5)
    layer(LAYOUTS[of_x](x)).backward(LAYOUTS[of_dy](dys[rank]))
    return x.grad, layer.weight.grad, layer.running_var


@pytest.mark.parametrize("of_x", LAYOUTS)
def test_non_contiguous_inputs_and_gradients(pool2, of_x):
    # Rank 0 has more values than are added up in one go.
    xs, dys = make_inputs([(2, 5, 64, 48), (3, 5, 2, 3)])
    reference = pooled_reference(xs, dys, steps=1)
    for of_dy in LAYOUTS:
        results = pool2.run(run_layouts, xs, dys, of_x, of_dy)
        for rank, (dx, _, running_var) in enumerate(results):
            torch.testing.assert_close(dx, reference["dx"][rank], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(running_var, reference["running_var"])
        total = sum(result[1] for result in results)
        torch.testing.assert_close(total, reference["dweight"], rtol=1e-10, atol=1e-10)


def test_an_expanded_gradient():
    # What .sum() sends back: one value with strides of 0.
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    layer, plain = CrossGPUBatchNorm(3).double(), nn.BatchNorm2d(3).double()
    other = copy.deepcopy(x.detach()).requires_grad_()
    layer(x).sum().backward(), plain(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=1e-13)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
