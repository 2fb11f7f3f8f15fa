"""Tests BN groups: BN size in images, machines, layers by name."""

import pytest
import torch
from detectron2.utils import comm
from torch import nn

import megdet_d2
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
