"""Tests the layer under torch.compile and selective checkpointing."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from megdet_d2._older_torch import CheckpointPolicy, create_selective_checkpoint_contexts
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm


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


def test_selective_checkpointing_updates_statistics_once():
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
