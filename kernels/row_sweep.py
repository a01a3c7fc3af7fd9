"""One sweep over the keys for a block of rows: lse, sums of row spans and WAAD, and the output where V is given.

It is flash attention's online softmax with two sums besides Σ p: Σ p·j, j the key's place in its tile, from which
Σ p·(t − s) follows by terms of rows alone; and near the diagonal Σ p·(W − (t − s)) over t − s < W, since
Σ A·min(t − s, W) = W − Σ_{t−s<W} A·(W − (t − s)) for rows that sum to 1. The steady loop over far keys has neither
masks nor window weights: each score costs a maximum, a fused multiply-add into exp2, and the two sums. Near the
diagonal products are subtracted before they are scaled, which is exact however large they are. If far products are too
large for the fused form (STEEP), the loop near the diagonal takes all keys.

With a sliding window the sweep begins at the first key that the block's first row sees; keys that later rows don't see
go through a loop of their own. With a sink rows of A sum to m = Σ p / (Σ p + sink), and WAAD is m·W − ….

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms, common_arguments, scales
from rhythm.kernels.launch import launch, options, run_with_tile
from rhythm.kernels.mean_span import BlockSums
from rhythm.kernels.scores import capped_products, denominator, first_visible, log_denominator
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import KernelKey, Tile
from rhythm.kernels.tiles import (
    LOG2_E,
    STEEP,
    head_base,
    load_q,
    load_rows,
    load_tma,
    padded_size,
    query_base,
    tma_compatible,
    tma_descriptor,
)
from rhythm.kernels.tuning import Sample


class RowResults(NamedTuple):
    """What the kernel writes: BlockSums.sums; waad and lse, fp32 [Hq, T]; Softmax.parts and .steep; the output.

    Without a softmax parts and steep are None, and without values out is.
    """

    sums: Tensor
    waad: Tensor
    lse: Tensor
    parts: Tensor | None
    steep: Tensor | None
    out: Tensor | None


@triton.jit
def moments(p_MN, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(Σ_j p, Σ_j p·j) of each row: with j = 2i or 2i + 1, sums of neighboring columns serve both."""
    even_M, odd_M = tl.split(tl.reshape(p_MN, [ROWS, KEYS // 2, 2]))
    place = (2 * tl.arange(0, KEYS // 2)).to(tl.float32)[None, :]
    pair_M = even_M + odd_M
    return tl.sum(pair_M, 1), tl.sum(pair_M * place + odd_M, 1)


@triton.jit
def online_softmax_step(
    state, q_MD, k_ND, v_ND, key, first, scale, window, sliding_window, cap_scale,
    NEAR: tl.constexpr, EDGE: tl.constexpr, VALUES: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the running softmax. NEAR: the tile may lie above the diagonal or within the window.
    EDGE: its keys may lie beyond the sliding window.

    state: (largest, Σ p, Σ p·(first row − key), Σ p·(W − distance) within the window, Σ p·v). p is relative to largest,
    which is a product where NEAR, and far from the diagonal that product's exponent, rounded.
    """
    largest_M, sum_M, distance_sum_M, window_sum_M, out_MD = state
    ROWS: tl.constexpr = q_MD.shape[0]
    KEYS: tl.constexpr = k_ND.shape[0]
    score_MN = capped_products(q_MD, k_ND, cap_scale, form)
    if NEAR or EDGE:
        place_N = (tl.arange(0, KEYS) + (key - first)).to(tl.float32)
        distance_MN = tl.arange(0, ROWS).to(tl.float32)[:, None] - place_N[None, :]
        if NEAR:
            score_MN = tl.where(distance_MN >= 0, score_MN, float("-inf"))
        if sliding_window is not None:
            score_MN = tl.where(distance_MN < sliding_window, score_MN, float("-inf"))
    larger_M = tl.maximum(largest_M, tl.max(score_MN, 1) * (1.0 if NEAR else scale))
    # While every score so far is −inf any finite reference will do.
    reference_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    if NEAR:
        shrink_M = tl.exp2((largest_M - reference_M) * scale)
        p_MN = tl.exp2((score_MN - reference_M[:, None]) * scale)
    else:
        shrink_M = tl.exp2(largest_M - reference_M)
        p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
    tile_sum_M, tile_place_M = moments(p_MN, ROWS, KEYS)
    sum_M = sum_M * shrink_M + tile_sum_M
    distance_sum_M = distance_sum_M * shrink_M + (tile_sum_M * (first - key).to(tl.float32) - tile_place_M)
    window_sum_M = window_sum_M * shrink_M
    if NEAR:
        window_sum_M += tl.sum(p_MN * tl.maximum(window - distance_MN, 0.0), 1)
    if VALUES:
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD * shrink_M[:, None], input_precision=form.precision)
    return larger_M, sum_M, distance_sum_M, window_sum_M, out_MD


@triton.jit
def before_near(state, scale, sliding_window):
    """(the state for the loop near the diagonal, whether far keys were too steep). If so it is empty: they come again.

    p becomes relative to a product whose exponent is within an ulp or two of the reference so far. An output that
    overflowed is NaN from here on; mend_output (values.py) repairs it.
    """
    reference_M, sum_M, distance_sum_M, window_sum_M, out_MD = state
    size_M = tl.abs(reference_M)
    if sliding_window is not None:  # rows that saw none of these keys are as they were
        size_M = tl.where(reference_M == float("-inf"), 0.0, size_M)
    steep = tl.max(size_M, 0) >= STEEP
    largest_M = tl.where(steep, float("-inf"), reference_M / scale)
    move_M = tl.where(steep, 0.0, tl.exp2(reference_M - largest_M * scale))
    if sliding_window is not None:
        move_M = tl.where(reference_M == float("-inf"), 0.0, move_M)
    sum_M = tl.where(steep, 0.0, sum_M * move_M)
    distance_sum_M = tl.where(steep, 0.0, distance_sum_M * move_M)
    return (largest_M, sum_M, distance_sum_M, window_sum_M, out_MD * move_M[:, None]), steep


@triton.jit(do_not_specialize=["sequences", "tokens", "window", "rows", "sliding_window"])
def row_sweep_kernel(
    q, k, v, k_tiles, v_tiles, lengths, given_lse, results, strides,
    sequences, tokens, heads, scale, natural_scale, window, rows, sliding_window, cap_scale, sinks,
    form: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Results of one block of rows of one head. v and given_lse may be None, and rows … sinks (arguments.py)."""
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    PADDED: tl.constexpr = form.padded
    VALUES: tl.constexpr = v is not None
    FROM: tl.constexpr = "row" if VALUES else "response"
    # The longest rows of all heads come first, and heads that share keys run side by side.
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, first, start, length, prompt, first_row, missing = locate(
        program, tl.num_programs(0) // heads, lengths, sequences, tokens, rows, FROM, ROWS
    )
    if first >= length:
        return
    key_head = head // form.group
    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, key_head, form)
    v_base = head_base(v, strides.v, sequence, start, key_head, form) if VALUES else k_base
    q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
    # Full fp32 keeps both operands in registers: without reloading q would stay there from tile to tile.
    RELOAD: tl.constexpr = form.precision == "ieee" and q_MD.dtype == tl.float32
    zeros_M = tl.zeros([ROWS], tl.float32)
    state = (zeros_M - float("inf"), zeros_M, zeros_M, zeros_M, tl.zeros([ROWS, PADDED if VALUES else 1], tl.float32))

    # The output takes the registers, and tanh does.
    MOST: tl.constexpr = 16 if VALUES and (PADDED > 128 or cap_scale is not None) else 32
    NEAR_KEYS: tl.constexpr = KEYS if KEYS < MOST else MOST
    # Far keys: at distance ≥ window from every row of the block.
    near = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    begin, far = 0, 0
    if sliding_window is not None:
        begin = first_visible(first, sliding_window)
        # Every row of the block sees the keys from `far` on.
        edge = tl.cdiv(tl.maximum(first_visible(first + ROWS - 1, sliding_window) - begin, 0), NEAR_KEYS) * NEAR_KEYS
        near = tl.maximum(first - window + 1, begin)
        far = tl.minimum(begin + edge, begin + (near - begin) // NEAR_KEYS * NEAR_KEYS)
        near = far + (near - far) // KEYS * KEYS
        for key in tl.range(begin, far, NEAR_KEYS, num_stages=1, disable_licm=RELOAD):
            if RELOAD:
                q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
            k_ND = load_rows(k_base, strides.k, key, length, NEAR_KEYS, False, form)
            v_ND = k_ND
            if VALUES:
                v_ND = load_rows(v_base, strides.v, key, length, NEAR_KEYS, False, form)
            state = online_softmax_step(
                state, q_MD, k_ND, v_ND, key, first, scale, window, sliding_window, cap_scale, False, True, VALUES, form
            )
    for key in tl.range(far, near, KEYS, num_stages=tile.stages, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        if tile.tma:
            k_ND = load_tma(k_tiles, sequence, start, key, key_head, KEYS, form)
        else:
            k_ND = load_rows(k_base, strides.k, key, length, KEYS, False, form)
        v_ND = k_ND
        if VALUES:
            if tile.tma:
                v_ND = load_tma(v_tiles, sequence, start, key, key_head, KEYS, form)
            else:
                v_ND = load_rows(v_base, strides.v, key, length, KEYS, False, form)
        state = online_softmax_step(
            state, q_MD, k_ND, v_ND, key, first, scale, window, None, cap_scale, False, False, VALUES, form
        )
    state, again = before_near(state, scale, sliding_window)
    near = tl.where(again, begin, near)
    for key in tl.range(near, tl.minimum(first + ROWS, length), NEAR_KEYS, num_stages=tile.stages, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        k_ND = load_rows(k_base, strides.k, key, length, NEAR_KEYS, True, form)
        v_ND = k_ND
        if VALUES:
            v_ND = load_rows(v_base, strides.v, key, length, NEAR_KEYS, True, form)
        state = online_softmax_step(
            state, q_MD, k_ND, v_ND, key, first, scale, window, sliding_window, cap_scale, True, False, VALUES, form
        )

    largest_M, sum_M, distance_sum_M, window_sum_M, out_MD = state
    place_M = tl.arange(0, ROWS)
    total_M, logit_M, defined_M = denominator(largest_M, sum_M, natural_scale, sinks, head)
    if VALUES:
        dim_D = tl.arange(0, PADDED)
        row_M = (first_row - missing + first + place_M).to(tl.int64)
        at_MD = (row_M * heads + head)[:, None] * form.size + dim_D[None, :]
        out_MD = (out_MD / tl.where(defined_M, total_M, float("nan"))[:, None]).to(results.out.dtype.element_ty)
        tl.store(results.out + at_MD, out_MD, mask=(first + place_M < length)[:, None] & (dim_D < form.size)[None, :])
    place_sum_M, held = place_M.to(tl.float32), window
    if sinks is not None:
        place_sum_M, held = place_sum_M * (sum_M / total_M), window * (sum_M / total_M)
    span_M = tl.where(defined_M, distance_sum_M / total_M + place_sum_M, float("nan"))
    # Where the window holds all that a row sees, WAAD is its span: W − Σ with a large W would lose its digits.
    below_M = tl.where(defined_M, held - window_sum_M / total_M, float("nan"))
    holds_M = first + place_M < window
    if sliding_window is not None:
        holds_M = holds_M | (window >= sliding_window)
    waad_M = tl.where(holds_M, span_M, below_M)
    largest_M, log2_total_M, lse_M = log_denominator(largest_M, sum_M, logit_M, defined_M, sinks, head)
    at_M = head.to(tl.int64) * tokens + start + first + place_M
    response_M = (first + place_M >= prompt) & (first + place_M < length)
    if given_lse is not None:  # weights follow a lse from outside: all those of a row change by the same factor
        given_M = tl.load(given_lse + at_M, mask=response_M, other=0.0)
        span_M *= tl.exp2((lse_M - given_M) * LOG2_E)
    tl.store(results.sums + tl.program_id(0), tl.sum(tl.where(response_M, span_M, 0.0).to(tl.float64), 0))
    tl.store(results.waad + at_M, waad_M, mask=response_M)
    tl.store(results.lse + at_M, lse_M, mask=response_M)
    if results.parts is not None:
        tl.store(results.parts + 2 * at_M, largest_M, mask=response_M)
        tl.store(results.parts + 2 * at_M + 1, log2_total_M, mask=response_M)
        exponent_M = tl.where(response_M & defined_M, tl.abs(largest_M * scale), 0.0)
        tl.store(results.steep, 1, mask=tl.max(exponent_M, 0) >= STEEP)  # any program that stores it stores 1


def row_sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sequences: Sequences,
    waad_HT: Tensor,
    lse_HT: Tensor,
    *,
    scale: float,
    window: int,
    forms: Forms = PLAIN,
    given_lse_HT: Tensor | None = None,
    softmax: Softmax | None = None,
) -> tuple[BlockSums, Tensor | None]:
    """Fills WAAD and lse, each fp32 [Hq, T], at the response rows.

    q is [T, Hq, D] or [B, T, Hq, D], or has fewer rows; sequences lie on the flattened token axis. given_lse_HT, finite
    or NaN, is used for the spans alone. softmax is filled as well, for the column sweep.

    Returns:
        (the sums of row spans, from which mean_span makes spans, and out where v is given: q's rows, flattened).
    """
    heads, size = q.shape[-2:]
    out_SHD = None if v is None else torch.empty((q.shape[:-2].numel(), heads, size), dtype=q.dtype, device=q.device)
    parts, steep = (None, None) if softmax is None else (softmax.parts, softmax.steep)
    arguments = common_arguments(q, k, sequences, scale, forms, v)

    def run(tile: Tile) -> BlockSums:
        blocks = sequences.blocks(tile.rows)
        sums_NH = torch.empty((blocks, heads), dtype=torch.float64, device=q.device)
        launch(
            row_sweep_kernel,
            heads * blocks,
            v=v,
            k_tiles=tma_descriptor(k, tile.keys) if tile.tma else None,
            v_tiles=tma_descriptor(v, tile.keys) if tile.tma and v is not None else None,
            given_lse=given_lse_HT,
            results=RowResults(sums_NH, waad_HT, lse_HT, parts, steep, out_SHD),
            natural_scale=scales(scale, forms.softcap).natural,
            sinks=forms.sinks,
            window=min(window, sequences.tokens),
            tile=tile,
            **arguments,
            **options(tile),
        )
        return BlockSums(sums_NH, tile.rows, from_prompt=v is None)

    def on_sample(sample: Sample) -> None:
        waad, lse, _ = sample.results
        row_sweep(
            sample.q,
            sample.k,
            None if v is None else sample.v,
            sample.sequences,
            waad,
            lse,
            scale=scale,
            window=window,
            softmax=None if softmax is None else sample.softmax,
        )

    key = KernelKey("row" if v is None else "row_values", q.element_size(), padded_size(size))
    tma = tma_compatible(k) and (v is None or tma_compatible(v))
    *_, sums = run_with_tile(key, q, k, tma, run, on_sample)
    return sums, out_SHD
