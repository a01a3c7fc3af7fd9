"""The attention forward with statistics, fixed reference, plain Triton.

In addition to what the sweep saves, the output needs no rescaling (one multiply per element and tile). P is bf16 in
the second product; bf16 has fp32's range, so the same reference works. A block is flagged if a sum or an element of
Σ p·v overflows, and a second launch recomputes it with the online softmax.

Shape suffixes: M rows and N keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.gpu.prototypes.online import redo
from benchmarks.gpu.prototypes.operands import Results, blocks, common, results, tiles
from benchmarks.gpu.prototypes.sums import load_tile, online_softmax_step, overflowed, store_out, store_rows
from benchmarks.implementations import Outputs
from benchmarks.shapes import Inputs
from rhythm.kernels.launch import launch
from rhythm.kernels.online import moments
from rhythm.kernels.tiles import upcast


@triton.jit(do_not_specialize=["tokens", "heads"])
def fixed_values_kernel(
    q_tiles, k_tiles, v_tiles, row_span, lse, out, flags, tokens, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.num_programs(0) // heads
    block, head = blocks - 1 - tl.program_id(0) // heads, tl.program_id(0) % heads
    first = block * ROWS
    q_MD = load_tile(q_tiles, first, head, ROWS, D, UPCAST)
    zeros_M = tl.zeros([ROWS], tl.float32)

    diagonal = first // KEYS * KEYS  # a block lies within one tile of keys
    k_ND = load_tile(k_tiles, diagonal, head // GROUP, KEYS, D, UPCAST)
    v_ND = load_tile(v_tiles, diagonal, head // GROUP, KEYS, D, UPCAST)
    score_MN = tl.dot(q_MD, tl.trans(k_ND))
    causal_MN = first + tl.arange(0, ROWS)[:, None] >= diagonal + tl.arange(0, KEYS)[None, :]
    score_MN = tl.where(causal_MN, score_MN, float("-inf"))
    near = (zeros_M - float("inf"), zeros_M, zeros_M, tl.zeros([ROWS, D], tl.float32))
    near = online_softmax_step(near, score_MN, v_ND, (first - diagonal).to(tl.float32), scale, True)
    largest_M, sum_M, distance_sum_M, out_MD = near
    reference_M = tl.where(largest_M == float("-inf"), 0.0, largest_M)

    for key in tl.range(0, diagonal, KEYS, num_stages=STAGES):
        k_ND = load_tile(k_tiles, key, head // GROUP, KEYS, D, UPCAST)
        v_ND = load_tile(v_tiles, key, head // GROUP, KEYS, D, UPCAST)
        score_MN = tl.dot(q_MD, tl.trans(k_ND))
        p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
        tile_sum_M, tile_place_M = moments(p_MN)  # fewer registers than sums' groups of 8
        sum_M += tile_sum_M
        distance_sum_M += tile_sum_M * (first - key).to(tl.float32) - tile_place_M
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD)

    store_rows(row_span, lse, reference_M, sum_M, distance_sum_M, first, head, tokens, ROWS)
    store_out(out, out_MD, sum_M, first, head, tokens, heads, ROWS, D)
    # Σ p·v can overflow where Σ p does not.
    finite_M = tl.min((tl.abs(out_MD) < float("inf")).to(tl.int32), 1) > 0
    bad_M = overflowed(sum_M, distance_sum_M) | ~finite_M
    tl.store(flags + head * blocks + block, tl.max(bad_M.to(tl.int32), 0))


def sweep(inputs: Inputs, *, rows: int = 128, keys: int = 128) -> Results:
    """One launch: spans, lse and output; those of flagged blocks are invalid."""
    buffers = results(inputs, rows, values=True)
    launch(
        fixed_values_kernel,
        inputs.shape.query_heads * blocks(inputs, rows),
        q_tiles=tiles(inputs.q, rows),
        k_tiles=tiles(inputs.k, keys),
        v_tiles=tiles(inputs.v, keys),
        row_span=buffers.row_span_HT,
        lse=buffers.lse_HT,
        out=buffers.out,
        flags=buffers.flags,
        ROWS=rows,
        KEYS=keys,
        STAGES=2,
        UPCAST=upcast(inputs.q.dtype),
        num_warps=8,
        num_stages=2,
        **common(inputs),
    )
    return buffers


def run(inputs: Inputs) -> Outputs:
    """span, lse and out; 128 rows × 128 keys, one program per multiprocessor."""
    buffers = sweep(inputs)
    redo(inputs, buffers, rows=128, values=True)
    return buffers.outputs(values=True)
