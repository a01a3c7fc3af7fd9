"""95 % intervals: of shares and their differences by Wilson's score, of means over problems by the bootstrap, of means
over seeds by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

RESAMPLES = 10_000
Z = 1.959963984540054  # the normal distribution's 97.5th percentile


def wilson(share: float, count: float) -> tuple[float, float]:
    """Interval of a fraction `share` of `count` independent instances; (NaN, NaN) where either is undefined.

    Unlike share ± 1.96·√(share·(1 − share) / count), it stays within [0, 1] and has a width above 0 at 0 and at 1.
    """
    if not (math.isfinite(share) and count > 0):
        return math.nan, math.nan
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2) / (1 + Z * Z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(before: float, after: float, count_before: float, count_after: float) -> tuple[float, float]:
    """Interval of after − before, from the Wilson intervals of both (Newcombe 1998, method 10).

    It assumes that the two are independent. Evaluations of one run use the same instances, which usually makes the true
    interval narrower than this one.
    """
    (low_before, high_before), (low_after, high_after) = wilson(before, count_before), wilson(after, count_after)
    lift = after - before
    low = lift - math.hypot(after - low_after, high_before - before)
    high = lift + math.hypot(high_after - after, before - low_before)
    return low, high


def over_problems(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Interval of the mean of one value in [0, 1] per problem: the bootstrap's 2.5th and 97.5th percentile over
    problems, drawn by a fixed seed.

    Where all problems have the same value, such as 0, resampling has no width, and the interval is Wilson's. (NaN, NaN)
    without problems.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    if min(values) == max(values):
        return wilson(values[0], n)
    # Problems of equal value are alike: how many of each are drawn is all that counts.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, size=resamples)
    low, high = np.quantile(drawn @ distinct / n, [0.025, 0.975])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean of independent values, one per seed: mean ± t(0.975, n − 1)·s/√n.

    (NaN, NaN) for fewer than two.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(student.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean - half, mean + half
