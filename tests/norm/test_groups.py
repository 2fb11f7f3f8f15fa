"""Tests BN groups: BN size in images, machines, layers by name."""

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import megdet_d2
from megdet_d2.norm import groups
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.groups import ranks_per_group


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


class Branches(nn.Module):
    """Two stems, of which one may stay unused; then norms and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norm, self.conv, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 8)

    def forward(self, x, both):
        h = self.first(x) + self.second(x) if both else self.first(x)
        h = self.last(self.conv(self.norm(h).relu())).relu()
        return self.head(h.mean((2, 3))).square().mean()


def run_with_unused_parameters(rank, group):
    torch.manual_seed(0)
    if rank == 0:
        with torch.random.fork_rng():
            megdet_d2.convert_cgbn(Branches())  # of one process alone, to count its flops
    model = megdet_d2.convert_cgbn(Branches(), {"none": None, "world": dist.group.WORLD}[group])
    # Small buckets, so that the sums of gradients begin early.
    ddp = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=0.001)
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        ddp.zero_grad()
        ddp(x, both=rank == 0).backward()
    return x, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()


@pytest.mark.parametrize("group", ["none", "world"])
def test_ddp_may_sum_in_another_order_than_the_layers(pool2, group):
    """DDP sums what a rank does not use first there, and last on the others."""
    results = pool2.run(run_with_unused_parameters, group)
    torch.manual_seed(0)
    whole = Branches()
    for name, tensor in whole.state_dict().items():
        if "num" not in name and "running" not in name:
            assert torch.equal(tensor, results[0][2][name])
    # Both stems as one batch: the second one adds to the first image pair alone.
    x = torch.cat([x for x, _, _ in results])
    h = whole.first(x) + torch.cat([whole.second(x[:2]), torch.zeros(2, 8, 8, 8)])
    h = whole.last(whole.conv(whole.norm(h).relu())).relu()
    whole.head(h.mean((2, 3))).square().mean().backward()
    for _, gradients, _ in results:
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def run_world_group(rank):
    groups._world_names.clear()
    groups._cache.clear()  # a group may come from a test with another limit
    layer = CrossGPUBatchNorm(2)
    layer(torch.full((1, 2, 1, 2), float(rank)))
    name = layer._sync_name()
    assert name == CrossGPUBatchNorm(2, process_group=dist.group.WORLD)._sync_name()
    assert name != dist.group.WORLD.group_name
    group = dist.distributed_c10d._resolve_process_group(name)
    return [
        g._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for g in (group, dist.group.WORLD)
    ]


def test_the_group_of_all_is_private_and_waits_as_long_as_torchs(pool2):
    for own, torchs in pool2.run(run_world_group):
        assert own == torchs
