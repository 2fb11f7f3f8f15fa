"""Statistics of the table: are two rows equal, and how often does a row fail?

"256 is as accurate as 16" is a claim of equality. A test that finds no difference does not show it,
since few seeds find none either. So the hypothesis to refute is that the rows differ by the margin
or more: two one-sided t-tests (TOST, Schuirmann 1987), on differences seed by seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

ALPHA = 0.05


@dataclass(frozen=True)
class Equivalence:
    """The result of a paired TOST.

    Attributes:
        pairs: number of differences.
        mean: their mean, in AP.
        low, high: the interval of 1 - 2 ``ALPHA``, in AP. The rows are equal within the margin at
            level ``ALPHA`` where it lies between -margin and +margin.
        p: the larger of the two one-sided p-values.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def equal(self) -> bool:
        """Returns whether the differences refute a gap of the margin or more."""
        return self.p < ALPHA


def assess_equivalence(differences: Sequence[float], margin: float) -> Equivalence | None:
    """Tests whether the mean of paired differences lies within ±``margin``.

    Args:
        differences: AP of one row less AP of the other, one per seed.
        margin: AP, above 0.

    Returns:
        None for fewer than two differences, from which no deviation follows.

    Raises:
        ValueError: a margin of 0 or less.
    """
    if margin <= 0:
        raise ValueError(f"--margin is {margin}; give AP above 0")
    n = len(differences)
    if n < 2:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    error = deviation / math.sqrt(n)
    if error == 0:
        return Equivalence(n, mean, mean, mean, float(abs(mean) >= margin))
    reach = stats.t.ppf(1 - ALPHA, n - 1) * error
    above_low = stats.t.sf((mean + margin) / error, n - 1)
    below_high = stats.t.cdf((mean - margin) / error, n - 1)
    return Equivalence(n, mean, mean - reach, mean + reach, float(max(above_low, below_high)))


def seeds_needed(deviation: float, margin: float, power: float = 0.8, most: int = 1000) -> int:
    """Returns the seeds with which truly equal rows pass ``assess_equivalence``.

    Args:
        deviation: standard deviation of the paired differences, AP.
        margin: AP.
        power: probability of passing; the usual approximation by a shifted t distribution.
        most: the largest number that is tried.

    Raises:
        ValueError: more than ``most`` seeds are needed.
    """
    for n in range(2, most + 1):
        critical = stats.t.ppf(1 - ALPHA, n - 1)
        if 2 * stats.t.cdf(margin * math.sqrt(n) / deviation - critical, n - 1) - 1 >= power:
            return n
    raise ValueError(
        f"a margin of {margin} AP needs more than {most} seeds at a deviation of {deviation}"
    )


def wilson_interval(failures: int, trainings: int) -> tuple[float, float]:
    """Returns the 95 % interval (Wilson 1927) of a failure rate, as parts of 1."""
    interval = stats.binomtest(failures, trainings).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
