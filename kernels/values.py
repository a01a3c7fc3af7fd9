"""NaN and infinities in v reach the rows that attend to their key, and no others.

A tile on the diagonal multiplies v by weights that are 0 for rows before the key, and 0 · NaN is NaN: the row sweep's
output may hold more NaN than it should. The kernel here reads the output and computes blocks of rows with any NaN once
more, slowly.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms, common_arguments, scales
from rhythm.kernels.launch import launch
from rhythm.kernels.scores import capped_products, denominator, first_visible
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.tiles import head_base, load_q, load_rows, query_base

ROWS, KEYS = 32, 16


@triton.jit
def masked_products(
    q_MD, k_base, strides, key, first, length, sliding_window, cap_scale, KEYS: tl.constexpr, form: tl.constexpr
):
    """[M, N] products of the rows with the keys from `key` on; −inf where a row doesn't see a key."""
    k_ND = load_rows(k_base, strides, key, length, KEYS, True, form)
    distance_MN = (first + tl.arange(0, q_MD.shape[0]))[:, None] - (key + tl.arange(0, KEYS))[None, :]
    visible_MN = distance_MN >= 0
    if sliding_window is not None:
        visible_MN = visible_MN & (distance_MN < sliding_window)
    return tl.where(visible_MN, capped_products(q_MD, k_ND, cap_scale, form), float("-inf"))


@triton.jit(do_not_specialize=["sequences", "tokens", "rows", "sliding_window"])
def mend_output_kernel(
    q, k, v, lengths, out, strides, sequences, tokens, heads, scale, natural_scale, rows, sliding_window, cap_scale,
    sinks, form: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Computes the output of one block of rows of one head again if it holds NaN."""
    PADDED: tl.constexpr = form.padded
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, first, start, length, _, first_row, missing = locate(
        program, tl.num_programs(0) // heads, lengths, sequences, tokens, rows, "row", ROWS
    )
    if first >= length:
        return
    row_M, place_N, dim_D = first + tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    at_MD = ((first_row - missing + row_M).to(tl.int64) * heads + head)[:, None] * form.size + dim_D[None, :]
    stored_MD = (row_M < length)[:, None] & (dim_D < form.size)[None, :]
    swept_MD = tl.load(out + at_MD, mask=stored_MD, other=0.0).to(tl.float32)
    if tl.max(tl.max((swept_MD != swept_MD).to(tl.int32), 1), 0) == 0:
        return

    key_head = head // form.group
    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, key_head, form)
    v_base = head_base(v, strides.v, sequence, start, key_head, form)
    q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
    begin, end = first_visible(first, sliding_window), tl.minimum(first + ROWS, length)
    largest_M = tl.zeros([ROWS], tl.float32) - float("inf")
    for key in tl.range(begin, end, KEYS, num_stages=1):
        score_MN = masked_products(q_MD, k_base, strides.k, key, first, length, sliding_window, cap_scale, KEYS, form)
        largest_M = tl.maximum(largest_M, tl.max(score_MN, 1))
    reference_M = tl.where(largest_M == float("-inf"), 0.0, largest_M)
    sum_M, out_MD = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for key in tl.range(begin, end, KEYS, num_stages=1):
        score_MN = masked_products(q_MD, k_base, strides.k, key, first, length, sliding_window, cap_scale, KEYS, form)
        p_MN = tl.exp2((score_MN - reference_M[:, None]) * scale)
        sum_M += tl.sum(p_MN, 1)
        v_ND = load_rows(v_base, strides.v, key, length, KEYS, True, form)
        finite_ND = tl.abs(v_ND.to(tl.float32)) < float("inf")
        v_ND = tl.where(finite_ND, v_ND, 0.0).to(v_ND.dtype)
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD, input_precision=form.precision)
        finite_N = tl.min(finite_ND.to(tl.int32), 1)
        if tl.min(finite_N, 0) == 0:
            for j in tl.range(0, KEYS, num_stages=1):
                if tl.min(tl.where(place_N == j, finite_N, 1), 0) == 0:
                    at_D = v_base + tl.cast(key + j, tl.int64) * strides.v.token + dim_D.to(tl.int64) * strides.v.dim
                    v_D = tl.load(at_D, mask=dim_D < form.size, other=0.0).to(tl.float32)
                    v_D = tl.where(tl.abs(v_D) < float("inf"), 0.0, v_D)
                    p_M = tl.sum(tl.where((place_N == j)[None, :], p_MN, 0.0), 1)
                    sees_M = row_M >= key + j
                    if sliding_window is not None:
                        sees_M = sees_M & (row_M - key - j < sliding_window)
                    reached_MD = sees_M[:, None] & (v_D != 0.0)[None, :]
                    out_MD += tl.where(reached_MD, p_M[:, None] * v_D[None, :], 0.0)
    total_M, _, defined_M = denominator(largest_M, sum_M, natural_scale, sinks, head)
    out_MD = tl.where(defined_M[:, None], out_MD / total_M[:, None], float("nan"))
    tl.store(out + at_MD, out_MD.to(out.dtype.element_ty), mask=stored_MD)


def mend_output(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, out_SHD: Tensor, *, scale: float, forms: Forms = PLAIN
) -> None:
    """Corrects the row sweep's out_SHD where it is NaN; an output without NaN is only read, once."""
    launch(
        mend_output_kernel,
        q.shape[-2] * sequences.blocks(ROWS),
        v=v,
        out=out_SHD,
        natural_scale=scales(scale, forms.softcap).natural,
        sinks=forms.sinks,
        ROWS=ROWS,
        KEYS=KEYS,
        num_warps=4,
        num_stages=1,
        **common_arguments(q, k, sequences, scale, forms, v),
    )
