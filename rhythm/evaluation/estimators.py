"""Computes pass@1, avg@n and pass@k, with 95 % intervals, from the number of right responses to each problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rhythm.reports.intervals import RESAMPLES, over_problems

INTERVAL = f"percentiles of {RESAMPLES:,} bootstrap samples; Wilson's where all problems have one value"
"""How the intervals over problems are made."""


@dataclass(frozen=True)
class Estimate:
    """A metric of a task: the mean over problems, and the 95 % interval over problems (`over_problems`)."""

    name: str
    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k responses is right: 1 − C(n − c, k) / C(n, k).

    Of n = `samples` responses, c = `correct` are right (Chen et al. 2021, eq. 1). Exact: whole numbers divided once.

    Raises ValueError for k < 1, k > n, and c outside 0 … n.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct is {correct}: must be from 0 to samples = {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}: must be from 1 to samples = {samples}")
    total = math.comb(samples, k)
    return (total - math.comb(samples - correct, k)) / total


def usual_k(samples: int) -> tuple[int, ...]:
    """1, 2, 4, … below `samples`, and `samples`."""
    return (*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples)


def estimates(correct: Sequence[int], samples: int, ks: Sequence[int]) -> list[Estimate]:
    """pass@k for each k, and avg@n, the share of right responses among n = `samples`.

    avg@n is what pass@1 estimates, too: 1 − (n − c) / n = c / n. Both are listed, by the names that papers use.

    Args:
        correct: of each problem, how many of its n responses are right; without problems the values are NaN.
    """
    per_problem = {f"pass@{k}": [pass_at_k(samples, c, k) for c in correct] for k in sorted({1, *ks})}
    per_problem[f"avg@{samples}"] = [c / samples for c in correct]
    return [
        Estimate(name, math.fsum(values) / len(values) if values else math.nan, *over_problems(values))
        for name, values in per_problem.items()
    ]
