"""Checks the error of processes in different layers: on each, with names, in the first call."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import megdet_d2
from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import collective
from megdet_d2.norm.collective import OutOfStepError
from tests.helpers.collectives import counted_all_reduces


def make_model(channels, algorithm):
    """Builds the layers stem, res and head, 1×1 convolutions with norms of the given widths."""
    parts, width = {}, 3
    for name, c in zip(("stem", "res", "head"), channels, strict=True):
        parts[name] = nn.Sequential(
            nn.Conv2d(width, c, 1), CrossGPUBatchNorm(c, algorithm=algorithm)
        )
        width = c
    model = nn.ModuleDict(parts)
    return megdet_d2.set_bn_size(model, -1, 2)


def run_path(rank, channels, algorithm, paths):
    """Runs this rank's path through the layers, forward and backward."""
    model = make_model(channels, algorithm)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    try:
        for name in paths[rank]:
            x = model[name](x)
        x.square().sum().backward()
    except OutOfStepError as error:
        return str(error)
    return None


SKIP_FIRST, SKIP_RES, SKIP_LAST = ("res", "head"), ("stem", "head"), ("stem", "res")
ALL, SWAPPED = ("stem", "res", "head"), ("stem", "head", "res")


@pytest.mark.parametrize("algorithm", ["one_reduce", "two_pass"])
@pytest.mark.parametrize(
    "channels, path, here, there",
    [
        ((3, 3, 3), SKIP_FIRST, "stem.1, forward", "res.1, forward"),
        ((3, 3, 3), SKIP_RES, "res.1, forward", "head.1, forward"),
        ((3, 3, 3), SKIP_LAST, "head.1, forward", "res.1, backward"),
        ((3, 3, 3), SWAPPED, "res.1, forward", "head.1, forward"),
        ((3, 3, 70), SKIP_RES, "res.1, forward", "head.1, forward"),
        ((3, 70, 3), SKIP_LAST, "head.1, forward", "res.1, backward"),
    ],
)
def test_a_skipped_or_swapped_layer_is_named_on_every_rank(
    pool2, channels, path, here, there, algorithm
):
    for message in pool2.run(run_path, channels, algorithm, (ALL, path), timeout=20):
        assert f"rank 0: {here}; rank 1: {there}" in message
    # and the next step is not disturbed
    assert pool2.run(run_path, channels, algorithm, (ALL, ALL)) == [None, None]


def run_absent(rank):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    layer = CrossGPUBatchNorm(4, process_group=group)
    layer.name = "neck.norm"
    if rank == 1:
        return None
    with pytest.raises(OutOfStepError, match="CGBN layer neck.norm, forward: the all-reduce over"):
        layer(torch.randn(2, 4, 2, 2))


def test_a_timeout_names_the_layer(pool2):
    pool2.run(run_absent, timeout=30)


def run_lengths(rank):
    with counted_all_reduces() as lengths:
        for channels in (1, 3, 64, 2048):
            for algorithm in ("one_reduce", "two_pass"):
                layer = CrossGPUBatchNorm(channels, algorithm=algorithm)
                layer(torch.randn(2, channels, 2, 2)).sum().backward()
    return lengths


def test_every_message_has_one_length(pool2, pool4):
    lengths = {length for pool in (pool2, pool4) for run in pool.run(run_lengths) for length in run}
    assert lengths == {2 * collective.ROOM + 3}


def test_wider_layers_get_room(pool2):
    pool2.run(run_wide)


def run_wide(rank):
    layer = CrossGPUBatchNorm(5000)
    x = torch.full((1, 5000, 1, 2), float(rank))
    layer(x)
    torch.testing.assert_close(layer.running_mean, torch.full((5000,), 0.05))


def test_names_come_from_the_model():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
    megdet_d2.convert_cgbn(model)
    assert model[1][0].name == "1.0"
    assert CrossGPUBatchNorm(3).name == "unnamed (3 channels)"


def test_what_cuda_layers_noticed_is_raised_once(monkeypatch):
    monkeypatch.setitem(collective._mismatch, "fine", torch.tensor(False))
    monkeypatch.setitem(collective._mismatch, "mixed", torch.tensor(True))
    with pytest.raises(OutOfStepError, match="in different layers"):
        collective.raise_if_out_of_step()
    collective.raise_if_out_of_step()
