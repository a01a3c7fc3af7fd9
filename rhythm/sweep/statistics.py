"""Compares each method of a sweep with the baseline: differences paired by seed, intervals, p-values, power."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student

from rhythm.reports.intervals import over_seeds

RESAMPLES = 10_000
EXACT_UP_TO = 16  # seeds; 2^16 sign flips
ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Difference:
    """A method against the baseline on one measure (accuracies, so all but p-values are shares).

    mean: of the differences of the same seed; t: Student's 95 % interval; bootstrap: 2.5th and 97.5th percentile over
    resampled seeds. p: two-sided, of a sign-flip permutation test; least_p: the smallest that so many seeds can give.
    holm: p corrected for the number of methods compared. detectable: the true difference that a paired t-test at 5 %
    would find in 80 % of such experiments, at these differences' standard deviation. NaN with fewer than two seeds.
    """

    method: str
    seeds: tuple[int, ...]
    mean: float
    t: tuple[float, float]
    bootstrap: tuple[float, float]
    p: float
    least_p: float
    holm: float
    detectable: float


def differences(values: Mapping[str, Mapping[int, float]], baseline: str) -> list[Difference]:
    """Differences of all other methods, in their order, to `baseline`, over the seeds that both have.

    Args:
        values: method → seed → value.

    Raises ValueError: the baseline is not among the methods.
    """
    if baseline not in values:
        raise ValueError(f"baseline is {baseline!r}: must be one of {', '.join(values)}")
    base = values[baseline]
    found = []
    for method, by_seed in values.items():
        if method == baseline:
            continue
        seeds = tuple(sorted(by_seed.keys() & base.keys()))
        paired = [by_seed[seed] - base[seed] for seed in seeds]
        found.append(
            Difference(
                method,
                seeds,
                mean=math.fsum(paired) / len(paired) if paired else math.nan,
                t=over_seeds(paired),
                bootstrap=bootstrap(paired),
                p=sign_flip(paired),
                least_p=2.0 ** (1 - len(paired)) if paired else math.nan,
                holm=math.nan,
                detectable=detectable(paired),
            )
        )
    corrected = holm([difference.p for difference in found])
    return [replace(difference, holm=p) for difference, p in zip(found, corrected, strict=True)]


def bootstrap(paired: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the mean over resampled seeds, drawn by a fixed seed; (NaN, NaN) for fewer than two."""
    if len(paired) < 2:
        return math.nan, math.nan
    values = np.asarray(paired, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def sign_flip(paired: Sequence[float]) -> float:
    """Two-sided p: the share of sign patterns whose mean is at least as far from 0 as that seen. All of them up to
    `EXACT_UP_TO` values, so that p is at least 2^(1 − n); beyond that `RESAMPLES` random ones and the one seen.
    """
    n = len(paired)
    if n < 2:
        return math.nan
    values = np.asarray(paired, dtype=np.float64)
    if n <= EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        drawn = np.random.default_rng(0).integers(2, size=(RESAMPLES, n))
        signs = np.concatenate([np.ones((1, n)), 1 - 2 * drawn])
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12 * np.abs(values).sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the family-wise error stays below the level whatever the dependence. NaN stays."""
    corrected = [math.nan] * len(ps)
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


def detectable(paired: Sequence[float]) -> float:
    """The difference that a two-sided paired t-test of these many seeds at 5 % has 80 % power for, if the differences'
    true standard deviation is that of the sample. NaN for fewer than two, 0 where all are equal.
    """
    n = len(paired)
    if n < 2:
        return math.nan
    deviation = float(np.std(paired, ddof=1))
    critical = student.ppf(1 - ALPHA / 2, n - 1)

    def missing(noncentrality: float) -> float:
        """The chance of a significant difference of the other sign is left out: below 1e-4 at this power."""
        return float(nct.sf(critical, n - 1, noncentrality)) - POWER

    enough = 1.0
    while missing(enough) < 0:  # nct fails far beyond
        enough *= 2
    return float(brentq(missing, 0.0, enough)) * deviation / math.sqrt(n)


def area_under_curve(steps: Sequence[float], accuracies: Sequence[float]) -> float:
    """Mean accuracy over the steps, by trapezoids: the speed of learning. NaN for fewer than two evaluations."""
    if len(steps) < 2:
        return math.nan
    return float(np.trapezoid(accuracies, steps) / (steps[-1] - steps[0]))
