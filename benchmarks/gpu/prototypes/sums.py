"""Triton functions that the prototypes share.

Shape suffixes: M rows and N keys of a tile, I groups of eight neighboring keys, C the eight of a group, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(tiles, row, head, ROWS: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr):
    """[ROWS, D] of one head from token `row` on. The interpreter multiplies bf16 bit patterns: there it is fp32."""
    x_MD = tl.reshape(tiles.load([row, head, 0]), [ROWS, D])
    return x_MD.to(tl.float32) if UPCAST else x_MD


@triton.jit
def halves(x_MX):
    """(left, right) half of the columns. A thread holds neighbors of every group of eight, so no data moves."""
    HALF: tl.constexpr = x_MX.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x_MX, [x_MX.shape[0], 2, HALF]), (0, 2, 1)))


@triton.jit
def fold_halves(sum_MX, moment_MX, UNIT: tl.constexpr):
    """Sum halves until 8 columns are left. moment_MX: Σ p·position within each column of sum_MX, in units of UNIT."""
    if sum_MX.shape[1] == 8:
        return sum_MX, moment_MX
    else:
        left_sum, right_sum = halves(sum_MX)
        left_moment, right_moment = halves(moment_MX)
        moment = left_moment + right_moment + right_sum * (sum_MX.shape[1] / 2 / UNIT)
        return fold_halves(left_sum + right_sum, moment, UNIT)


@triton.jit
def fold(p_MN):
    """(Σ_i p, Σ_i p·8i / (N/2)) over groups of eight keys, [M, 8] each, in the threads that hold them.

    Σ p·position by halves: the sum of both halves', plus the right half's Σ p times the half's length. In units of the
    longest half the first step is free: its moment is the right half itself. Two operations per key, in a fixed order
    (the order of Triton's reductions depends on its version).
    """
    left_MX, right_MX = halves(p_MN)
    return fold_halves(left_MX + right_MX, right_MX, p_MN.shape[1] // 2)


@triton.jit
def moments(p_MN):
    """(Σ_j p, Σ_j p·j) of each row: with j = 8i + c, Σ p·8i and Σ_c c·Σ_i p."""
    sum_MC, moment_MC = fold(p_MN)
    place_C = tl.arange(0, 8).to(tl.float32)[None, :]
    return tl.sum(sum_MC, 1), tl.sum(moment_MC * (p_MN.shape[1] // 2) + sum_MC * place_C, 1)


@triton.jit
def online_softmax_step(state, score_MN, v_ND, offset, scale, VALUES: tl.constexpr):
    """One online-softmax step with a tile: (largest score, Σ p, Σ p·(first row − key), Σ p·v), base-2 exponents.

    offset: first row − first key of the tile, fp32.
    """
    largest_M, sum_M, distance_sum_M, out_MD = state
    larger_M = tl.maximum(largest_M, tl.max(score_MN, 1) * scale)
    reference_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    rescale_M = tl.exp2(largest_M - reference_M)
    p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
    tile_sum_M, tile_place_M = moments(p_MN)
    sum_M = sum_M * rescale_M + tile_sum_M
    distance_sum_M = distance_sum_M * rescale_M + (tile_sum_M * offset - tile_place_M)
    if VALUES:
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD * rescale_M[:, None])
    return larger_M, sum_M, distance_sum_M, out_MD


@triton.jit
def overflowed(sum_M, distance_sum_M):
    """Whether a sum is infinite or NaN: a score some 88 nats above its row's reference, or one that is NaN."""
    return ~((sum_M < float("inf")) & (tl.abs(distance_sum_M) < float("inf")))


@triton.jit
def store_rows(row_span, lse, reference_M, sum_M, distance_sum_M, first, head, tokens, ROWS: tl.constexpr):
    """Row spans and lse of the rows that exist; NaN where a score is NaN or +inf, or all are −inf."""
    row_M = tl.arange(0, ROWS)
    defined_M = (sum_M > 0) & (sum_M < float("inf")) & (reference_M < float("inf"))
    span_M = tl.where(defined_M, distance_sum_M / sum_M + row_M.to(tl.float32), float("nan"))
    lse_M = tl.where(defined_M, (reference_M + tl.log2(sum_M)) * 0.6931471805599453, float("nan"))
    at_M = head.to(tl.int64) * tokens + first + row_M
    tl.store(row_span + at_M, span_M, mask=first + row_M < tokens)
    tl.store(lse + at_M, lse_M, mask=first + row_M < tokens)


@triton.jit
def store_out(out, out_MD, sum_M, first, head, tokens, heads, ROWS: tl.constexpr, D: tl.constexpr):
    """The rows' outputs, [T, Hq, D]."""
    row_M = first + tl.arange(0, ROWS)
    at_MD = (row_M.to(tl.int64) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + at_MD, (out_MD / sum_M[:, None]).to(out.dtype.element_ty), mask=(row_M < tokens)[:, None])
