"""Tests whether two rows are equally accurate, and estimates how often a row fails.

"256 is as accurate as 16" claims equality. A test that finds no difference does not show equality:
with few seeds it finds no difference either. So the hypothesis to reject is that the rows differ by
a margin or more. The test is two one-sided t-tests (TOST, Schuirmann 1987) on paired differences.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

try:
    from scipy import stats
except ImportError as error:
    raise ImportError('The tests of equality need scipy: run  pip install -e ".[demo]"') from error

ALPHA = 0.05


@dataclass(frozen=True)
class Equivalence:
    """The result of a paired TOST.

    Attributes:
        pairs: number of differences.
        mean: their mean, in AP.
        low, high: the interval of level 1 - 2 ``ALPHA``, in AP. The rows are equal within the
            margin, at level ``ALPHA``, if it lies between -margin and +margin.
        p: the larger of the two one-sided p-values.
        margin: in AP.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float
    margin: float

    @property
    def equal(self) -> bool:
        """Returns True if the differences reject a gap of the margin or more."""
        return self.p < ALPHA

    @property
    def answer(self) -> str:
        """Returns "yes" if equal, "no" if all of the interval is beyond the margin, or neither."""
        if self.equal:
            return "yes"
        return "no" if self.low > self.margin or self.high < -self.margin else "not shown"


def assess_equivalence(differences: Sequence[float], margin: float) -> Equivalence | None:
    """Tests whether the mean of paired differences lies within ±``margin``.

    Args:
        differences: AP of one row minus AP of the other, one per seed.
        margin: AP, above 0.

    Returns:
        The result, or None for fewer than two differences, which have no deviation.

    Raises:
        ValueError: the margin is 0 or less.
    """
    if margin <= 0:
        raise ValueError(f"--margin is {margin}; give AP above 0")
    n = len(differences)
    if n < 2:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    error = deviation / math.sqrt(n)
    if error == 0:
        return Equivalence(n, mean, mean, mean, float(abs(mean) >= margin), margin)
    reach = stats.t.ppf(1 - ALPHA, n - 1) * error
    above_low = stats.t.sf((mean + margin) / error, n - 1)
    below_high = stats.t.cdf((mean - margin) / error, n - 1)
    p = float(max(above_low, below_high))
    return Equivalence(n, mean, mean - reach, mean + reach, p, margin)


def seeds_needed(deviation: float, margin: float, power: float = 0.8, most: int = 1000) -> int:
    """Returns the number of seeds with which rows of equal accuracy pass ``assess_equivalence``.

    Args:
        deviation: standard deviation of the paired differences, in AP.
        margin: AP.
        power: probability of passing, approximated by a shifted t distribution.
        most: the largest number to try.

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
    """Returns the 95 % interval (Wilson 1927) of a failure rate, from 0 to 1."""
    interval = stats.binomtest(failures, trainings).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
