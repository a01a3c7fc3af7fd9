"""Computes Table 2: how often the peaks of one signal coincide with another signal, compared with chance.

Peaks are permuted within their response, among the positions where a peak is possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from rhythm.analysis.bootstrap import bootstrap, ratio
from rhythm.analysis.config import Table2Config
from rhythm.analysis.response import Peaks, Tokens
from rhythm.analysis.results import Table2Row
from rhythm.credit.peaks import Coupling, coupling, within_reach

Key = Literal["entropy", "cooccurrence", "follows"]
OBSERVED, PEAKS, RANDOM, TOKENS = range(4)  # columns: sum over peaks, their number, sum over tokens, their number
ELEMENTS = 2**20  # permuted peaks in memory at a time
ROUNDING = 1e-9  # relative; a permutation within this of the observed statistic counts as reaching it


def couplings(tokens: Tokens, peaks: Peaks, follow: int) -> dict[Key, Coupling]:
    """The three couplings of a response; see `Table2Row.key`."""
    n = len(tokens.ids)
    fai = np.zeros(n, dtype=bool)
    fai[list(peaks.fai)] = True
    return {
        "entropy": coupling(np.asarray(tokens.entropy, dtype=float), tokens.waad, peaks.waad),
        "cooccurrence": coupling(fai.astype(float), tokens.fai_receiver, peaks.fai_receiver),
        "follows": coupling(within_reach(peaks.waad, n, follow), tokens.fai, peaks.fai),
    }


def table2(
    responses: Iterable[tuple[Tokens, Peaks]], config: Table2Config, *, follow: int, seed: int
) -> tuple[Table2Row, ...]:
    """The three rows of the table. The statistics are over the peaks of all responses together.

    Memory is a few numbers per response. The same responses in the same order give the same rows.

    Args:
        follow: a peak of FAI counts as following a peak of WAAD up to this many tokens after it.
    """
    keys: tuple[Key, ...] = get_args(Key)
    rng = np.random.default_rng([seed, 2])
    sums: dict[Key, list[tuple[float, ...]]] = {key: [] for key in keys}
    permuted = {key: np.zeros(config.permutations) for key in keys}
    for tokens, peaks in responses:
        for key, series in couplings(tokens, peaks, follow).items():
            value = series.value
            defined = value[np.isfinite(value)]
            sums[key].append((value[series.peaks].sum(), len(series.peaks), defined.sum(), len(defined)))
            permuted[key] += permuted_sums(series, config, rng)
    return tuple(_row(key, np.array(sums[key]).reshape(-1, 4), permuted[key], config, rng) for key in keys)


def permuted_sums(coupling: Coupling, config: Table2Config, rng: np.random.Generator) -> np.ndarray:
    """The sum of `value` over the permuted peaks, per permutation, float [permutations]."""
    places, k = len(coupling.places), len(coupling.peaks)
    if k == 0:
        return np.zeros(config.permutations)
    value = coupling.value[coupling.places]
    if config.null == "shuffle":
        return np.array([value[rng.choice(places, k, replace=False)].sum() for _ in range(config.permutations)])
    at_k = np.searchsorted(coupling.places, coupling.peaks)
    shifts = rng.integers(places, size=config.permutations)
    parts = np.array_split(shifts, -(-len(shifts) * k // ELEMENTS))
    return np.concatenate([value[(at_k + part[:, None]) % places].sum(axis=1) for part in parts])


def _row(key: Key, sums: np.ndarray, permuted: np.ndarray, config: Table2Config, rng: np.random.Generator) -> Table2Row:
    total = sums.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed, random = total[OBSERVED] / total[PEAKS], total[RANDOM] / total[TOKENS]
        baseline = permuted.mean() / total[PEAKS]
        lift, permuted_lift = observed / random - 1, observed / baseline - 1
    reached = permuted >= total[OBSERVED] - ROUNDING * abs(total[OBSERVED])
    return Table2Row(
        key=key,
        observed=float(observed),
        interval=bootstrap(sums, ratio(OBSERVED, PEAKS), config.resamples, rng),
        random=float(random),
        lift=float(lift),
        lift_interval=bootstrap(sums, _lift, config.resamples, rng),
        permuted=float(baseline),
        permuted_lift=float(permuted_lift),
        p_value=float((1 + reached.sum()) / (1 + len(permuted))) if total[PEAKS] else float("nan"),
        peaks=int(total[PEAKS]),
        responses=int((sums[:, PEAKS] > 0).sum()),
    )


def _lift(sums: np.ndarray) -> np.ndarray:
    observed = sums[:, OBSERVED] / sums[:, PEAKS]
    return np.asarray(observed / (sums[:, RANDOM] / sums[:, TOKENS]) - 1)
