"""FAI given lse, key-stationary: a program owns a block of keys and visits the rows whose horizon reaches them.

No sum is shared between programs, so there are no atomics and reruns are bit-equal. Rows for which the whole tile lies
within the horizon go through a loop without masks.

Shape suffixes: N keys and M rows of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.configurations import Kind, Tile
from rhythm.kernels.launch import launch, options, start
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tiles import (
    common_arguments,
    describable,
    descriptor,
    head_base,
    load_descriptor,
    load_rows,
    padded_size,
    product,
    signed,
)
from rhythm.kernels.tuning import Sample


@triton.jit
def weights(q_MD, k_ND, lse, parts, row, end, scale, EXACT: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr):
    """[M, N] attention weights of the rows from `row` on; anything from row `end` on.

    lse and parts point at the sequence's first. OWN: by the parts (softmax.py), and so EXACT however large scores are.
    """
    row_M = row + tl.arange(0, q_MD.shape[0])
    score_MN = product(q_MD, k_ND, PRECISION)
    if OWN:
        largest_M = tl.load(parts + 2 * row_M, mask=row_M < end, other=0.0)
        log2_sum_M = tl.load(parts + 2 * row_M + 1, mask=row_M < end, other=0.0)
        if EXACT:
            return tl.exp2((score_MN - largest_M[:, None]) * scale - log2_sum_M[:, None])
        else:
            return tl.exp2(score_MN * scale - (largest_M * scale + log2_sum_M)[:, None])
    else:
        lse_M = tl.load(lse + row_M, mask=row_M < end, other=float("inf"))
        return tl.exp2(score_MN * scale - (lse_M * 1.4426950408889634)[:, None])


@triton.jit
def folded(p_MN):
    """[M / 16, 8, N]: rows r and r + 8 added. A thread holds both of them, so that nothing moves between threads."""
    return tl.sum(tl.reshape(p_MN, [p_MN.shape[0] // 16, 2, 8, p_MN.shape[1]]), 1)


@triton.jit
def add_edge(
    total, k_ND, q_base, lse, parts, first, begin, end, length, scale, lo, hi, q_token, q_dim,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Adds the weights of rows begin … end − 1, of which some may be outside of some key's horizon."""
    key_N = first + tl.arange(0, k_ND.shape[0])
    for row in tl.range(begin, end, ROWS, num_stages=STAGES):
        q_MD = load_rows(q_base, row, length, q_token, q_dim, ROWS, True, SIZE, PADDED, WIDE, UPCAST)
        p_MN = weights(q_MD, k_ND, lse, parts, row, end, scale, True, OWN, PRECISION)
        row_M = row + tl.arange(0, ROWS)
        distance_MN = row_M[:, None] - key_N[None, :]
        # Rows from `end` on are masked as well: a score that is not a number has no weight there.
        within_MN = (distance_MN >= lo) & (distance_MN <= hi) & (row_M < end)[:, None]
        total += folded(tl.where(within_MN, p_MN, 0.0))
    return total


@triton.jit
def column_program(
    program, programs, head, q, k, q_tiles, cu_seqlens, prompt_lens, lse, parts, steep, fai,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, scale, horizon_lo, horizon_hi,
    SIGN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """FAI of one block of keys of one head. From the first keys on: to the end of the sequence these have most rows.

    OWN: lse is the row sweep's, which left its parts; unless scores are steep the loop without masks adds them up.
    """
    sequence, start, length, prompt, first = locate(
        programs - 1 - program, programs, cu_seqlens, prompt_lens, sequences, tokens, PACKED, PROMPTS, False, KEYS
    )
    if first < length:
        q_base = head_base(q, sequence, start, head, q_batch, q_token, q_head, BATCHED)
        k_base = head_base(k, sequence, start, head // GROUP, k_batch, k_token, k_head, BATCHED)
        of_head = head.to(tl.int64) * tokens + start
        lse_base, parts_base = lse + of_head, parts + 2 * of_head
        k_ND = signed(load_rows(k_base, first, length, k_token, k_dim, KEYS, True, SIZE, PADDED, WIDE, UPCAST), SIGN)

        last = tl.minimum(first + KEYS, length) - 1
        hi = tl.minimum(horizon_hi, length)
        # Rows reached by some key; among them those that every key of the block reaches, in whole blocks of rows.
        begin = tl.maximum(prompt, first + horizon_lo)
        end = tl.minimum(length, last + hi + 1)
        inner = tl.minimum(tl.maximum(begin, last + horizon_lo), tl.maximum(end, begin))
        inner_end = inner + tl.maximum(tl.minimum(end, first + hi + 1) - inner, 0) // ROWS * ROWS
        if OWN:
            inner_end = tl.where(tl.load(steep) != 0, inner, inner_end)

        total = tl.zeros([ROWS // 16, 8, KEYS], tl.float32)
        total = add_edge(
            total, k_ND, q_base, lse_base, parts_base, first, begin, inner, length, scale, horizon_lo, hi, q_token,
            q_dim, SIZE, PADDED, WIDE, UPCAST, ROWS, 1, PRECISION, OWN,
        )  # fmt: skip
        for row in tl.range(inner, inner_end, ROWS, num_stages=STAGES):
            if TMA:
                q_MD = load_descriptor(q_tiles, sequence, start, row, head, ROWS, PADDED, BATCHED, UPCAST)
            else:
                q_MD = load_rows(q_base, row, length, q_token, q_dim, ROWS, False, SIZE, PADDED, WIDE, UPCAST)
            total += folded(weights(q_MD, k_ND, lse_base, parts_base, row, length, scale, False, OWN, PRECISION))
        total = add_edge(
            total, k_ND, q_base, lse_base, parts_base, first, inner_end, end, length, scale, horizon_lo, hi, q_token,
            q_dim, SIZE, PADDED, WIDE, UPCAST, ROWS, 1, PRECISION, OWN,
        )  # fmt: skip
        total_N = tl.sum(tl.sum(total, 0), 0)

        key_N = first + tl.arange(0, KEYS)
        from_N = tl.maximum(prompt, key_N + horizon_lo)
        count_N = tl.minimum(length - 1, key_N + hi) - from_N + 1
        tl.store(fai + of_head + key_N, total_N / count_N.to(tl.float32), mask=(key_N < length) & (count_N > 0))


@triton.jit(do_not_specialize=["sequences", "tokens", "horizon_lo", "horizon_hi"])
def column_sweep_kernel(
    q, k, q_tiles, cu_seqlens, prompt_lens, lse, parts, steep, fai,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, heads, scale, horizon_lo, horizon_hi,
    SIGN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    column_program(
        tl.program_id(0) // heads, tl.num_programs(0) // heads, tl.program_id(0) % heads,
        q, k, q_tiles, cu_seqlens, prompt_lens, lse, parts, steep, fai,
        q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
        sequences, tokens, scale, horizon_lo, horizon_hi,
        SIGN, GROUP, PACKED, PROMPTS, BATCHED, SIZE, PADDED, WIDE, UPCAST, ROWS, KEYS, STAGES, TMA, PRECISION, OWN,
    )  # fmt: skip


def column_sweep(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    fai_HT: Tensor,
    *,
    scale: float,
    horizon: tuple[int, int | None],
    softmax: Softmax | None = None,
) -> None:
    """Fills FAI, fp32 [Hq, T], where a response row is within the horizon; lse_HT is read on response rows only.

    softmax: the parts of lse_HT, where it is the row sweep's own.
    """
    arguments = column_arguments(q, k, lse_HT, sequences, fai_HT, scale, horizon)
    arguments |= {
        "parts": lse_HT if softmax is None else softmax.parts,
        "steep": lse_HT if softmax is None else softmax.steep,
        "OWN": softmax is not None,
    }

    def run(tile: Tile) -> None:
        programs = q.shape[-2] * sequences.blocks(tile.keys)
        start(column_sweep_kernel, programs, **arguments, **tile_arguments(q, tile))

    def again(sample: Sample) -> None:
        column_sweep(
            sample.q, sample.k, sample.lse, sample.sequences, sample.results[0], scale=scale, horizon=horizon,
            softmax=None if softmax is None else sample.softmax,
        )  # fmt: skip

    launch(column_kind("column", q, horizon), q, k, describable(q), run, again)


def column_arguments(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    fai_HT: Tensor,
    scale: float,
    horizon: tuple[int, int | None],
) -> dict[str, Any]:
    return common_arguments(q, k, sequences, scale) | {
        "lse": lse_HT,
        "fai": fai_HT,
        "horizon_lo": min(horizon[0], sequences.tokens),
        "horizon_hi": sequences.tokens if horizon[1] is None else min(horizon[1], sequences.tokens),
    }


def tile_arguments(q: Tensor, tile: Tile) -> dict[str, Any]:
    return {
        "q_tiles": descriptor(q, tile.rows) if tile.tma else q,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "TMA": tile.tma,
        **options(tile),
    }


def column_kind(sweep: str, q: Tensor, horizon: tuple[int, int | None]) -> Kind:
    return Kind(sweep if horizon[1] is None else f"{sweep}_band", q.element_size(), padded_size(q.shape[-1]))
