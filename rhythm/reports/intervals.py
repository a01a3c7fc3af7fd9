"""95 % confidence intervals of fractions and of their differences, by Wilson's score."""

from __future__ import annotations

import math

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
