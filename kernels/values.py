"""NaN and infinities in v reach the rows that see their key, and no others.

A tile on the diagonal multiplies values by the 0 of the rows before their key, which makes NaN of them: the row sweep's
output may have more NaN than it should. Blocks of rows with any are computed once more here, slowly; others are only
read.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.launch import start
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.tiles import common_arguments, head_base, load_q, load_rows, product, scales, strides, wide

ROWS, KEYS = 32, 16


@triton.jit
def exponents(q_MD, k_base, key, first, length, k_token, k_dim, SIZE, PADDED, WIDE, UPCAST, KEYS, PRECISION):
    """[M, N] products of the rows with the keys from `key` on; −inf above the diagonal."""
    k_ND = load_rows(k_base, key, length, k_token, k_dim, KEYS, True, SIZE, PADDED, WIDE, UPCAST)
    row_M, key_N = first + tl.arange(0, q_MD.shape[0]), key + tl.arange(0, KEYS)
    return tl.where(row_M[:, None] >= key_N[None, :], product(q_MD, k_ND, PRECISION), float("-inf"))


@triton.jit(do_not_specialize=["sequences", "tokens"])
def mend_output_kernel(
    q, k, v, cu_seqlens, prompt_lens, out,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim, v_batch, v_token, v_head, v_dim,
    sequences, tokens, heads, scale, natural_scale,
    SIGN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, start, length, _, first = locate(
        program, tl.num_programs(0) // heads, cu_seqlens, prompt_lens, sequences, tokens, PACKED, PROMPTS, False, ROWS
    )
    if first >= length:
        return
    row_M, place_N, dim_D = first + tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    at_MD = ((start + row_M).to(tl.int64) * heads + head)[:, None] * SIZE + dim_D[None, :]
    stored_MD = (row_M < length)[:, None] & (dim_D < SIZE)[None, :]
    swept_MD = tl.load(out + at_MD, mask=stored_MD, other=0.0).to(tl.float32)
    if tl.max(tl.max((swept_MD != swept_MD).to(tl.int32), 1), 0) == 0:
        return

    q_base = head_base(q, sequence, start, head, q_batch, q_token, q_head, BATCHED)
    k_base = head_base(k, sequence, start, head // GROUP, k_batch, k_token, k_head, BATCHED)
    v_base = head_base(v, sequence, start, head // GROUP, v_batch, v_token, v_head, BATCHED)
    q_MD = load_q(q_base, first, length, q_token, q_dim, SIGN, ROWS, SIZE, PADDED, WIDE, UPCAST)
    end = tl.minimum(first + ROWS, length)
    largest_M = tl.zeros([ROWS], tl.float32) - float("inf")
    for key in tl.range(0, end, KEYS, num_stages=1):
        score_MN = exponents(
            q_MD, k_base, key, first, length, k_token, k_dim, SIZE, PADDED, WIDE, UPCAST, KEYS, PRECISION
        )
        largest_M = tl.maximum(largest_M, tl.max(score_MN, 1))
    logit_M = largest_M * natural_scale
    reference_M = tl.where(largest_M == float("-inf"), 0.0, largest_M)
    sum_M, out_MD = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for key in tl.range(0, end, KEYS, num_stages=1):
        score_MN = exponents(
            q_MD, k_base, key, first, length, k_token, k_dim, SIZE, PADDED, WIDE, UPCAST, KEYS, PRECISION
        )
        p_MN = tl.exp2((score_MN - reference_M[:, None]) * scale)
        sum_M += tl.sum(p_MN, 1)
        v_ND = load_rows(v_base, key, length, v_token, v_dim, KEYS, True, SIZE, PADDED, WIDE, UPCAST)
        finite_ND = tl.abs(v_ND.to(tl.float32)) < float("inf")
        v_ND = tl.where(finite_ND, v_ND, 0.0).to(v_ND.dtype)
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD, input_precision=PRECISION)
        finite_N = tl.min(finite_ND.to(tl.int32), 1)
        if tl.min(finite_N, 0) == 0:
            for j in tl.range(0, KEYS, num_stages=1):
                if tl.min(tl.where(place_N == j, finite_N, 1), 0) == 0:
                    at_D = v_base + tl.cast(key + j, tl.int64) * v_token + dim_D.to(tl.int64) * v_dim
                    v_D = tl.load(at_D, mask=dim_D < SIZE, other=0.0).to(tl.float32)
                    v_D = tl.where(tl.abs(v_D) < float("inf"), 0.0, v_D)
                    p_M = tl.sum(tl.where((place_N == j)[None, :], p_MN, 0.0), 1)
                    reached_MD = (row_M >= key + j)[:, None] & (v_D != 0.0)[None, :]
                    out_MD += tl.where(reached_MD, p_M[:, None] * v_D[None, :], 0.0)
    defined_M = (sum_M > 0) & (tl.abs(logit_M) < float("inf"))
    out_MD = tl.where(defined_M[:, None], out_MD / sum_M[:, None], float("nan"))
    tl.store(out + at_MD, out_MD.to(out.dtype.element_ty), mask=stored_MD)


def mend_output(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, out_THD: Tensor, *, scale: float) -> None:
    """Sets what the row sweep left as NaN in out_THD to what it is. Reads the output once where there is none."""
    arguments = common_arguments(q, k, sequences, scale)
    arguments["WIDE"] = arguments["WIDE"] or wide(v)
    v_batch, v_token, v_head, v_dim = strides(v)
    heads = q.shape[-2]
    start(
        mend_output_kernel,
        heads * sequences.blocks(ROWS),
        v=v,
        out=out_THD,
        v_batch=v_batch,
        v_token=v_token,
        v_head=v_head,
        v_dim=v_dim,
        natural_scale=scales(scale)["natural_scale"],
        ROWS=ROWS,
        KEYS=KEYS,
        num_warps=4,
        num_stages=1,
        **arguments,
    )
