"""Triton kernels of rhythm, installed as ``rhythm.kernels``.

They compute what csrc/ computes on CPUs: a row sweep (lse and span, and the attention output where V is given), the
bands (WAAD and FAI, after the row sweep or for a lse that came from outside), and column sums. Each file reads
top-down: kernel, then launcher. `python -m rhythm.kernels.inspect.compile_ahead` compiles them without a GPU.
"""

from rhythm.kernels.arguments import Forms
from rhythm.kernels.bands import bands
from rhythm.kernels.column_sums import column_sums
from rhythm.kernels.mean_span import BlockSums
from rhythm.kernels.results import undefined_results
from rhythm.kernels.row_answers import row_answers
from rhythm.kernels.row_sweep import row_sweep
from rhythm.kernels.sampled_span import sampled_span
from rhythm.kernels.sequences import Sequences
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.values import mend_output

__all__ = [
    "BlockSums", "Forms", "Sequences", "Softmax", "bands", "column_sums", "mend_output", "row_answers", "row_sweep",
    "sampled_span", "undefined_results",
]  # fmt: skip
