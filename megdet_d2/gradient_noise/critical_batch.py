"""Finds the local critical batch: the largest one whose loss is not worse for equal images.

Branches start from one checkpoint, with its mini-batch B and learning rate r. Branch k trains with
mini-batches of kB images, at the learning rate that a scaling rule gives (k r, √k r or r). All see
the same images. With L_k the smoothed loss at the end, k is not worse if

    mean over seeds of L_k / L_1 - 1  <=  tolerance,

and the critical batch is kB for the largest k up to which all factors are not worse. After Merrill
et al., 2025, "Critical Batch Size Revisited" (arXiv:2505.23971), who measure language models.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

try:
    from scipy import stats
except ImportError as error:
    raise ImportError('The critical batch needs scipy: run  pip install -e ".[demo]"') from error


@dataclass(frozen=True)
class Branch:
    """A branch that has ended.

    Attributes:
        factor: k.
        rule: the scaling rule of its learning rate; "" for k = 1, where all rules agree.
        seed: decides the order of the images and their augmentation.
        batch_size: kB, in images.
        lr: its learning rate, of the optimizer's first parameter group.
        iterations: its updates.
        losses: on the fixed images, at each point of its second half.
        reason: why it has diverged; "" if it has not.
    """

    factor: int
    rule: str
    seed: int
    batch_size: int
    lr: float
    iterations: int
    losses: tuple[float, ...]
    reason: str = ""

    @property
    def loss(self) -> float:
        """The loss L_k, which is the mean of ``losses``; infinite for a diverged branch."""
        return math.inf if self.reason else statistics.fmean(self.losses)


@dataclass(frozen=True)
class Comparison:
    """The branches of one factor and rule against those of k = 1, seed by seed.

    Attributes:
        factor, batch_size, lr: as in ``Branch``.
        seeds: number of pairs.
        loss: mean of L_k.
        difference: mean of L_k / L_1 - 1.
        low, high: its t-interval of 95 %; not a number for one seed or a diverged branch.
    """

    factor: int
    batch_size: int
    lr: float
    seeds: int
    loss: float
    difference: float
    low: float
    high: float

    def is_worse(self, tolerance: float) -> bool:
        """Returns True if the mean difference is above ``tolerance``."""
        return self.difference > tolerance

    def is_decided(self, tolerance: float) -> bool:
        """Returns True if the interval has all of its values on one side of ``tolerance``."""
        if math.isinf(self.difference):
            return True
        return self.high <= tolerance or self.low > tolerance


def compare_branches(branches: Sequence[Branch], rule: str) -> list[Comparison]:
    """Returns the comparison of each factor, smallest first; that of k = 1 is zero.

    Args:
        branches: of one checkpoint. Those of other rules are left out.
        rule: a scaling rule of the learning rate.

    Raises:
        ValueError: a seed has no branch of k = 1, or that one has diverged.
    """
    base = {branch.seed: branch for branch in branches if branch.factor == 1}
    found = [branch for branch in branches if branch.factor == 1 or branch.rule == rule]
    compared = []
    for factor in sorted({branch.factor for branch in found}):
        of_factor = [branch for branch in found if branch.factor == factor]
        for branch in of_factor:
            if branch.seed not in base or base[branch.seed].reason:
                reason = base[branch.seed].reason if branch.seed in base else "there is none"
                raise ValueError(
                    f"the branch of factor 1 and seed {branch.seed} is what others are compared "
                    f"with: {reason}; give an earlier checkpoint, or one of a stable training"
                )
        differences = [branch.loss / base[branch.seed].loss - 1 for branch in of_factor]
        mean, half = statistics.fmean(differences), math.nan
        if len(differences) > 1 and math.isfinite(mean):
            quantile = stats.t.ppf(0.975, len(differences) - 1)
            half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
        compared.append(
            Comparison(
                factor,
                of_factor[0].batch_size,
                of_factor[0].lr,
                len(of_factor),
                statistics.fmean(branch.loss for branch in of_factor),
                mean,
                mean - half,
                mean + half,
            )
        )
    return compared


def find_critical(compared: Sequence[Comparison], tolerance: float) -> tuple[int, bool]:
    """Returns the critical batch in images, and whether a larger factor was worse.

    If none was, the critical batch is at least the returned one. A factor that is not worse above
    one that is worse does not count: with few seeds it may be so by chance.

    Args:
        compared: from ``compare_branches``.
        tolerance: largest relative difference of the loss that is not worse.
    """
    critical = compared[0].batch_size
    for comparison in compared:
        if comparison.is_worse(tolerance):
            return critical, True
        critical = comparison.batch_size
    return critical, False
