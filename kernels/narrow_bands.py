"""WAAD and FAI of a narrow window and a near horizon: both from the same weights, by one program per block of tokens.

A program owns KEYS − HALO tokens. It reads their keys and the HALO keys before them once, and visits, tile by tile, the
rows of its own tokens, which find all keys of a window of up to HALO + 1 tokens in its tile (WAAD), and the rows behind
them that the horizon reaches (FAI). Sums of the HALO columns are left to the program that owns those keys. So no sum is
shared between programs: there are no atomics, and reruns are bit-equal.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rhythm.kernels.column_sweep import partial_sum, weights
from rhythm.kernels.mean_span import span_program
from rhythm.kernels.sequences import locate
from rhythm.kernels.tiles import LOG2_E, head_base, load_rows, product, query_base, signed

HALO = tl.constexpr(9)
"""Keys before its own that a program reads: what the default window of 10 tokens needs."""
FARTHEST = 256
"""The largest upper end of a horizon for these kernels, which mask every tile; bands.py has a loop without masks."""


def narrow(window: int, horizon: tuple[int, int | None]) -> bool:
    """Whether the kernel can compute the window, and is meant for the horizon."""
    return window <= HALO.value + 1 and horizon[1] is not None and horizon[1] <= FARTHEST


@triton.jit
def at_distances(p_MN, last_M1C, count_M11):
    """[M, N / 8, 8] the weights of the `count` columns n up to `last`, others 0; n = 8i + c.

    A thread has few c, and its i are constants: they take no register.
    """
    EIGHTS: tl.constexpr = p_MN.shape[1] // 8
    column = (8 * tl.arange(0, EIGHTS))[None, :, None]
    p_MIC = tl.reshape(p_MN, [p_MN.shape[0], EIGHTS, 8])
    before_MIC = (last_M1C - column).to(tl.uint32, bitcast=True)
    return tl.where(before_MIC < count_M11.to(tl.uint32, bitcast=True), p_MIC, 0.0)


@triton.jit
def own_column(row_M, first):
    """[M, 1, 8] the columns of the rows' own keys, less the part of a column that differs between threads."""
    return (row_M - first + HALO)[:, None, None] - tl.arange(0, 8)[None, None, :]


@triton.jit
def reached(p_MN, row, first, end, horizon_lo, count):
    """partial_sum of the weights at the `count` distances from horizon_lo on. Rows from `end` on are masked as well:
    their scores may be NaN.
    """
    row_M = row + tl.arange(0, p_MN.shape[0])
    count_M = tl.where(row_M < end, count, 0)[:, None, None]
    p_MIC = at_distances(p_MN, own_column(row_M, first) - horizon_lo, count_M)
    return partial_sum(tl.reshape(p_MIC, [p_MN.shape[0], p_MN.shape[1]]))


@triton.jit(
    do_not_specialize=["sequences", "tokens", "blocks", "window", "horizon_lo", "horizon_hi", "rows", "sliding_window"]
)
def narrow_bands_kernel(
    q, k, q_tiles, lengths, lse, parts, steep, fai, waad, lse_out, sums, span, strides, sequences, tokens, heads,
    blocks, scale, window, horizon_lo, horizon_hi, rows, sliding_window, cap_scale, sinks, form: tl.constexpr,
    tile: tl.constexpr, FROM_PROMPT: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """Results of one block of tokens of one head; spans first, where there are sums (else None). It takes the arguments
    of bands_kernel (bands.py), of which q_tiles and steep are not used.
    """
    place, others = tl.program_id(0), tl.num_programs(0)
    if sums is not None:
        spans = sequences * heads
        if place < spans:
            span_program(place, sums, lengths, span, sequences, tokens, blocks, heads, rows, FROM_PROMPT, SUM_ROWS)
            return
        place, others = place - spans, others - spans
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    OWN: tl.constexpr = KEYS - HALO
    program, head, programs = place // heads, place % heads, others // heads
    sequence, first, start, length, prompt, first_row, missing = locate(
        programs - 1 - program, programs, lengths, sequences, tokens, rows, "token", OWN
    )
    if first >= length:
        return
    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, head // form.group, form)
    of_head = head.to(tl.int64) * tokens + start
    lse_base = lse + of_head
    parts_base = None if parts is None else parts + 2 * of_head
    k_ND = load_rows(k_base, strides.k, first - HALO, length, KEYS, True, form, 0)
    k_DN = tl.trans(signed(k_ND, form.sign))

    reach, hi = window, tl.minimum(horizon_hi, length)
    if sliding_window is not None:
        reach, hi = tl.minimum(reach, sliding_window), tl.minimum(hi, sliding_window - 1)
    count = tl.maximum(hi - horizon_lo + 1, 0)
    # Rows of its own, and those behind them that the horizon reaches.
    begin, beyond = tl.maximum(prompt, first), tl.minimum(first + OWN, length)
    end = tl.minimum(length, beyond + tl.maximum(hi, 0))

    total = tl.zeros([ROWS // 16, 8, KEYS], tl.float32)
    for row in tl.range(begin, end, ROWS, num_stages=tile.stages):
        q_MD = load_rows(q_base, strides.q, row, end, ROWS, True, form)
        p_MN = weights(product(q_MD, k_DN, form), lse_base, parts_base, row, end, scale, cap_scale, True)
        total += reached(p_MN, row, first, end, horizon_lo, count)
        if row < beyond:
            row_M = row + tl.arange(0, ROWS)
            column_M1C = own_column(row_M, first)
            # Keys before the sequence's first are farther than the row's place.
            window_MIC = at_distances(p_MN, column_M1C, tl.minimum(reach, row_M + 1)[:, None, None])
            eighth = (8 * tl.arange(0, KEYS // 8)).to(tl.float32)[None, :, None]
            # W − Σ A·(W − distance), and Σ A·distance where the window holds all that a row sees: the sum of A is 1
            # only as exactly as lse is.
            top_M = tl.where(row_M < reach, 0, window)
            below_M1C = (top_M[:, None, None] - column_M1C).to(tl.float32)
            window_sum_M = tl.sum(tl.sum(window_MIC * (below_M1C + eighth), 1), 1)
            own_M = row_M < beyond
            held = top_M.to(tl.float32)
            if sinks is not None or lse_out is not None:
                lse_M = tl.load(lse_base + row_M, mask=own_M, other=float("inf"))
            if sinks is not None:
                held = held * (1 - tl.exp2((tl.load(sinks + head) - lse_M) * LOG2_E))
            tl.store(waad + of_head + row_M, held - window_sum_M, mask=own_M)
            if lse_out is not None:
                # A row whose lse is not finite has no weights: both are undefined, here as in the full sweep.
                lse_M = tl.where(window_sum_M == window_sum_M, lse_M, float("nan"))
                tl.store(lse_out + of_head + row_M, lse_M, mask=own_M)
    key_N = tl.arange(0, KEYS) - HALO  # relative to the block's first
    total_N = tl.sum(tl.sum(total, 0), 0)

    from_N = tl.maximum(prompt, first + key_N + horizon_lo)
    count_N = tl.minimum(length - 1, first + key_N + tl.minimum(horizon_hi, length)) - from_N + 1
    own_N = (key_N >= 0) & (first + key_N < length) & (count_N > 0)
    tl.store(fai + of_head + first + key_N, total_N / count_N.to(tl.float32), mask=own_N)
