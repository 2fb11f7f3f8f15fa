"""Equivalence tests and failure rates against known answers and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from megdet_d2.ablation.equivalence import (
    assess_equivalence,
    seeds_needed,
    wilson_interval,
)


def test_p_is_the_larger_of_two_one_sided_t_tests():
    differences = [0.2, -0.3, 0.1, 0.4, -0.1, 0.0]
    result = assess_equivalence(differences, 0.5)
    above = stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.5, alternative="less").pvalue
    assert result.p == pytest.approx(max(above, below), rel=1e-12)
    interval = stats.t.interval(0.9, 5, np.mean(differences), stats.sem(differences))
    assert (result.low, result.high) == pytest.approx(interval, rel=1e-12)
    assert result.pairs == 6 and result.equal


@pytest.mark.parametrize("differences", [[1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [3.0, -3.0, 0.1]])
def test_a_gap_or_a_large_deviation_is_no_equality(differences):
    assert not assess_equivalence(differences, 0.5).equal


@pytest.mark.parametrize(
    ("differences", "answer"),
    [
        ([0.1, 0.0, 0.1], "yes"),
        ([-0.7, -0.6, -0.6], "no"),
        ([0.7, 0.6, 0.6], "no"),
        ([0.5, 0.6, 0.7], "not shown"),
        ([-1.0, 1.0, 0.0], "not shown"),
    ],
)
def test_an_answer_is_no_only_where_the_whole_interval_is_beyond(differences, answer):
    result = assess_equivalence(differences, 0.5)
    assert result.answer == answer


def test_interval_inside_the_margin_and_p_agree():
    rng = np.random.default_rng(0)
    for _ in range(200):
        differences = rng.normal(rng.uniform(-0.8, 0.8), 0.4, size=rng.integers(2, 9)).tolist()
        result = assess_equivalence(differences, 0.5)
        assert result.equal == (-0.5 < result.low and result.high < 0.5)


def test_a_true_gap_of_the_margin_passes_in_a_twentieth_of_all_studies():
    rng = np.random.default_rng(1)
    passed = [assess_equivalence(rng.normal(0.5, 0.3, 8).tolist(), 0.5).equal for _ in range(4000)]
    assert np.mean(passed) == pytest.approx(0.05, abs=0.012)


def test_one_seed_shows_nothing_and_equal_numbers_do():
    assert assess_equivalence([0.1], 0.5) is None
    assert assess_equivalence([0.25, 0.25], 0.5).equal
    assert not assess_equivalence([0.75, 0.75], 0.5).equal
    with pytest.raises(ValueError, match="--margin is 0"):
        assess_equivalence([0.1, 0.2], 0)


def test_seeds_needed_have_that_power():
    rng = np.random.default_rng(2)
    n = seeds_needed(0.6, 0.5)
    power = [
        np.mean(
            [assess_equivalence(rng.normal(0, 0.6, k).tolist(), 0.5).equal for _ in range(2000)]
        )
        for k in (n, n - 4)
    ]
    assert power[0] > 0.75 and power[1] < power[0]
    with pytest.raises(ValueError, match="more than 50 seeds"):
        seeds_needed(5.0, 0.1, most=50)


def test_wilson_interval_by_its_formula():
    for failures, n in ((0, 10), (3, 10), (6, 135), (4, 516)):
        z, p = stats.norm.ppf(0.975), failures / n
        centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        expected = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
        assert wilson_interval(failures, n) == pytest.approx(expected, abs=1e-12)
