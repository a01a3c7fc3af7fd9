"""One sweep over the keys for a block of rows: lse, row spans and WAAD, and the output where V is given.

Flash attention's online softmax with two more sums beside Σ p: Σ p·j, j the key's place in its block, from which
Σ p·(t − s) follows by terms of rows alone; and near the diagonal Σ p·(W − (t − s)) over t − s < W, since
Σ A·min(t − s, W) = W − Σ_{t−s<W} A·(W − (t − s)) for rows that sum to 1. The steady loop over far keys has neither
masks nor window weights: a score costs a maximum, a fused multiply-add into exp2, an addition and a multiply-add.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rhythm.kernels.sequences import Sequences, dot_precision, tensor_strides, upcast
from torch import Tensor


@triton.jit
def load_rows(
    base, row_M, end, stride_token, stride_dim, SIZE: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr
):
    """[M, D] rows of one head; 0 beyond row `end` and beyond the head size."""
    dim_D = tl.arange(0, PADDED)
    offset_MD = row_M[:, None].to(tl.int64) * stride_token + dim_D[None, :] * stride_dim
    x_MD = tl.load(base + offset_MD, mask=(row_M < end)[:, None] & (dim_D < SIZE)[None, :], other=0.0)
    return x_MD.to(tl.float32) if UPCAST else x_MD


@triton.jit
def absorb(
    q_MD, k_base, v_base, key, row_M, length, scale, window, state_max, state_sum, state_place, state_window, out_MD,
    k_token, k_dim, v_token, v_dim,
    NEAR: tl.constexpr, VALUES: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax; NEAR: it may lie above the diagonal or within the window."""
    place_N = tl.arange(0, BLOCK_N)
    k_ND = load_rows(k_base, key + place_N, length, k_token, k_dim, SIZE, PADDED, UPCAST)
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    distance_MN = (row_M - key)[:, None] - place_N[None, :]
    if NEAR:
        score_MN = tl.where(distance_MN >= 0, score_MN, float("-inf"))
    larger_M = tl.maximum(state_max, tl.max(score_MN, 1) * scale)
    # While every score so far is −inf any finite reference will do.
    reference_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    shrink_M = tl.exp2(state_max - reference_M)
    p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
    sum_M = tl.sum(p_MN, 1)
    state_sum = state_sum * shrink_M + sum_M
    # Σ p·(first row's distance): the key's place is subtracted, the row's own offset is added at the end.
    base_distance = tl.min(row_M, 0) - key
    place_sum_M = tl.sum(p_MN * place_N[None, :].to(tl.float32), 1)
    state_place = state_place * shrink_M + (sum_M * base_distance.to(tl.float32) - place_sum_M)
    state_window = state_window * shrink_M
    if NEAR:
        weight_MN = tl.maximum(window - distance_MN.to(tl.float32), 0.0)
        state_window += tl.sum(p_MN * weight_MN, 1)
    if VALUES:
        v_ND = load_rows(v_base, key + place_N, length, v_token, v_dim, SIZE, PADDED, UPCAST)
        out_MD = out_MD * shrink_M[:, None]
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD, input_precision=PRECISION)
    return larger_M, state_sum, state_place, state_window, out_MD


@triton.jit
def row_sweep_kernel(
    q, k, v, cu_seqlens, prompt_lens, blocks, row_span, waad, lse, out,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim, v_batch, v_token, v_head, v_dim,
    sequences, tokens, programs, scale, sign, window,
    GROUP: tl.constexpr, BATCHED: tl.constexpr, VALUES: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(blocks + program)
    if sequence >= sequences:
        return
    first = tl.load(blocks + programs + program)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    prompt = tl.load(prompt_lens + sequence)
    key_head = head // GROUP

    token = 0 if BATCHED else start
    q_base = q + sequence.to(tl.int64) * q_batch + tl.cast(token, tl.int64) * q_token + head * q_head
    k_base = k + sequence.to(tl.int64) * k_batch + tl.cast(token, tl.int64) * k_token + key_head * k_head
    v_base = v + sequence.to(tl.int64) * v_batch + tl.cast(token, tl.int64) * v_token + key_head * v_head

    row_M = first + tl.arange(0, BLOCK_M)
    q_MD = load_rows(q_base, row_M, length, q_token, q_dim, SIZE, PADDED, UPCAST)
    q_MD = (q_MD * sign).to(q_MD.dtype)  # the sign of the scale, exact in any type
    state_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state_sum = tl.zeros([BLOCK_M], tl.float32)
    state_place = tl.zeros([BLOCK_M], tl.float32)
    state_window = tl.zeros([BLOCK_M], tl.float32)
    out_MD = tl.zeros([BLOCK_M, PADDED if VALUES else 1], tl.float32)

    # Far keys: at distance ≥ window from every row of the block.
    near = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, length)
    for key in range(0, near, BLOCK_N):
        state_max, state_sum, state_place, state_window, out_MD = absorb(
            q_MD, k_base, v_base, key, row_M, length, scale, window,
            state_max, state_sum, state_place, state_window, out_MD, k_token, k_dim, v_token, v_dim,
            False, VALUES, SIZE, PADDED, UPCAST, BLOCK_N, PRECISION,
        )  # fmt: skip
    for key in range(near, end, BLOCK_N):
        state_max, state_sum, state_place, state_window, out_MD = absorb(
            q_MD, k_base, v_base, key, row_M, length, scale, window,
            state_max, state_sum, state_place, state_window, out_MD, k_token, k_dim, v_token, v_dim,
            True, VALUES, SIZE, PADDED, UPCAST, BLOCK_N, PRECISION,
        )  # fmt: skip

    defined_M = (state_sum > 0) & (state_max < float("inf"))  # else a score is NaN or +inf, or all are −inf
    offset_M = (row_M - first).to(tl.float32)
    span_M = tl.where(defined_M, state_place / state_sum + offset_M, float("nan"))
    waad_M = tl.where(defined_M, window - state_window / state_sum, float("nan"))
    lse_M = tl.where(defined_M, (state_max + tl.log2(state_sum)) * 0.6931471805599453, float("nan"))
    at_M = head.to(tl.int64) * tokens + start + row_M
    response_M = (row_M >= prompt) & (row_M < length)
    tl.store(row_span + at_M, span_M, mask=response_M)
    tl.store(waad + at_M, waad_M, mask=response_M)
    tl.store(lse + at_M, lse_M, mask=response_M)
    if VALUES:
        dim_D = tl.arange(0, PADDED)
        heads = tl.num_programs(1)
        out_offset_MD = ((start + row_M).to(tl.int64) * heads + head)[:, None] * SIZE + dim_D[None, :]
        result_MD = (out_MD / state_sum[:, None]).to(out.dtype.element_ty)
        tl.store(out + out_offset_MD, result_MD, mask=(row_M < length)[:, None] & (dim_D < SIZE)[None, :])


def row_sweep(
    q: Tensor, k: Tensor, v: Tensor | None, sequences: Sequences, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(row spans, waad, lse: each [Hq, T] fp32, NaN on prompt rows; out [T, Hq, D] or None).

    q is [T, Hq, D] or [B, T, Hq, D]; sequences lie on the flattened token axis.
    """
    heads, size = q.shape[-2:]
    padded = max(16, triton.next_power_of_2(size))
    row_span, waad, lse = (torch.full((heads, sequences.tokens), torch.nan, device=q.device) for _ in range(3))
    out = None if v is None else torch.empty((sequences.tokens, heads, size), dtype=q.dtype, device=q.device)
    if sequences.tokens == 0:
        return row_span, waad, lse, out
    block_m, block_n, warps, stages = row_configuration(q.dtype, padded, v is not None)
    blocks, programs = sequences.blocks(block_m, skip_prompts=v is None)
    row_sweep_kernel[(programs, heads)](
        q, k, k if v is None else v, sequences.cu_seqlens, sequences.prompt_lens, blocks, row_span, waad, lse,
        row_span if out is None else out,
        *tensor_strides(q), *tensor_strides(k), *tensor_strides(k if v is None else v),
        sequences.count, sequences.tokens, programs,
        abs(scale) * 1.4426950408889634, -1.0 if scale < 0 else 1.0, window,
        GROUP=heads // k.shape[-2], BATCHED=q.ndim == 4, VALUES=v is not None, SIZE=size, PADDED=padded,
        UPCAST=upcast(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=dot_precision(),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return row_span, waad, lse, out


def row_configuration(dtype: torch.dtype, padded: int, values: bool) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a tile: what fits the registers and shared memory of an SM."""
    if dtype == torch.float32:
        return (64, 32, 4, 2) if padded <= 128 else (32, 32, 4, 1)
    if padded > 128:
        return (64, 64, 4, 2)
    return (128, 64, 8, 3) if values else (128, 128, 8, 3)
