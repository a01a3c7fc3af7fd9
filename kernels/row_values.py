"""One sweep over the keys for a block of rows, with V: the attention output, lse and sums of row spans.

It is flash attention's online softmax with one sum besides Σ p: Σ p·j, j the key's place in its tile, from which
Σ p·(t − s) follows by terms of rows alone. The steady loop over far keys has no masks. Near the diagonal products are
subtracted before they are scaled, which is exact however large they are. If far products are too large for the fused
form (STEEP), the loop near the diagonal takes all keys.

With a sliding window the sweep begins at the first key that the block's first row sees; keys that later rows don't see
go through a loop of their own.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rhythm.kernels.online import online_softmax_step, store_rows
from rhythm.kernels.scores import denominator, first_visible
from rhythm.kernels.sequences import locate
from rhythm.kernels.tiles import STEEP, head_base, load_q, load_rows, load_tma, query_base


@triton.jit
def before_near(state, scale, sliding_window):
    """(the state for the loop near the diagonal, whether far keys were too steep). If so it is empty: they come again.

    p becomes relative to a product whose exponent is within an ulp or two of the reference so far. An output that
    overflowed is NaN from here on; mend_output (values.py) repairs it.
    """
    reference_M, sum_M, distance_sum_M, out_MD = state
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
    return (largest_M, sum_M, distance_sum_M, out_MD * move_M[:, None]), steep


@triton.jit(do_not_specialize=["sequences", "tokens", "rows", "sliding_window"])
def row_values_kernel(
    q, k, v, k_tiles, v_tiles, lengths, given_lse, results, strides,
    sequences, tokens, heads, scale, natural_scale, rows, sliding_window, cap_scale, sinks,
    form: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Results of one block of rows of one head. given_lse may be None, and rows … sinks (arguments.py)."""
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    PADDED: tl.constexpr = form.padded
    # The longest rows of all heads come first, and heads that share keys run side by side.
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, first, start, length, prompt, first_row, missing = locate(
        program, tl.num_programs(0) // heads, lengths, sequences, tokens, rows, "row", ROWS
    )
    if first >= length:
        return
    key_head = head // form.group
    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, key_head, form)
    v_base = head_base(v, strides.v, sequence, start, key_head, form)
    q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
    # Full fp32 keeps both operands in registers: without reloading q would stay there from tile to tile.
    RELOAD: tl.constexpr = form.precision == "ieee" and q_MD.dtype == tl.float32
    zeros_M = tl.zeros([ROWS], tl.float32)
    state = (zeros_M - float("inf"), zeros_M, zeros_M, tl.zeros([ROWS, PADDED], tl.float32))

    # The output takes the registers, and tanh does.
    MOST: tl.constexpr = 16 if PADDED > 128 or cap_scale is not None else 32
    NEAR_KEYS: tl.constexpr = KEYS if KEYS < MOST else MOST
    near = first // KEYS * KEYS
    begin, far = 0, 0
    if sliding_window is not None:
        begin = first_visible(first, sliding_window)
        # Every row of the block sees the keys from `far` on.
        edge = tl.cdiv(tl.maximum(first_visible(first + ROWS - 1, sliding_window) - begin, 0), NEAR_KEYS) * NEAR_KEYS
        far = tl.minimum(begin + edge, begin + (first - begin) // NEAR_KEYS * NEAR_KEYS)
        near = far + (first - far) // KEYS * KEYS
        for key in tl.range(begin, far, NEAR_KEYS, num_stages=1, disable_licm=RELOAD):
            if RELOAD:
                q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
            k_ND = load_rows(k_base, strides.k, key, length, NEAR_KEYS, False, form)
            v_ND = load_rows(v_base, strides.v, key, length, NEAR_KEYS, False, form)
            state = online_softmax_step(
                state, q_MD, k_ND, v_ND, key, first, scale, sliding_window, cap_scale, False, True, True, form
            )
    for key in tl.range(far, near, KEYS, num_stages=tile.stages, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        if tile.tma:
            k_ND = load_tma(k_tiles, sequence, start, key, key_head, KEYS, form)
            v_ND = load_tma(v_tiles, sequence, start, key, key_head, KEYS, form)
        else:
            k_ND = load_rows(k_base, strides.k, key, length, KEYS, False, form)
            v_ND = load_rows(v_base, strides.v, key, length, KEYS, False, form)
        state = online_softmax_step(
            state, q_MD, k_ND, v_ND, key, first, scale, None, cap_scale, False, False, True, form
        )
    state, again = before_near(state, scale, sliding_window)
    near = tl.where(again, begin, near)
    for key in tl.range(near, tl.minimum(first + ROWS, length), NEAR_KEYS, num_stages=tile.stages, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        k_ND = load_rows(k_base, strides.k, key, length, NEAR_KEYS, True, form)
        v_ND = load_rows(v_base, strides.v, key, length, NEAR_KEYS, True, form)
        state = online_softmax_step(
            state, q_MD, k_ND, v_ND, key, first, scale, sliding_window, cap_scale, True, False, True, form
        )

    largest_M, sum_M, distance_sum_M, out_MD = state
    place_M, dim_D = tl.arange(0, ROWS), tl.arange(0, PADDED)
    total_M, _, defined_M = denominator(largest_M, sum_M, natural_scale, sinks, head)
    row_M = (first_row - missing + first + place_M).to(tl.int64)
    at_MD = (row_M * heads + head)[:, None] * form.size + dim_D[None, :]
    out_MD = (out_MD / tl.where(defined_M, total_M, float("nan"))[:, None]).to(results.out.dtype.element_ty)
    tl.store(results.out + at_MD, out_MD, mask=(first + place_M < length)[:, None] & (dim_D < form.size)[None, :])
    at_M = head.to(tl.int64) * tokens + start + first + place_M
    response_M = (first + place_M >= prompt) & (first + place_M < length)
    store_rows(
        results, given_lse, largest_M, sum_M, distance_sum_M, at_M, place_M, response_M, head, scale, natural_scale,
        sinks, results.sums + tl.program_id(0),
    )  # fmt: skip
