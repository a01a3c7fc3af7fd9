"""Triton kernels of rhythm, installed as ``rhythm.kernels``.

The twins of csrc/: a row sweep (lse, span, WAAD, and the attention output where V is given), a column sweep (FAI) and
the band of the window (WAAD for a lse that came from outside). Each file reads top-down: kernel, then launcher.
"""

from rhythm.kernels.column_sweep import column_sweep
from rhythm.kernels.row_sweep import row_sweep
from rhythm.kernels.sequences import Sequences
from rhythm.kernels.window_band import window_band

__all__ = ["Sequences", "column_sweep", "row_sweep", "window_band"]
