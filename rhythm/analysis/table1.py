"""Computes Table 1 from the counterfactual trials of all responses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import binomtest

from rhythm.analysis.bootstrap import bootstrap, ratio
from rhythm.analysis.response import Trial
from rhythm.analysis.results import Table1

GROUPS = ("top", "bottom", "matched")


def table1(trials: Iterable[Sequence[Trial]], *, resamples: int, seed: int) -> Table1:
    """Means over all trials with a defined Jaccard index; Pr(Top < Bottom) over responses that have both groups.

    The sign test leaves out responses where top and bottom are equal.

    Args:
        trials: per response.
    """
    rows = []
    for of_response in trials:
        row: list[float] = []
        for group in GROUPS:
            defined = [t for t in of_response if t.group == group and not math.isnan(t.jaccard)]
            row += math.fsum(t.jaccard for t in defined), len(defined), sum(t.position for t in defined)
        rows.append(row)
    flat = np.array(rows, dtype=float).reshape(len(rows), 3 * len(GROUPS))
    sums = flat.reshape(len(rows), len(GROUPS), 3)  # of each group: Jaccard, trials, positions
    rng = np.random.default_rng([seed, 1])
    with np.errstate(invalid="ignore"):
        top, bottom, matched = (sums[:, :, 0] / sums[:, :, 1]).T
        means, positions = (sums[:, :, i].sum(axis=0) / sums[:, :, 1].sum(axis=0) for i in (0, 2))
    top_interval, bottom_interval, matched_interval = (
        bootstrap(flat, ratio(first, first + 1), resamples, rng) for first in range(0, 3 * len(GROUPS), 3)
    )
    top_below_bottom, p_value = _below(top, bottom)
    top_below_matched, matched_p_value = _below(top, matched)
    top_trials, bottom_trials, matched_trials = (int(count) for count in sums[:, :, 1].sum(axis=0))
    return Table1(
        top=float(means[0]),
        top_interval=top_interval,
        bottom=float(means[1]),
        bottom_interval=bottom_interval,
        top_below_bottom=top_below_bottom,
        p_value=p_value,
        problems=int((~np.isnan(top) & ~np.isnan(bottom)).sum()),
        top_trials=top_trials,
        bottom_trials=bottom_trials,
        matched=float(means[2]),
        matched_interval=matched_interval,
        top_below_matched=top_below_matched,
        matched_p_value=matched_p_value,
        matched_trials=matched_trials,
        top_position=float(positions[0]),
        bottom_position=float(positions[1]),
        matched_position=float(positions[2]),
    )


def _below(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Share of the responses with both means whose `one` is lower, and the p-value of a one-sided sign test."""
    lower, higher = int((one < other).sum()), int((one > other).sum())
    both = int((~np.isnan(one) & ~np.isnan(other)).sum())
    return (
        lower / both if both else math.nan,
        float(binomtest(lower, lower + higher, alternative="greater").pvalue) if lower + higher else math.nan,
    )
