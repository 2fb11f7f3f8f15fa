"""Tests averages of running statistics over BN groups."""

from torch import nn

import megdet_d2
from megdet_d2.norm.running_statistics import average_statistics


def average_task(rank):
    model = nn.Sequential(
        megdet_d2.CrossGPUBatchNorm(2), nn.BatchNorm2d(2), megdet_d2.CrossGPUBatchNorm(3)
    )
    for layer in model:
        layer.running_mean.fill_(rank)
        layer.running_var.fill_(rank**2)
    average_statistics(model)
    for layer in (model[0], model[2]):
        assert layer.running_mean.eq(1.5).all() and layer.running_var.eq(14 / 4).all()
    assert model[1].running_mean.eq(rank).all()


def test_running_statistics_are_averaged_over_all_ranks(pool4):
    pool4.run(average_task)
