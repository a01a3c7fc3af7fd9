"""FAI given lse, key-stationary: a program owns a block of keys and visits the rows whose horizon reaches them.

No sum is shared between programs, so there are no atomics and reruns are bit-equal. Rows for which the whole tile lies
within the horizon go through a loop without masks.

Shape suffixes: N keys and M rows of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rhythm.kernels.row_sweep import load_rows
from rhythm.kernels.sequences import Sequences, dot_precision, tensor_strides, upcast
from torch import Tensor


@triton.jit
def add_rows(
    k_ND, q_base, lse_base, key_N, begin, end, length, scale, lo, hi, total_N, q_token, q_dim,
    MASKED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the weights of rows begin … end − 1 on the keys, a block of rows at a time."""
    for first in range(begin, end, BLOCK_M):
        row_M = first + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q_base, row_M, length, q_token, q_dim, SIZE, PADDED, UPCAST)
        lse_M = tl.load(lse_base + row_M, mask=row_M < length, other=float("inf"))
        score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION)
        p_NM = tl.exp2(score_NM * scale - (lse_M * 1.4426950408889634)[None, :])
        if MASKED:
            distance_NM = row_M[None, :] - key_N[:, None]
            p_NM = tl.where((distance_NM >= lo) & (distance_NM <= hi) & (row_M < end)[None, :], p_NM, 0.0)
        total_N += tl.sum(p_NM, 1)
    return total_N


@triton.jit
def column_sweep_kernel(
    q, k, cu_seqlens, prompt_lens, blocks, lse, fai,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, programs, scale, horizon_lo, horizon_hi,
    GROUP: tl.constexpr, BATCHED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(blocks + program)
    if sequence >= sequences:
        return
    first_key = tl.load(blocks + programs + program)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    prompt = tl.load(prompt_lens + sequence)

    token = 0 if BATCHED else start
    q_base = q + sequence.to(tl.int64) * q_batch + tl.cast(token, tl.int64) * q_token + head * q_head
    k_base = k + sequence.to(tl.int64) * k_batch + tl.cast(token, tl.int64) * k_token + (head // GROUP) * k_head
    lse_base = lse + head.to(tl.int64) * tokens + start

    key_N = first_key + tl.arange(0, BLOCK_N)
    k_ND = load_rows(k_base, key_N, length, k_token, k_dim, SIZE, PADDED, UPCAST)
    last_key = tl.minimum(first_key + BLOCK_N, length) - 1
    hi = tl.minimum(horizon_hi, length)
    # Rows reached by some key; among them those that every key of the block reaches, in whole blocks of rows.
    begin = tl.maximum(prompt, first_key + horizon_lo)
    end = tl.minimum(length, last_key + hi + 1)
    inner = tl.minimum(tl.maximum(begin, last_key + horizon_lo), tl.maximum(end, begin))
    inner_blocks = tl.maximum(tl.minimum(end, first_key + hi + 1) - inner, 0) // BLOCK_M
    inner_end = inner + inner_blocks * BLOCK_M

    total_N = tl.zeros([BLOCK_N], tl.float32)
    total_N = add_rows(k_ND, q_base, lse_base, key_N, begin, inner, length, scale, horizon_lo, hi, total_N, q_token,
                       q_dim, True, SIZE, PADDED, UPCAST, BLOCK_M, PRECISION)  # fmt: skip
    total_N = add_rows(k_ND, q_base, lse_base, key_N, inner, inner_end, length, scale, horizon_lo, hi, total_N, q_token,
                       q_dim, False, SIZE, PADDED, UPCAST, BLOCK_M, PRECISION)  # fmt: skip
    total_N = add_rows(k_ND, q_base, lse_base, key_N, inner_end, end, length, scale, horizon_lo, hi, total_N, q_token,
                       q_dim, True, SIZE, PADDED, UPCAST, BLOCK_M, PRECISION)  # fmt: skip

    from_N = tl.maximum(prompt, key_N + horizon_lo)
    count_N = tl.minimum(length - 1, key_N + hi) - from_N + 1
    at_N = head.to(tl.int64) * tokens + start + key_N
    tl.store(fai + at_N, total_N / count_N.to(tl.float32), mask=(key_N < length) & (count_N > 0))


def column_sweep(
    q: Tensor, k: Tensor, lse_HT: Tensor, sequences: Sequences, *, scale: float, horizon: tuple[int, int | None]
) -> Tensor:
    """fai [Hq, T] fp32, NaN where no response row is within the horizon; lse_HT is read on response rows only."""
    heads, size = q.shape[-2:]
    padded = max(16, triton.next_power_of_2(size))
    fai = torch.full((heads, sequences.tokens), torch.nan, device=q.device)
    if sequences.tokens == 0:
        return fai
    block_m, block_n, warps, stages = column_configuration(q.dtype, padded)
    blocks, programs = sequences.blocks(block_n, skip_prompts=False)
    # The sign of the scale needs no care here: there is no maximum to find.
    column_sweep_kernel[(programs, heads)](
        q, k, sequences.cu_seqlens, sequences.prompt_lens, blocks, lse_HT, fai,
        *tensor_strides(q), *tensor_strides(k),
        sequences.count, sequences.tokens, programs, scale * 1.4426950408889634, horizon[0],
        sequences.tokens if horizon[1] is None else horizon[1],
        GROUP=heads // k.shape[-2], BATCHED=q.ndim == 4, SIZE=size, PADDED=padded, UPCAST=upcast(q.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=dot_precision(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return fai


def column_configuration(dtype: torch.dtype, padded: int) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a tile. Few rows: a band is narrow, and a tile beyond it is wasted."""
    if dtype == torch.float32:
        return (32, 32, 4, 2)
    return (32, 64, 4, 3) if padded <= 128 else (32, 64, 4, 2)
