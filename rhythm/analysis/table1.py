"""Computes Table 1 from the counterfactual trials of all responses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import binomtest

from rhythm.analysis.bootstrap import bootstrap, ratio
from rhythm.analysis.results import Table1, Trial


def table1(trials: Iterable[Sequence[Trial]], *, resamples: int, seed: int) -> Table1:
    """Means over all trials with a defined Jaccard index; Pr(Top < Bottom) over responses that have both groups.

    The sign test leaves out responses where top and bottom are equal.

    Args:
        trials: per response.
    """
    rows = []
    for of_response in trials:
        groups = {
            group: [t.jaccard for t in of_response if t.group == group and not math.isnan(t.jaccard)]
            for group in ("top", "bottom")
        }
        rows.append([x for group in groups.values() for x in (math.fsum(group), len(group))])
    sums = np.array(rows, dtype=float).reshape(-1, 4)
    rng = np.random.default_rng([seed, 1])
    with np.errstate(invalid="ignore"):
        top, bottom = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
        mean_top, mean_bottom = sums[:, 0].sum() / sums[:, 1].sum(), sums[:, 2].sum() / sums[:, 3].sum()
    lower, higher = int((top < bottom).sum()), int((top > bottom).sum())
    problems = int((~np.isnan(top) & ~np.isnan(bottom)).sum())
    return Table1(
        top=float(mean_top),
        top_interval=bootstrap(sums, ratio(0, 1), resamples, rng),
        bottom=float(mean_bottom),
        bottom_interval=bootstrap(sums, ratio(2, 3), resamples, rng),
        top_below_bottom=lower / problems if problems else math.nan,
        p_value=float(binomtest(lower, lower + higher, alternative="greater").pvalue) if lower + higher else math.nan,
        problems=problems,
        top_trials=int(sums[:, 1].sum()),
        bottom_trials=int(sums[:, 3].sum()),
    )
