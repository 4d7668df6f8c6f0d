"""95 % intervals of figures and of the differences between two models, with Student's t.

A difference is always B - A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seriatim.evaluation.metrics import Figure, Spread

LEVEL = 0.95  # share of intervals that hold the true value
POWER_QUANTILE = 0.8416  # of the normal distribution at 0.8: a difference is told four times out of five


class Interval(NamedTuple):
    """A value with the half width of its interval and the degrees of freedom of its error."""

    value: float
    half: float
    degrees: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.value) > self.half


def student(degrees: float) -> float:
    """How many standard errors the half width of an interval has."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def of_figure(figure: Figure) -> Interval:
    """The interval of a figure over samples of one model."""
    degrees = spread_of(figure).degrees
    return Interval(figure.value, student(degrees) * figure.error, degrees)


def paired(a: Figure, b: Figure) -> Interval:
    """The interval of b - a, of which group g holds samples from the same labels and seeds in both.

    What the two groups share cancels, because the error is that of the differences of the groups.
    """
    difference = paired_spread(a, b)
    return Interval(b.value - a.value, student(difference.degrees) * difference.error, difference.degrees)


def paired_spread(a: Figure, b: Figure) -> Spread:
    x, y = spread_of(a), spread_of(b)
    assert (len(x.values), x.scale, x.degrees) == (len(y.values), y.scale, y.degrees), "equally many samples of both"
    return Spread(tuple(v - u for u, v in zip(x.values, y.values, strict=True)), x.scale, x.degrees)


def spread_of(figure: Figure) -> Spread:
    assert figure.spread is not None, "figures of samples have a spread"
    return figure.spread


def of_runs(values: Sequence[float]) -> Interval:
    """The interval of the mean over runs, which are at least two."""
    x = np.asarray(values, dtype=np.float64)
    degrees = len(x) - 1
    return Interval(float(x.mean()), student(degrees) * float(x.std(ddof=1)) / math.sqrt(len(x)), degrees)


def welch(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The interval of the mean over runs of B less that over runs of A, at least two runs of each.

    The spreads of the two sides may differ (Welch 1947, with Satterthwaite's degrees of freedom).
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    of_x, of_y = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)  # squared errors of the means
    squared = of_x + of_y
    degrees = float(min(len(x), len(y)) - 1)
    if squared > 0:
        p, q = of_x / squared, of_y / squared
        degrees = 1 / (p * p / (len(x) - 1) + q * q / (len(y) - 1))
    return Interval(float(y.mean() - x.mean()), student(degrees) * math.sqrt(squared), degrees)


def between_runs(a: Sequence[Figure], b: Sequence[Figure]) -> Interval:
    """Welch's interval over runs, or that over samples where it is wider.

    Runs of which few images are counted may agree by chance, as accuracies of 100 images often do; their spread then
    says less than the error that each pair of runs has from its samples.
    """
    over = welch([x.value for x in a], [y.value for y in b])
    spreads = [paired_spread(x, y) for x, y in zip(a, b, strict=False)]
    error = math.sqrt(sum(spread.error**2 for spread in spreads)) / len(spreads)
    degrees = sum(spread.degrees for spread in spreads)
    half = student(degrees) * error
    return over if over.half >= half else Interval(over.value, half, degrees)


def samples_to_tell(difference: Interval, num: int) -> int:
    """About how many samples tell this difference from zero four times out of five, if it is as large as it seems.

    It holds for a figure that is a mean over samples, whose error falls with the root of their number, and for a
    difference that is not zero.
    """
    z = student(math.inf)
    error = difference.half / student(difference.degrees)
    return math.ceil(num * ((z + POWER_QUANTILE) * error / difference.value) ** 2)
