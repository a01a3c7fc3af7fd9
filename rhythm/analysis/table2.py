"""Table 2: how far the peaks of one signal go with another signal, and how far they would by chance.

Peaks are permuted within their response, among the places where a peak could be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rhythm.analysis.bootstrap import bootstrap, ratio
from rhythm.analysis.config import Table2Config
from rhythm.analysis.peaks import eligible
from rhythm.analysis.results import Peaks, Table2Row, Tokens

Key = Literal["entropy", "cooccurrence", "follows"]
OBSERVED, PEAKS, RANDOM, TOKENS = range(4)  # the sums: over peaks and how many, over all tokens and how many
ELEMENTS = 2**20  # permuted peaks held at a time
ROUNDING = 1e-9  # relative; a permutation that reaches the observed statistic but for rounding has reached it


@dataclass(frozen=True)
class Coupling:
    """One coupling in one response.

    Attributes:
        value: float [n], of every token: entropy in nats, or 1 where a peak counts as a hit and 0 elsewhere; NaN is
            undefined.
        places: int [m], rising: where a peak of the first signal could be, and `value` is defined.
        peaks: int [k], of places' entries: where its peaks are.
    """

    value: np.ndarray
    places: np.ndarray
    peaks: np.ndarray


def couplings(tokens: Tokens, peaks: Peaks, follow: int) -> dict[Key, Coupling]:
    """The three couplings of a response; see `Table2Row.key`."""
    n = len(tokens.ids)
    waad, fai = (np.zeros(n, dtype=bool) for _ in range(2))
    waad[list(peaks.waad)] = True
    fai[list(peaks.fai)] = True
    after = waad.copy()
    for lag in range(1, min(follow, n - 1) + 1):
        after[lag:] |= waad[:-lag]
    return {
        "entropy": _coupling(np.asarray(tokens.entropy, dtype=float), tokens.waad, peaks.waad),
        "cooccurrence": _coupling(fai.astype(float), tokens.fai_receiver, peaks.fai_receiver),
        "follows": _coupling(after.astype(float), tokens.fai, peaks.fai),
    }


def table2(
    responses: Iterable[tuple[Tokens, Peaks]], config: Table2Config, *, follow: int, seed: int
) -> tuple[Table2Row, ...]:
    """The three rows over all responses; the statistics are over all peaks of all responses together.

    Memory is a few numbers a response. The same responses in the same order give the same rows.

    Args:
        follow: tokens after a peak of WAAD at which a peak of FAI still follows it.
    """
    keys: tuple[Key, ...] = get_args(Key)
    rng = np.random.default_rng([seed, 2])
    sums: dict[Key, list[tuple[float, ...]]] = {key: [] for key in keys}
    permuted = {key: np.zeros(config.permutations) for key in keys}
    for tokens, peaks in responses:
        for key, coupling in couplings(tokens, peaks, follow).items():
            value = coupling.value
            defined = value[np.isfinite(value)]
            sums[key].append((value[coupling.peaks].sum(), len(coupling.peaks), defined.sum(), len(defined)))
            permuted[key] += permuted_sums(coupling, config, rng)
    return tuple(_row(key, np.array(sums[key]).reshape(-1, 4), permuted[key], config, rng) for key in keys)


def permuted_sums(coupling: Coupling, config: Table2Config, rng: np.random.Generator) -> np.ndarray:
    """float [permutations]: the sum of `value` over the peaks, wherever they come to lie."""
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


def _coupling(value: np.ndarray, first: tuple[float, ...], peaks: tuple[int, ...]) -> Coupling:
    could_be = eligible(first) & np.isfinite(value)
    at = np.array(peaks, dtype=int)
    return Coupling(value, np.flatnonzero(could_be), at[could_be[at]])


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
