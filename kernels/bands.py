"""WAAD and FAI for a lse that came from outside, in one launch: only tiles near the diagonal are visited.

Programs come in pairs for the same tokens, so that what one reads is at hand for the other: one owns a block of keys
(FAI, as in column_sweep.py), one a block of rows (WAAD).

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.column_sweep import column_arguments, column_kind, column_program, tile_arguments
from rhythm.kernels.configurations import Tile
from rhythm.kernels.launch import launch, start
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.tiles import describable, head_base, load_q, load_rows, product
from rhythm.kernels.tuning import Sample


@triton.jit
def window_program(
    program, programs, head, q, k, cu_seqlens, prompt_lens, lse, waad, lse_out,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, scale, window,
    SIGN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WAAD of one block of rows of one head: W − Σ A·(W − distance) over the keys within the window.

    Where these are all keys of the block, Σ A·min(distance, W): of a W beyond the sequence nothing would be left. With
    `top` W or 0, both are top − Σ A·max(top − distance, top − W).
    """
    sequence, start, length, _, first = locate(
        programs - 1 - program, programs, cu_seqlens, prompt_lens, sequences, tokens, PACKED, PROMPTS, True, ROWS
    )
    if first < length:
        top = tl.where(window > first, 0, window)
        q_base = head_base(q, sequence, start, head, q_batch, q_token, q_head, BATCHED)
        k_base = head_base(k, sequence, start, head // GROUP, k_batch, k_token, k_head, BATCHED)
        row_M = first + tl.arange(0, ROWS)
        at_M = head.to(tl.int64) * tokens + start + row_M
        q_MD = load_q(q_base, first, length, q_token, q_dim, SIGN, ROWS, SIZE, PADDED, WIDE, UPCAST)
        lse_M = tl.load(lse + at_M, mask=row_M < length, other=float("inf"))
        inside_M = tl.zeros([ROWS], tl.float32)
        RELOAD: tl.constexpr = PRECISION == "ieee" and q_MD.dtype == tl.float32  # as in row_sweep.py
        for key in tl.range(
            tl.maximum(first - window + 1, 0), tl.minimum(first + ROWS, length), KEYS, num_stages=1, disable_licm=RELOAD
        ):
            if RELOAD:
                q_MD = load_q(q_base, first, length, q_token, q_dim, SIGN, ROWS, SIZE, PADDED, WIDE, UPCAST)
            k_ND = load_rows(k_base, key, length, k_token, k_dim, KEYS, True, SIZE, PADDED, WIDE, UPCAST)
            place_N = (tl.arange(0, KEYS) + (key - first)).to(tl.float32)
            distance_MN = tl.arange(0, ROWS).to(tl.float32)[:, None] - place_N[None, :]
            exponent_MN = product(q_MD, k_ND, PRECISION) * scale - (lse_M * 1.4426950408889634)[:, None]
            p_MN = tl.exp2(tl.where(distance_MN >= 0, exponent_MN, float("-inf")))
            inside_M += tl.sum(p_MN * tl.maximum(top - distance_MN, (top - window).to(tl.float32)), 1)
        tl.store(waad + at_M, top - inside_M, mask=row_M < length)
        # A row whose lse is not finite has no weights: both are undefined, here as in the full sweep.
        tl.store(lse_out + at_M, tl.where(inside_M == inside_M, lse_M, float("nan")), mask=row_M < length)


@triton.jit(do_not_specialize=["sequences", "tokens", "window", "horizon_lo", "horizon_hi"])
def bands_kernel(
    q, k, q_tiles, cu_seqlens, prompt_lens, lse, fai, waad, lse_out,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, heads, scale, window, horizon_lo, horizon_hi,
    SIGN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0) // (2 * heads), tl.program_id(0) // 2 % heads
    programs = tl.num_programs(0) // (2 * heads)
    if tl.program_id(0) % 2 == 0:
        column_program(
            program, programs, head, q, k, q_tiles, cu_seqlens, prompt_lens, lse, lse, lse, fai,
            q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
            sequences, tokens, scale, horizon_lo, horizon_hi,
            SIGN, GROUP, PACKED, PROMPTS, BATCHED, SIZE, PADDED, WIDE, UPCAST, ROWS, KEYS, STAGES, TMA, PRECISION,
            False,
        )  # fmt: skip
    else:
        window_program(
            program, programs, head, q, k, cu_seqlens, prompt_lens, lse, waad, lse_out,
            q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
            sequences, tokens, scale, window,
            SIGN, GROUP, PACKED, PROMPTS, BATCHED, SIZE, PADDED, WIDE, UPCAST, KEYS, KEYS if KEYS < 32 else 32,
            PRECISION,
        )  # fmt: skip


def bands(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    waad_HT: Tensor,
    fai_HT: Tensor,
    lse_out_HT: Tensor,
    *,
    scale: float,
    window: int,
    horizon: tuple[int, int | None],
) -> None:
    """Fills WAAD and FAI and copies lse, each fp32 [Hq, T], at the response rows and at the keys that these reach.

    lse_HT is finite or NaN (results.py); where it is NaN, so is what the row touches.
    """
    arguments = column_arguments(q, k, lse_HT, sequences, fai_HT, scale, horizon)
    arguments |= {"waad": waad_HT, "lse_out": lse_out_HT, "window": min(window, sequences.tokens)}

    def run(tile: Tile) -> None:
        programs = 2 * q.shape[-2] * sequences.blocks(tile.keys)
        start(bands_kernel, programs, **arguments, **tile_arguments(q, tile))

    def again(sample: Sample) -> None:
        bands(
            sample.q, sample.k, sample.lse, sample.sequences, *sample.results,
            scale=scale, window=window, horizon=horizon,
        )  # fmt: skip

    launch(column_kind("bands", q, horizon), q, k, describable(q), run, again)
