"""Sums over columns given lse, key-stationary: a program owns keys and visits the rows whose horizon reaches them.

They are FAI, the mean of the weights that a key receives; or their sum with a factor for each row, or the largest
(column_sums.py).

No sum is shared between programs, so there are no atomics and reruns are bit-equal. Rows for which the whole tile lies
within the horizon go through a loop without masks. Rows whose sliding window hides a key count in its mean with weight
0, and are not visited.

Shape suffixes: N keys and M rows of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import Forms, common_arguments
from rhythm.kernels.launch import options
from rhythm.kernels.scores import capped
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.tile_tables import Tile
from rhythm.kernels.tiles import (
    INTERPRETED,
    LOG2_E,
    dot,
    head_base,
    load_rows,
    load_tma,
    query_base,
    signed,
    tma_descriptor,
)


@triton.jit
def exponents(product_MN, lse, parts, row, end, scale, cap_scale, EXACT: tl.constexpr):
    """[M, N] log2 of the attention weights of the rows from `row` on, from their products with keys; undefined from row
    `end` on.

    lse and parts point at the sequence's first row. With parts (softmax.py) the weights are exact, however large scores
    are, where EXACT; else they follow lse.
    """
    row_M = row + tl.arange(0, product_MN.shape[0])
    score_MN = capped(product_MN, cap_scale)
    if EXACT and parts is not None:
        largest_M = tl.load(parts + 2 * row_M, mask=row_M < end, other=0.0)
        log2_sum_M = tl.load(parts + 2 * row_M + 1, mask=row_M < end, other=0.0)
        return (score_MN - largest_M[:, None]) * scale - log2_sum_M[:, None]
    else:
        lse_M = tl.load(lse + row_M, mask=row_M < end, other=float("inf"))
        return score_MN * scale - (lse_M * LOG2_E)[:, None]


@triton.jit
def weights(product_MN, lse, parts, row, end, scale, cap_scale, EXACT: tl.constexpr):
    """[M, N] attention weights, from what `exponents` takes."""
    return tl.exp2(exponents(product_MN, lse, parts, row, end, scale, cap_scale, EXACT))


@triton.jit
def partial_sum(p_MN):
    """[M / 16, 8, N]: rows r and r + 8 added. One thread holds both, so nothing moves between threads."""
    return tl.sum(tl.reshape(p_MN, [p_MN.shape[0] // 16, 2, 8, p_MN.shape[1]]), 1)


@triton.jit
def larger(x, y):
    """Elementwise, NaN where either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Along an axis, NaN where one is: Triton's own maximum leaves NaN out."""
    undefined = tl.max((x != x).to(tl.int32), AXIS) > 0
    return tl.where(undefined, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), AXIS))


@triton.jit
def partial_max(x_MN):
    """[M / 16, 8, N]: the larger of rows r and r + 8, as partial_sum."""
    pair = tl.reshape(x_MN, [x_MN.shape[0] // 16, 2, 8, x_MN.shape[1]])
    if INTERPRETED:  # its reductions by functions take seconds
        one, other = tl.split(tl.permute(pair, (0, 2, 3, 1)))
        return larger(one, other)
    else:
        return tl.reduce(pair, 1, larger)


@triton.jit
def terms(exponent_MN, factors, row, end, MAX: tl.constexpr):
    """What the rows from `row` on add to `combined`: weights, times the rows' factors if there are any; without factors
    the largest weight is found among exponents.

    A row whose factor is 0 takes no part, so that a NaN in it stays there.
    """
    if factors is None:
        return exponent_MN if MAX else tl.exp2(exponent_MN)
    else:
        row_M = row + tl.arange(0, exponent_MN.shape[0])
        factor_M = tl.load(factors + row_M, mask=row_M < end, other=0.0)
        weighted_MN = tl.exp2(exponent_MN) * factor_M[:, None]
        return tl.where((factor_M != 0)[:, None], weighted_MN, float("-inf") if MAX else 0.0)


@triton.jit
def combined(total, term_MN, MAX: tl.constexpr):
    """[M / 16, 8, N]: total and the terms of a tile, added, or where MAX the largest."""
    return larger(total, partial_max(term_MN)) if MAX else total + partial_sum(term_MN)


@triton.jit
def add_edge(
    total, strides, k_ND, q_base, lse, parts, factors, first, begin, end, length, scale, cap_scale, lo, hi,
    ROWS: tl.constexpr, MAX: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """`combined` with rows begin … end − 1, some of which may lie outside the horizon of some keys."""
    key_N = first + tl.arange(0, k_ND.shape[0])
    for row in tl.range(begin, end, ROWS, num_stages=1):
        q_MD = load_rows(q_base, strides, row, length, ROWS, True, form)
        exponent_MN = exponents(dot(q_MD, k_ND, form), lse, parts, row, end, scale, cap_scale, True)
        term_MN = terms(exponent_MN, factors, row, end, MAX)
        row_M = row + tl.arange(0, ROWS)
        distance_MN = row_M[:, None] - key_N[None, :]
        # Rows from `end` on are masked as well: their scores may be NaN.
        within_MN = (distance_MN >= lo) & (distance_MN <= hi) & (row_M < end)[:, None]
        total = combined(total, tl.where(within_MN, term_MN, float("-inf") if MAX else 0.0), MAX)
    return total


@triton.jit
def column_program(
    program, programs, head, q, k, q_tiles, lengths, lse, parts, steep, columns, strides, sequences, tokens, scale,
    horizon_lo, horizon_hi, rows, sliding_window, cap_scale, form: tl.constexpr, tile: tl.constexpr, factors,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """FAI of one block of keys of one head. The first keys run first, since with open horizons they have most rows.

    With the row sweep's parts and steep (softmax.py, else None) the loop without masks takes no rows if scores are
    steep. Every second program of bands_kernel runs it. rows … cap_scale may be None (arguments.py).

    REDUCE: "mean", which is FAI; or, with factors of the rows or without, "sum", 0 for a key that no row reaches, or
    "max", −inf for such a key.
    """
    MAX: tl.constexpr = REDUCE == "max"
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    sequence, first, start, length, prompt, first_row, missing = locate(
        programs - 1 - program, programs, lengths, sequences, tokens, rows, "token", KEYS
    )
    if first < length:
        q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
        k_base = head_base(k, strides.k, sequence, start, head // form.group, form)
        of_head = head.to(tl.int64) * tokens + start
        lse_base = lse + of_head
        parts_base = None if parts is None else parts + 2 * of_head
        k_ND = signed(load_rows(k_base, strides.k, first, length, KEYS, True, form), form.sign)

        last = tl.minimum(first + KEYS, length) - 1
        reach = horizon_hi
        if sliding_window is not None:
            reach = tl.minimum(reach, sliding_window - 1)
        hi = tl.minimum(reach, length)
        # Rows reached by some key; among them those that every key of the block reaches, in whole blocks of rows.
        begin = tl.maximum(prompt, first + horizon_lo)
        end = tl.minimum(length, last + hi + 1)
        inner = tl.minimum(tl.maximum(begin, last + horizon_lo), tl.maximum(end, begin))
        inner_end = inner + tl.maximum(tl.minimum(end, first + hi + 1) - inner, 0) // ROWS * ROWS
        if steep is not None:
            inner_end = tl.where(tl.load(steep) != 0, inner, inner_end)

        factors_base = None if factors is None else factors + of_head
        total = tl.zeros([ROWS // 16, 8, KEYS], tl.float32)
        if MAX:
            total -= float("inf")
        total = add_edge(
            total, strides.q, k_ND, q_base, lse_base, parts_base, factors_base, first, begin, inner, length, scale,
            cap_scale, horizon_lo, hi, ROWS, MAX, form,
        )  # fmt: skip
        for row in tl.range(inner, inner_end, ROWS, num_stages=tile.stages):
            if tile.tma:
                q_MD = load_tma(q_tiles, sequence, first_row, row - missing, head, ROWS, form)
            else:
                q_MD = load_rows(q_base, strides.q, row, length, ROWS, False, form)
            exponent_MN = exponents(dot(q_MD, k_ND, form), lse_base, parts_base, row, length, scale, cap_scale, False)
            total = combined(total, terms(exponent_MN, factors_base, row, length, MAX), MAX)
        total = add_edge(
            total, strides.q, k_ND, q_base, lse_base, parts_base, factors_base, first, inner_end, end, length, scale,
            cap_scale, horizon_lo, hi, ROWS, MAX, form,
        )  # fmt: skip
        total_N = largest(largest(total, 0), 0) if MAX else tl.sum(tl.sum(total, 0), 0)

        key_N = first + tl.arange(0, KEYS)
        from_N = tl.maximum(prompt, key_N + horizon_lo)
        if REDUCE == "mean":
            count_N = tl.minimum(length - 1, key_N + tl.minimum(horizon_hi, length)) - from_N + 1
            tl.store(columns + of_head + key_N, total_N / count_N.to(tl.float32), mask=(key_N < length) & (count_N > 0))
        else:
            if MAX and factors is None:
                reached_N = from_N <= tl.minimum(length - 1, key_N + hi)
                total_N = tl.where(reached_N, tl.exp2(total_N), float("-inf"))
            tl.store(columns + of_head + key_N, total_N, mask=key_N < length)


def column_arguments(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    scale: float,
    horizon: tuple[int, int | None],
    forms: Forms,
) -> dict[str, Any]:
    """Arguments by name of column_program that don't depend on the tile, without parts, steep and columns."""
    return common_arguments(q, k, sequences, scale, forms) | {
        "lse": lse_HT,
        "horizon_lo": min(horizon[0], sequences.tokens),
        "horizon_hi": sequences.tokens if horizon[1] is None else min(horizon[1], sequences.tokens),
    }


def tile_arguments(q: Tensor, tile: Tile, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, and launch options, that depend on the tile."""
    return {"q_tiles": tma_descriptor(q, tile.rows) if tile.tma else None, "tile": tile, **options(tile, arguments)}
