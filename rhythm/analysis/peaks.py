"""Finds the peaks of a curve by scipy.signal.find_peaks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.signal import find_peaks as scipy_find_peaks

from rhythm.analysis.config import PeaksConfig

ROUNDING = 1e-6  # relative; a curve that varies only by fp32 rounding has no peaks


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
