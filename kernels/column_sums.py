"""Column sums with a factor for each row, and the largest weight of a column: for `rhythm.column_scores`.

They are column_sweep.py's loops in a launch without rows of WAAD. The largest weight is found among exponents: without
factors a score costs no exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms
from rhythm.kernels.column_sweep import column_arguments, column_program, tile_arguments
from rhythm.kernels.launch import kernel_key, launch, run_with_tile
from rhythm.kernels.sequences import Sequences
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import Tile
from rhythm.kernels.tiles import tma_compatible
from rhythm.kernels.tuning import Sample


@triton.jit(do_not_specialize=["sequences", "tokens", "horizon_lo", "horizon_hi", "rows", "sliding_window"])
def column_sums_kernel(
    q, k, q_tiles, lengths, lse, parts, steep, factors, sums, strides, sequences, tokens, heads, scale, horizon_lo,
    horizon_hi, rows, sliding_window, cap_scale, form: tl.constexpr, tile: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Sums of one block of keys of one head; for the arguments see column_program."""
    column_program(
        tl.program_id(0) // heads, tl.num_programs(0) // heads, tl.program_id(0) % heads, q, k, q_tiles, lengths, lse,
        parts, steep, sums, strides, sequences, tokens, scale, horizon_lo, horizon_hi, rows, sliding_window, cap_scale,
        form, tile, factors, REDUCE,
    )  # fmt: skip


def column_sums(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    sums_HT: Tensor,
    *,
    scale: float,
    horizon: tuple[int, int | None],
    reduce: str,
    factors_HT: Tensor | None = None,
    forms: Forms = PLAIN,
    softmax: Softmax | None = None,
) -> None:
    """Fills sums_HT, fp32 [Hq, T], with Σ_t w[t]·A[t, s] (reduce "sum") or max_t w[t]·A[t, s] ("max") of each key s,
    over the response rows t within its horizon that see it.

    0 (or −inf) for a key that no row reaches. factors_HT: w, fp32 [Hq, T], contiguous; a row of factor 0 reaches no
    key. None: all are 1. lse_HT and softmax: as in `bands`.
    """
    arguments = column_arguments(q, k, lse_HT, sequences, scale, horizon, forms) | {
        "factors": factors_HT,
        "sums": sums_HT,
        "parts": None if softmax is None else softmax.parts,
        "steep": None if softmax is None else softmax.steep,
        "REDUCE": reduce,
    }

    def run(tile: Tile) -> None:
        programs = q.shape[-2] * sequences.blocks(tile.keys)
        launch(column_sums_kernel, programs, **arguments, **tile_arguments(q, tile, arguments))

    def on_sample(sample: Sample) -> None:
        sums, *_ = sample.results
        column_sums(
            sample.q,
            sample.k,
            sample.lse,
            sample.sequences,
            sums,
            scale=scale,
            horizon=horizon,
            reduce=reduce,
            softmax=None if softmax is None else sample.softmax,
        )

    key = kernel_key("column_sums", q, arguments)
    run_with_tile(key, q, k, tma_compatible(q), run, on_sample)
