"""WAAD for a lse that came from outside: only the tiles within the window of the diagonal are visited.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rhythm.kernels.column_sweep import column_configuration
from rhythm.kernels.row_sweep import load_rows
from rhythm.kernels.sequences import Sequences, dot_precision, tensor_strides, upcast
from torch import Tensor


@triton.jit
def window_band_kernel(
    q, k, cu_seqlens, prompt_lens, blocks, lse, waad,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, programs, scale, window,
    GROUP: tl.constexpr, BATCHED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(blocks + program)
    if sequence >= sequences:
        return
    first = tl.load(blocks + programs + program)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start

    token = 0 if BATCHED else start
    q_base = q + sequence.to(tl.int64) * q_batch + tl.cast(token, tl.int64) * q_token + head * q_head
    k_base = k + sequence.to(tl.int64) * k_batch + tl.cast(token, tl.int64) * k_token + (head // GROUP) * k_head
    at = head.to(tl.int64) * tokens + start

    row_M = first + tl.arange(0, BLOCK_M)
    q_MD = load_rows(q_base, row_M, length, q_token, q_dim, SIZE, PADDED, UPCAST)
    lse_M = tl.load(lse + at + row_M, mask=row_M < length, other=float("inf"))
    missing_M = tl.zeros([BLOCK_M], tl.float32)
    for key in range(tl.maximum(first - window + 1, 0), tl.minimum(first + BLOCK_M, length), BLOCK_N):
        key_N = key + tl.arange(0, BLOCK_N)
        k_ND = load_rows(k_base, key_N, length, k_token, k_dim, SIZE, PADDED, UPCAST)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        p_MN = tl.exp2(score_MN * scale - (lse_M * 1.4426950408889634)[:, None])
        distance_MN = row_M[:, None] - key_N[None, :]
        inside_MN = (distance_MN >= 0) & (distance_MN < window)
        missing_M += tl.sum(tl.where(inside_MN, p_MN * (window - distance_MN).to(tl.float32), 0.0), 1)
    tl.store(waad + at + row_M, window - missing_M, mask=row_M < length)


def window_band(q: Tensor, k: Tensor, lse_HT: Tensor, sequences: Sequences, *, scale: float, window: int) -> Tensor:
    """waad [Hq, T] fp32, NaN on prompt rows."""
    heads, size = q.shape[-2:]
    padded = max(16, triton.next_power_of_2(size))
    waad = torch.full((heads, sequences.tokens), torch.nan, device=q.device)
    if sequences.tokens == 0:
        return waad
    block_m, block_n, warps, stages = column_configuration(q.dtype, padded)
    blocks, programs = sequences.blocks(block_m, skip_prompts=True)
    window_band_kernel[(programs, heads)](
        q, k, sequences.cu_seqlens, sequences.prompt_lens, blocks, lse_HT, waad,
        *tensor_strides(q), *tensor_strides(k),
        sequences.count, sequences.tokens, programs, scale * 1.4426950408889634, window,
        GROUP=heads // k.shape[-2], BATCHED=q.ndim == 4, SIZE=size, PADDED=padded, UPCAST=upcast(q.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=dot_precision(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return waad
