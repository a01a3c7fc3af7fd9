"""95 % bootstrap intervals. Responses are resampled, not tokens, which are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rhythm.analysis.results import Interval

LEVEL = 0.95
ELEMENTS = 2**20  # counts held at a time
UNDEFINED = Interval(float("nan"), float("nan"))


def bootstrap(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, rng: np.random.Generator
) -> Interval:
    """Percentile interval of a statistic of sums over responses; undefined for fewer than two.

    Args:
        sums: [n, k], the contribution of each response to each sum.
        statistic: function from the sums [r, k] of r resamples to [r]; resamples where it is NaN are left out.
    """
    n = len(sums)
    if n < 2:
        return UNDEFINED
    drawn = []
    step = max(1, ELEMENTS // n)
    for start in range(0, resamples, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(statistic(counts @ sums))
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if not len(values):
        return UNDEFINED
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def ratio(numerator: int, denominator: int) -> Callable[[np.ndarray], np.ndarray]:
    """A statistic for `bootstrap`: the quotient of two sums."""
    return lambda sums: np.asarray(sums[:, numerator] / sums[:, denominator])
