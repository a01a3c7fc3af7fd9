"""95 % intervals by resampling responses, which are independent as their tokens are not."""

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
        sums: [n, k], what each response adds to each sum.
        statistic: sums [r, k] of r resamples → [r]; NaN where undefined, which is left out.
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
    """The statistic: one sum over another."""
    return lambda sums: np.asarray(sums[:, numerator] / sums[:, denominator])
