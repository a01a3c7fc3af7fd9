"""WAAD and FAI, given each row's softmax or its lse, in one launch that visits only tiles near the diagonal.

After a row sweep the launch's first programs make spans of its sums (mean_span.py), so that they need no launch.

A window and a horizon that are narrow, as by default, have a kernel of their own (narrow_bands.py). For others programs
come in pairs for the same tokens, so that both find what they read in the cache: one owns a block of keys (FAI,
column_sweep.py), the other a block of rows (WAAD).

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms
from rhythm.kernels.column_sweep import column_arguments, column_program, tile_arguments, weights
from rhythm.kernels.launch import kernel_key, launch, run_with_tile
from rhythm.kernels.mean_span import BlockSums, span_program
from rhythm.kernels.narrow_bands import HALO, narrow, narrow_bands_kernel
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import Tile
from rhythm.kernels.tiles import LOG2_E, dot, head_base, load_q, load_rows, query_base, tma_compatible
from rhythm.kernels.tuning import Sample


@triton.jit
def window_program(
    program, programs, head, q, k, lengths, lse, parts, waad, lse_out, strides, sequences, tokens, scale, window,
    rows, sliding_window, cap_scale, sinks,
    ROWS: tl.constexpr, KEYS: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """WAAD of one block of rows of one head: W − Σ A·(W − distance) over the keys within the window.

    If the window holds all keys of the block: Σ A·distance, since the difference from a W far beyond the sequence would
    lose all digits. With `top` W or 0, both are top·m − Σ A·max(top − distance, top − W), m the sum of the row: 1, or
    with a sink 1 − exp(sink − lse).
    """
    sequence, first, start, length, _, first_row, missing = locate(
        programs - 1 - program, programs, lengths, sequences, tokens, rows, "response", ROWS
    )
    if first < length:
        holds, reach = window > first, window
        if sliding_window is not None:
            holds, reach = holds | (window >= sliding_window), tl.minimum(window, sliding_window)
        top = tl.where(holds, 0, window)
        q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
        k_base = head_base(k, strides.k, sequence, start, head // form.group, form)
        row_M = first + tl.arange(0, ROWS)
        of_head = head.to(tl.int64) * tokens + start
        parts_base = None if parts is None else parts + 2 * of_head
        q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        window_sum_M = tl.zeros([ROWS], tl.float32)
        RELOAD: tl.constexpr = form.precision == "ieee" and q_MD.dtype == tl.float32  # as in row_sweep.py
        for key in tl.range(
            tl.maximum(first - reach + 1, 0), tl.minimum(first + ROWS, length), KEYS, num_stages=1, disable_licm=RELOAD
        ):
            if RELOAD:
                q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
            k_ND = load_rows(k_base, strides.k, key, length, KEYS, True, form)
            place_N = (tl.arange(0, KEYS) + (key - first)).to(tl.float32)
            distance_MN = tl.arange(0, ROWS).to(tl.float32)[:, None] - place_N[None, :]
            p_MN = weights(dot(q_MD, k_ND, form), lse + of_head, parts_base, first, length, scale, cap_scale, True)
            visible_MN = distance_MN >= 0
            if sliding_window is not None:
                visible_MN = visible_MN & (distance_MN < sliding_window)
            below_MN = tl.maximum(top - distance_MN, (top - window).to(tl.float32))
            window_sum_M += tl.sum(tl.where(visible_MN, p_MN * below_MN, 0.0), 1)
        at_M = of_head + row_M
        held = top
        if sinks is not None:
            lse_M = tl.load(lse + at_M, mask=row_M < length, other=float("inf"))
            held = top * (1 - tl.exp2((tl.load(sinks + head) - lse_M) * LOG2_E))
        tl.store(waad + at_M, held - window_sum_M, mask=row_M < length)
        if lse_out is not None:
            # A row whose lse is not finite has no weights: both are undefined, here as in the full sweep.
            lse_M = tl.load(lse + at_M, mask=row_M < length, other=float("inf"))
            tl.store(lse_out + at_M, tl.where(window_sum_M == window_sum_M, lse_M, float("nan")), mask=row_M < length)


@triton.jit(
    do_not_specialize=["sequences", "tokens", "blocks", "window", "horizon_lo", "horizon_hi", "rows", "sliding_window"]
)
def bands_kernel(
    q, k, q_tiles, lengths, lse, parts, steep, fai, waad, lse_out, sums, span, strides, sequences, tokens, heads,
    blocks, scale, window, horizon_lo, horizon_hi, rows, sliding_window, cap_scale, sinks, form: tl.constexpr,
    tile: tl.constexpr, FROM_PROMPT: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """Spans first, where there are sums (else None). Of the other programs even ones own a block of keys, odd ones the
    block of rows of the same tokens.
    """
    place, others = tl.program_id(0), tl.num_programs(0)
    if sums is not None:
        spans = sequences * heads
        if place < spans:
            span_program(
                place, sums, lengths, span, sequences, tokens, blocks, heads, rows, FROM_PROMPT, SUM_ROWS
            )  # fmt: skip
            return
        place, others = place - spans, others - spans
    # Ahead of the branch, so that both sides share them.
    program, head, programs = place // (2 * heads), place // 2 % heads, others // (2 * heads)
    if place % 2 == 0:
        column_program(
            program, programs, head, q, k, q_tiles, lengths, lse, parts, steep, fai, strides, sequences, tokens, scale,
            horizon_lo, horizon_hi, rows, sliding_window, cap_scale, form, tile, None, "mean",
        )  # fmt: skip
    else:
        KEYS: tl.constexpr = tile.keys if tile.keys < 32 else 32
        window_program(
            program, programs, head, q, k, lengths, lse, parts, waad, lse_out, strides, sequences, tokens, scale,
            window, rows, sliding_window, cap_scale, sinks, tile.keys, KEYS, form,
        )  # fmt: skip


def bands(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    waad_HT: Tensor,
    fai_HT: Tensor,
    lse_out_HT: Tensor | None,
    *,
    scale: float,
    window: int,
    horizon: tuple[int, int | None],
    forms: Forms = PLAIN,
    softmax: Softmax | None = None,
    sums: BlockSums | None = None,
    span_BH: Tensor | None = None,
) -> None:
    """Fills WAAD at the response rows and FAI at the keys that these reach, each fp32 [Hq, T]; lse_HT is read on
    response rows only.

    lse_HT is finite or NaN (results.py); where it is NaN, so is every result that the row contributes to. It is copied
    to lse_out_HT where one is given. softmax: the row sweep's, if lse_HT is the row sweep's own. sums: what the row
    sweep returned; then the spans, fp32 [B, Hq], are filled as well, NaN where there are no response rows.
    """
    arguments = column_arguments(q, k, lse_HT, sequences, scale, horizon, forms)
    arguments |= {"waad": waad_HT, "fai": fai_HT, "lse_out": lse_out_HT, "sinks": forms.sinks}
    arguments |= {
        "window": min(window, sequences.tokens),
        "parts": None if softmax is None else softmax.parts,
        "steep": None if softmax is None else softmax.steep,
        "sums": None if sums is None else sums.sums,
        "span": span_BH,
        "blocks": 0 if sums is None else sums.sums.shape[0],
        "FROM_PROMPT": sums is not None and sums.from_prompt,
        "SUM_ROWS": 0 if sums is None else sums.rows,
    }
    near = narrow(window, horizon)
    spans = 0 if sums is None else sequences.count * q.shape[-2]

    def run(tile: Tile) -> None:
        blocks = sequences.blocks(tile.keys - HALO.value) if near else 2 * sequences.blocks(tile.keys)
        kernel = narrow_bands_kernel if near else bands_kernel
        launch(kernel, spans + q.shape[-2] * blocks, **arguments, **tile_arguments(q, tile, arguments))

    def on_sample(sample: Sample) -> None:
        waad, fai, lse_out = sample.results
        bands(
            sample.q,
            sample.k,
            sample.lse,
            sample.sequences,
            waad,
            fai,
            None if lse_out_HT is None else lse_out,
            scale=scale,
            window=window,
            horizon=horizon,
            softmax=None if softmax is None else sample.softmax,
        )

    name = "bands" if softmax is None else "column"
    key = kernel_key(f"{name}_band" if near else name, q, arguments)
    run_with_tile(key, q, k, tma_compatible(q), run, on_sample)
