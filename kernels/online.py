"""Flash attention's online softmax with Σ p·distance, and what finished rows store: shared by the row sweeps.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.scores import capped_products, denominator, log_denominator
from rhythm.kernels.tiles import LOG2_E, STEEP


class RowResults(NamedTuple):
    """What the kernels write: BlockSums.sums; lse, fp32 [Hq, T]; Softmax.parts and .steep; the output.

    Without a softmax parts and steep are None, and without values out is.
    """

    sums: Tensor
    lse: Tensor
    parts: Tensor | None
    steep: Tensor | None
    out: Tensor | None


@triton.jit
def masked(score_MN, key, first, sliding_window, CAUSAL: tl.constexpr):
    """Scores of the rows from `first` and the keys from `key` on; −inf beyond the sliding window and, where CAUSAL,
    above the diagonal.
    """
    row_M = tl.arange(0, score_MN.shape[0]) + (first - key)
    key_N = tl.arange(0, score_MN.shape[1])
    if CAUSAL:
        score_MN = tl.where(key_N[None, :] <= row_M[:, None], score_MN, float("-inf"))
    if sliding_window is not None:
        score_MN = tl.where(key_N[None, :] > (row_M - sliding_window)[:, None], score_MN, float("-inf"))
    return score_MN


@triton.jit
def moments(p_MN):
    """(Σ_j p, Σ_j p·j) of each row: with j = 2i or 2i + 1, sums of neighboring columns serve both."""
    HALF: tl.constexpr = p_MN.shape[1] // 2
    even_M, odd_M = tl.split(tl.reshape(p_MN, [p_MN.shape[0], HALF, 2]))
    place = (2 * tl.arange(0, HALF)).to(tl.float32)[None, :]
    pair_M = even_M + odd_M
    return tl.sum(pair_M, 1), tl.sum(pair_M * place + odd_M, 1)


@triton.jit
def online_softmax_step(
    state, q_MD, k_ND, v_ND, key, first, scale, sliding_window, cap_scale,
    NEAR: tl.constexpr, EDGE: tl.constexpr, VALUES: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the running softmax. NEAR: the tile may lie above the diagonal. EDGE: its keys may lie
    beyond the sliding window.

    state: (largest, Σ p, Σ p·(first row − key), Σ p·v). p is relative to largest, which is a product where NEAR, and
    far from the diagonal that product's exponent, rounded.
    """
    largest_M, sum_M, distance_sum_M, out_MD = state
    score_MN = capped_products(q_MD, k_ND, cap_scale, form)
    if NEAR or EDGE:
        score_MN = masked(score_MN, key, first, sliding_window, NEAR)
    larger_M = tl.maximum(largest_M, tl.max(score_MN, 1) * (1.0 if NEAR else scale))
    # While every score so far is −inf any finite reference will do.
    reference_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    if NEAR:
        shrink_M = tl.exp2((largest_M - reference_M) * scale)
        p_MN = tl.exp2((score_MN - reference_M[:, None]) * scale)
    else:
        shrink_M = tl.exp2(largest_M - reference_M)
        p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
    tile_sum_M, tile_place_M = moments(p_MN)
    sum_M = sum_M * shrink_M + tile_sum_M
    distance_sum_M = distance_sum_M * shrink_M + (tile_sum_M * (first - key).to(tl.float32) - tile_place_M)
    if VALUES:
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD * shrink_M[:, None], input_precision=form.precision)
    return larger_M, sum_M, distance_sum_M, out_MD


@triton.jit
def store_rows(
    results, given_lse, largest_M, sum_M, distance_sum_M, at_M, place_M, response_M, head, scale, natural_scale, sinks,
    sum_at,
):  # fmt: skip
    """Stores what finished rows have but the output. p is relative to the score of the product largest_M; distances are
    relative to the block's first row. at_M: places in results; place_M: places in the block; response_M: rows to store;
    sum_at: where results.sums has the block.
    """
    total_M, logit_M, defined_M = denominator(largest_M, sum_M, natural_scale, sinks, head)
    place_sum_M = place_M.to(tl.float32)
    if sinks is not None:
        place_sum_M = place_sum_M * (sum_M / total_M)
    span_M = tl.where(defined_M, distance_sum_M / total_M + place_sum_M, float("nan"))
    largest_M, log2_total_M, lse_M = log_denominator(largest_M, sum_M, logit_M, defined_M, sinks, head)
    if given_lse is not None:  # weights follow a lse from outside: all those of a row change by the same factor
        given_M = tl.load(given_lse + at_M, mask=response_M, other=0.0)
        span_M *= tl.exp2((lse_M - given_M) * LOG2_E)
    tl.store(sum_at, tl.sum(tl.where(response_M, span_M, 0.0).to(tl.float64), 0))
    tl.store(results.lse + at_M, lse_M, mask=response_M)
    if results.parts is not None:
        tl.store(results.parts + 2 * at_M, largest_M, mask=response_M)
        tl.store(results.parts + 2 * at_M + 1, log2_total_M, mask=response_M)
    if results.steep is not None:
        exponent_M = tl.where(response_M & defined_M, tl.abs(largest_M * scale), 0.0)
        tl.store(results.steep, 1, mask=tl.max(exponent_M, 0) >= STEEP)  # any program that stores it stores 1
