"""Finds peaks of the signals by scipy.signal.find_peaks, and measures how they couple; for analysis and trainer.

Shapes: n tokens of a response.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rhythm.system.extras import needs

with needs("rhythm.credit.peaks"):
    from pydantic import BaseModel, Field
    from scipy.signal import find_peaks as scipy_find_peaks

ROUNDING = 1e-6  # relative; a curve that varies only by fp32 rounding has no peaks


class PeaksConfig(BaseModel, extra="forbid", frozen=True):
    """What counts as a peak: arguments of scipy.signal.find_peaks, applied to each run of defined values."""

    prominence: float = Field(
        default=0.25, ge=0, description="smallest prominence of a peak, in standard deviations of the response's curve"
    )
    distance: int = Field(
        default=1, ge=1, description="smallest distance between peaks, in tokens; of closer ones the higher is kept"
    )
    follow: int = Field(
        default=1, ge=0, description="an FAI peak counts as following a WAAD peak up to this many tokens after it"
    )


def find_peaks(values: Sequence[float], config: PeaksConfig) -> tuple[int, ...]:
    """Indices of the peaks, ascending: entries above both neighbors, or the middle of a plateau.

    Each run of defined values (not NaN) is searched separately; its first and last value can't be peaks. A peak's
    prominence is at least `prominence` standard deviations of all defined values.
    """
    x = np.asarray(values, dtype=float)
    defined = np.isfinite(x)
    if not defined.any() or x[defined].std() <= ROUNDING * np.abs(x[defined]).max():
        return ()
    settings = {"prominence": config.prominence * x[defined].std(), "distance": config.distance}
    return tuple(
        int(begin + place) for begin, end in _runs(defined) for place in scipy_find_peaks(x[begin:end], **settings)[0]
    )


def eligible(values: Sequence[float]) -> np.ndarray:
    """Where a peak is possible, bool [n]: inside a run of defined values."""
    defined = np.isfinite(np.asarray(values, dtype=float))
    inside = np.zeros(len(defined), dtype=bool)
    for begin, end in _runs(defined):
        inside[begin + 1 : end - 1] = True
    return inside


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of each run of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@dataclass(frozen=True)
class Coupling:
    """One coupling in one response.

    Attributes:
        value: float [n], per token: entropy in nats, or 1 where a peak counts as a hit and 0 elsewhere; NaN is
        undefined. places: int [m], ascending: positions where a peak of the first signal is possible and `value` is
        defined. peaks: int [k], a subset of places: positions of its peaks.
    """

    value: np.ndarray
    places: np.ndarray
    peaks: np.ndarray


def within_reach(peaks: Sequence[int], n: int, follow: int) -> np.ndarray:
    """float [n]: 1 at the tokens `peaks` and up to `follow` tokens after them, 0 elsewhere."""
    reached = np.zeros(n)
    for lag in range(min(follow, n - 1) + 1):
        reached[[at + lag for at in peaks if at + lag < n]] = 1.0
    return reached


def coupling(value: np.ndarray, first: tuple[float, ...], peaks: tuple[int, ...]) -> Coupling:
    """`value` [n] at `peaks` of the curve `first` [n], as far as it is defined there."""
    could_be = eligible(first) & np.isfinite(value)
    at = np.array(peaks, dtype=int)
    return Coupling(value, np.flatnonzero(could_be), at[could_be[at]])


def rotated_lift(couplings: Iterable[Coupling]) -> float:
    """The excess of Σ value at the peaks over its mean with each response's peaks rotated among the places where a peak
    could be: 0.2 is +20%. NaN without a peak.
    """
    observed = expected = 0.0
    for coupling in couplings:
        observed += float(coupling.value[coupling.peaks].sum())
        expected += len(coupling.peaks) * float(coupling.value[coupling.places].mean()) if len(coupling.peaks) else 0.0
    return observed / expected - 1 if expected else float("nan")
