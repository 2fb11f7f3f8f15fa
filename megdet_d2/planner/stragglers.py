"""Computes how long P ranks wait for the slowest of them, because no two images cost the same.

A rank draws b images, of mean cost c seconds and coefficient of variation v. Its time has the mean
c b and the standard deviation c v √b. All wait for the slowest of P:

    E[slowest] = c b + c v √b · m(P),

with m(P) the expected maximum of P standard normal variables: 1.42 of 8, 2.83 of 256.
"""

import functools
from dataclasses import dataclass

import numpy as np

MEAN_OBJECTS = 860_001 / 117_266
"""Objects per image of COCO train2017, of images that have any. Their number is taken as geometric:
99 % of images then have at most 32 objects (published: 33, with a median of 4; here it is 5)."""

# Height / width against its share; 90 % lie between 0.6 and 1.5. A rounded table, an assumption.
ASPECTS = {0.75: 0.45, 1.333: 0.15, 0.667: 0.25, 1.5: 0.08, 1.0: 0.04, 0.5625: 0.03}
# Positive RoIs per object, up to 25 % of 512: an assumption.
POSITIVES_PER_OBJECT, MOST_POSITIVES = 12, 128
# Multiply-adds of Mask R-CNN R50-FPN, in 1e9: per megapixel in backbone 82, FPN 57 and RPN 49, per
# image in the box head with its 512 RoIs, per positive RoI in the mask head.
GMAC_PER_MEGAPIXEL, GMAC_OF_BOX_HEAD, GMAC_PER_MASK = 188.0, 7.1, 0.53


@functools.cache
def maximum_moments(ranks: int) -> tuple[float, float]:
    """Returns mean m(P) and standard deviation of the maximum of P standard normal variables.

    Both by numerical integration of P φ(x) Φ(x)^(P-1), to 1e-4.
    """
    x = np.linspace(-9, 9, 20_001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    distribution = np.clip((np.cumsum(density) - density / 2) * (x[1] - x[0]), 0, 1)
    weight = ranks * density * distribution ** (ranks - 1)
    weight /= weight.sum()
    mean = float((x * weight).sum())
    return mean, float(np.sqrt(((x - mean) ** 2 * weight).sum()))


def waiting(images: float, ranks: int, variation: float) -> float:
    """Returns the time that all wait for the slowest rank, in units of c: v √b · m(P).

    Args:
        images: b, images that a rank computes between two meetings.
        ranks: P.
        variation: v of one image.
    """
    return variation * images**0.5 * maximum_moments(ranks)[0]


def grouped_waiting(
    images: float, micro_batches: int, group: int, groups: int, variation: float
) -> float:
    """Returns the waiting time where groups of ranks meet in every micro-batch, in units of c.

    CGBN lets the ranks of a BN group wait for each other in every micro-batch, and all ranks wait
    once for the gradients. With m and s the moments of a maximum:

        k v √b m(group) + √k v √b s(group) · m(groups)

    Args:
        images: b, images of a rank in one micro-batch.
        micro_batches: k.
        group: ranks of a BN group; with 1 this is v √(k b) m(groups).
        groups: number of BN groups.
        variation: v of one image.
    """
    mean, deviation = maximum_moments(group)
    slowest = maximum_moments(groups)[0]
    return (
        variation * images**0.5 * (micro_batches * mean + micro_batches**0.5 * deviation * slowest)
    )


@dataclass(frozen=True)
class ImageCost:
    """The distribution of the cost of one image, with mean 1.

    Sizes and objects are like COCO's: short side 800, long side at most 1,333. What they do not
    explain of ``variation`` is a gamma distribution without a cause.

    Attributes:
        variation: v of one image. None: sizes and objects alone.
        masks: the model has a mask head.
    """

    variation: float | None = None
    masks: bool = True

    def sample(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Returns costs of images of this shape, in units of the mean."""
        aspects = np.array(list(ASPECTS))
        ratio = rng.choice(aspects, shape, p=list(ASPECTS.values()))
        ratio = np.maximum(ratio, 1 / ratio)
        megapixels = np.minimum(800.0, 1333 / ratio) ** 2 * ratio / 1e6
        cost = GMAC_OF_BOX_HEAD + GMAC_PER_MEGAPIXEL * megapixels
        if self.masks:
            objects = rng.geometric(1 / MEAN_OBJECTS, shape)
            positives = np.minimum(POSITIVES_PER_OBJECT * objects, MOST_POSITIVES)
            cost = cost + GMAC_PER_MASK * positives
        cost = cost / self._mean()
        rest = (self.variation or 0) ** 2 - self.explained**2
        if rest > 0:
            # E[(cost · jitter)²] = (1 + e²)(1 + j²), so j² = (v² - e²) / (1 + e²).
            jitter = rest / (1 + self.explained**2)
            cost = cost * rng.gamma(1 / jitter, jitter, shape)
        return cost

    @property
    def explained(self) -> float:
        """The coefficient of variation by sizes and objects alone."""
        return _moments(self.masks)[1]

    def _mean(self) -> float:
        return _moments(self.masks)[0]


@functools.cache
def _moments(masks: bool) -> tuple[float, float]:
    """Returns mean (1e9 multiply-adds) and coefficient of variation of the exact distribution."""
    ratio = np.maximum(list(ASPECTS), 1 / np.array(list(ASPECTS)))
    share = np.array(list(ASPECTS.values()))
    pixels = GMAC_PER_MEGAPIXEL * np.minimum(800.0, 1333 / ratio) ** 2 * ratio / 1e6
    mean = float((share * pixels).sum())
    variance = float((share * (pixels - mean) ** 2).sum())
    if masks:
        objects = np.arange(1, 400)
        chance = (1 - 1 / MEAN_OBJECTS) ** (objects - 1) / MEAN_OBJECTS
        cost = GMAC_PER_MASK * np.minimum(POSITIVES_PER_OBJECT * objects, MOST_POSITIVES)
        of_masks = float((chance * cost).sum())
        mean, variance = mean + of_masks, variance + float((chance * (cost - of_masks) ** 2).sum())
    mean += GMAC_OF_BOX_HEAD
    return mean, variance**0.5 / mean
