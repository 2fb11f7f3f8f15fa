"""Parts of the closed form against hand calculations, exact values and torch-free arithmetic."""

import math

import numpy as np
import pytest

from megdet_d2.planner import mlperf, stragglers, topology
from megdet_d2.planner.step_time import Work, exposed_gradients, norm_latency, step_time
from megdet_d2.planner.topology import NVLINK, Topology, all_reduce, network


def test_a_small_all_reduce_is_latency():
    """By hand: 6.8 + 2 · 7 · 0.6 = 15.2 µs in a machine, and 2 · log2(128) · 5 = 70 µs more."""
    size = 2048
    inside = all_reduce(Topology(1, 8, NVLINK), size)
    assert inside == pytest.approx(15.2e-6 + 2 * 7 / 8 * size / 240e9)
    across = all_reduce(Topology(128, 8, NVLINK, network(1600)), size)
    assert across == pytest.approx(85.2e-6 + 2 * 1023 / 1024 * size / 160e9)


def test_a_large_all_reduce_is_bandwidth_of_the_slower_link():
    size = 1e9
    slow = all_reduce(Topology(2, 4, NVLINK, network(100)), size)
    assert slow == pytest.approx(2 * 7 / 8 * size / (0.8 * 12.5e9), rel=1e-3)
    fast = all_reduce(Topology(2, 4, NVLINK, network(100_000)), size)
    assert fast == pytest.approx(2 * 7 / 8 * size / (0.8 * 300e9), rel=1e-2)
    assert all_reduce(Topology(1, 1), size) == 0


def test_a_group_spans_parts_of_a_machine_or_whole_machines():
    cluster = Topology(6, 8)
    assert (cluster.group(4).machines, cluster.group(4).gpus) == (1, 4)
    assert (cluster.group(24).machines, cluster.group(24).gpus) == (3, 8)
    for ranks in (3, 12, 32):
        with pytest.raises(ValueError, match=f"groups of {ranks} ranks"):
            cluster.group(ranks)


def test_moments_of_a_maximum():
    """Of 2: mean 1/√π, variance 1 - 1/π; of 3: mean 3 / (2 √π)."""
    mean, deviation = stragglers.maximum_moments(2)
    assert mean == pytest.approx(1 / math.sqrt(math.pi), abs=1e-4)
    assert deviation**2 == pytest.approx(1 - 1 / math.pi, abs=1e-4)
    assert stragglers.maximum_moments(3)[0] == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-4)
    assert stragglers.maximum_moments(1) == pytest.approx((0, 1), abs=1e-4)
    drawn = np.random.default_rng(0).standard_normal((4000, 256)).max(1)
    assert stragglers.maximum_moments(256) == pytest.approx((drawn.mean(), drawn.std()), rel=0.02)


def test_groups_that_do_not_meet_wait_once():
    """With groups of one rank the k micro-batches are one of k b images."""
    alone = stragglers.grouped_waiting(2, 4, 1, 64, 0.3)
    assert alone == pytest.approx(stragglers.waiting(8, 64, 0.3), rel=1e-4)
    meeting = stragglers.grouped_waiting(2, 4, 8, 8, 0.3)
    assert meeting > 1.3 * alone
    # In one micro-batch it makes little difference who waits first.
    once = stragglers.grouped_waiting(2, 1, 8, 8, 0.3)
    assert once == pytest.approx(stragglers.waiting(2, 64, 0.3), rel=0.03)


@pytest.mark.parametrize("variation", [None, 0.3])
@pytest.mark.parametrize("masks", [True, False])
def test_image_costs_have_the_moments_that_they_claim(masks, variation):
    cost = stragglers.ImageCost(variation, masks)
    drawn = cost.sample(np.random.default_rng(0), 100, 1000)
    assert drawn.mean() == pytest.approx(1, abs=0.005)
    assert drawn.std() == pytest.approx(variation or cost.explained, rel=0.02)
    assert drawn.min() > 0


def test_objects_are_like_published_ones():
    """COCO: 7.3 per image on average, 99 % of images with at most 33."""
    objects = np.random.default_rng(0).geometric(1 / stragglers.MEAN_OBJECTS, 100_000)
    assert objects.mean() == pytest.approx(7.33, abs=0.1)
    assert np.quantile(objects, 0.99) == pytest.approx(33, abs=1.5)


def test_the_update_of_one_gpu_is_its_compute():
    step = step_time(Work(0.01, 4, variation=0.3), Topology(1, 1))
    assert step.total == pytest.approx(0.04) and step.compute == step.total


def test_an_update_by_hand():
    """8 GPUs, 2 images, 50 layers: 20 ms, 0.3 √2 1.423 10 ms, 100 · 15.2 µs, one bucket, 3 ms."""
    work = Work(0.01, 2, 1, 0.3, 80e6, layers=50, group=8, host=0.003)
    step = step_time(work, Topology(1, 8))
    assert step.compute == pytest.approx(0.020)
    assert step.stragglers == pytest.approx(0.3 * 2**0.5 * 1.4236 * 0.01, rel=1e-3)
    assert step.norm == pytest.approx(100 * 15.2e-6, rel=2e-3)
    bucket = 8.4e-6 + 14 * 4e-6 + 2 * 7 / 8 * 25e6 / 240e9
    assert step.gradients == pytest.approx(bucket)
    parts = (step.compute, step.stragglers, step.norm, step.gradients, 0.003)
    assert step.total == pytest.approx(sum(parts)) and step.loader == 0


def test_micro_batches_repeat_compute_and_norm_but_not_the_gradients():
    work = Work(0.01, 2, 1, 0.0, 80e6, layers=50, group=8)
    one, four = (
        step_time(Work(**{**vars(work), "micro_batches": k}), Topology(4, 8)) for k in (1, 4)
    )
    assert four.compute == pytest.approx(4 * one.compute)
    assert four.norm == pytest.approx(4 * one.norm) and one.norm > 0
    assert four.gradients == one.gradients > 0


def test_backward_hides_all_buckets_but_the_last():
    cluster = Topology(2, 8, NVLINK, network(10))  # 1 GB/s: 25 MB take 47 ms, 75 MB 141 ms
    last = all_reduce(cluster, 25e6)
    assert exposed_gradients(100e6, cluster, 10.0) == pytest.approx(last)
    rest = all_reduce(cluster, 75e6)
    assert exposed_gradients(100e6, cluster, 0.03) == pytest.approx(last + rest - 0.02)
    assert exposed_gradients(0, cluster, 1.0) == 0


def test_a_slow_loader_decides():
    fast = step_time(Work(0.01, 4), Topology(1, 8))
    slow = step_time(Work(0.01, 4, loader=50), Topology(1, 8))
    assert fast.total == pytest.approx(0.04) and slow.total == pytest.approx(0.08)
    assert slow.loader == pytest.approx(0.04)


def test_norm_across_machines_is_latency_in_series():
    work = Work(0.01, 2, layers=50, group=8)
    inside = norm_latency(work, Topology(128, 8))
    everywhere = norm_latency(Work(0.01, 2, layers=50, group=1024), Topology(128, 8))
    assert everywhere - inside == pytest.approx(100 * 2 * 7 * topology.network(1).small, rel=1e-2)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="numbers above 0"):
        Work(0.0, 2)
    with pytest.raises(ValueError, match="takes layers"):
        Work(0.1, 2, group=8)
    with pytest.raises(ValueError, match="loader decodes 0"):
        Work(0.1, 2, loader=0.0)
    with pytest.raises(ValueError, match="0 machines"):
        Topology(0, 8)


def test_the_fit_finds_the_variation_and_c_that_made_the_rows():
    """Systems whose updates follow the model exactly."""
    rows = []
    for gpus, images, c in (
        (8, 12, 0.01),
        (4, 24, 0.01),
        (10, 10, 0.01),
        (8, 6, 0.02),
        (4, 12, 0.02),
    ):
        system = mlperf.System(
            "v1.0", "x", "x", f"SXM {c}", 1, gpus, gpus * images, gpus, None, 1.0
        )
        seconds = step_time(mlperf.work_of(system, c, 0.4), system.topology).total
        rows.append(mlperf.System(**{**vars(system), "images_per_s": system.batch / seconds}))
    best, low, high = mlperf.fit_variation(rows)
    assert best == pytest.approx(0.4, abs=0.011) and low <= best <= high
    assert mlperf.compute_seconds(rows[0], 0.4) == pytest.approx(0.01, rel=1e-3)
