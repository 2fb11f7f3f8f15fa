"""The simulation against the closed form, exact expectations, and itself with the same seed."""

import math

import numpy as np
import pytest

from megdet_d2.planner.epochs import EpochModel
from megdet_d2.planner.failures import (
    Failures,
    Training,
    expected_training,
    segments,
    simulate_training,
)  # fmt: skip
from megdet_d2.planner.scaling import Setup, norm_against_compute, sweep
from megdet_d2.planner.simulation import simulate_steps
from megdet_d2.planner.step_time import Work, step_time
from megdet_d2.planner.stragglers import ImageCost
from megdet_d2.planner.topology import Topology


def simulate(work, topology, steps=200, seed=0):
    cost = ImageCost(work.variation)
    return simulate_steps(work, topology, cost, steps, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "machines, images, micro_batches, group, within",
    [
        (1, 12, 1, 1, 0.03),
        (4, 16, 1, 1, 0.03),
        (4, 4, 4, 1, 0.03),
        (4, 4, 4, 8, 0.05),
        (32, 1, 1, 1, 0.15),  # few images: the tail is longer than a normal distribution's
    ],
)
def test_it_agrees_with_the_closed_form(machines, images, micro_batches, group, within):
    work = Work(0.01, images, micro_batches, 0.3, 88e6, 50 if group > 1 else 0, group)
    topology = Topology(machines, 8)
    closed, steps = step_time(work, topology), simulate(work, topology)
    assert steps.seconds.mean() == pytest.approx(closed.total, rel=within)
    assert steps.parts.total == pytest.approx(steps.seconds.mean())
    assert steps.parts.compute == pytest.approx(closed.compute, rel=0.02)
    assert steps.parts.norm == closed.norm


def test_skewed_costs_make_the_closed_form_too_fast_at_one_image():
    work = Work(0.01, 1, variation=0.3)
    topology = Topology(128, 8)
    assert simulate(work, topology).seconds.mean() > 1.05 * step_time(work, topology).total


def test_a_slow_loader_decides_every_update():
    steps = simulate(Work(0.01, 4, variation=0.3, loader=20), Topology(1, 8))
    assert np.allclose(steps.seconds, 0.2) and steps.parts.loader > 0.1


def test_the_seed_decides_everything():
    work, topology = Work(0.01, 2, variation=0.3), Topology(2, 8)
    first, again, other = (simulate(work, topology, seed=seed).seconds for seed in (1, 1, 2))
    assert (first == again).all() and not (first == other).all()


def test_ranks_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="8 ranks do not divide into groups of 3"):
        simulate(Work(0.01, 2, layers=1, group=3), Topology(1, 8))
    with pytest.raises(ValueError, match="1.5 images"):
        simulate(Work(0.01, 1.5), Topology(1, 8))


def test_segments():
    assert segments(10, 4) == [4, 4, 2] and segments(8, 4) == [4, 4] and segments(3, 4) == [3]


def test_without_failures_a_training_is_its_updates_and_checkpoints():
    failures = Failures(math.inf, checkpoint_period=4, save=0.5)
    rng = np.random.default_rng(0)
    training = simulate_training(np.array([2.0]), 10, Topology(64, 8), failures, rng)
    assert training == Training(20.0, 1.5, 0.0, 0.0, 0)
    assert expected_training(2.0, 10, Topology(64, 8), failures) == training


def test_failures_cost_what_theory_says():
    """Means of 400 trainings, with about one failure in each, against the exact expectation."""
    topology = Topology(512, 8)
    failures = Failures(500, restart=300, checkpoint_period=461, save=5)
    rng = np.random.default_rng(0)
    runs = [simulate_training(np.array([0.5]), 5070, topology, failures, rng) for _ in range(400)]
    expected = expected_training(0.5, 5070, topology, failures)
    assert expected.failures == pytest.approx(0.76, abs=0.01)
    for part in ("lost", "restarting", "failures"):
        values = np.array([getattr(run, part) for run in runs], dtype=float)
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - getattr(expected, part)) < 3 * error
    assert runs[0].kept == pytest.approx(expected.kept) == 2535


def test_failures_that_come_faster_than_checkpoints_are_refused():
    failures = Failures(0.1, checkpoint_period=100_000)
    for simulated in (True, False):
        with pytest.raises(ValueError, match="save more often"):
            if simulated:
                rng = np.random.default_rng(0)
                simulate_training(np.array([1.0]), 10, Topology(64, 8), failures, rng)
            else:
                expected_training(1.0, 10, Topology(64, 8), failures)


SETUP = Setup(
    Work(0.01, 2, variation=0.3, gradient_bytes=88e6, layers=50, group=8),
    Topology(1, 8),
    EpochModel(10, 1000),
    Failures(math.inf),
    steps=20,
)


def test_a_batch_that_grows_takes_more_epochs():
    points, refused = sweep(SETUP, [1, 8, 512])
    assert refused == [] and [point.gpus for point in points] == [8, 64, 4096]
    assert [point.batch for point in points] == [16, 128, 8192]
    assert points[1].epochs == pytest.approx(10 * 1.128)
    assert points[1].iterations == round(10 * 1.128 * 118_000 / 128)
    for point in points:
        assert sum(point.shares.values()) == pytest.approx(1)
        assert point.shares["compute"] == pytest.approx(point.goodput, rel=0.05)
        assert point.hours == pytest.approx(point.expected_hours, rel=0.15)
    assert points[0].goodput > points[1].goodput > points[2].goodput


def test_a_target_batch_is_filled_with_micro_batches():
    setup = Setup(**{**vars(SETUP), "target_batch": 64})
    points, refused = sweep(setup, [1, 2, 3, 4, 8])
    assert [(point.gpus, point.micro_batches) for point in points] == [(8, 4), (16, 2), (32, 1)]
    assert {point.iterations for point in points} == {round(10 * 1.064 * 118_000 / 64)}
    assert [text.partition(":")[0] for text in refused] == ["3 machines", "8 machines"]


def test_checkpoints_come_once_an_epoch_unless_told_otherwise():
    point = SETUP.point(1)
    assert point.run.saving / 5 == math.ceil(point.iterations / 7375)  # 118,000 / 16
    point = Setup(**{**vars(SETUP), "checkpoint_period": 1000}).point(1)
    assert point.run.saving / 5 == math.ceil(point.iterations / 1000)


def test_the_latency_of_groups_grows_with_machines():
    rows = norm_against_compute(SETUP, 64)
    assert [group for group, _, _ in rows] == [2**power for power in range(10)]
    assert rows[0][1] == 0 and rows[3][1] == pytest.approx(100 * 15.2e-6, rel=2e-3)
    assert rows[9][1] - rows[8][1] == pytest.approx(100 * 10e-6, rel=1e-2)
