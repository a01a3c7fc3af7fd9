"""A fixed reference in plain Triton; sums stay in the thread that computed them until the end.

In the steady loop no data moves between threads: Σ p and Σ p·(first row − key) are kept for each of the eight keys of
a group, summed over the groups of a tile, and summed over threads once per program. Tiles are visited from the diagonal
down, so the first one gives the reference. Blocks whose sums overflow are flagged, and a second launch recomputes them
with the online softmax (fixed.py does so in the same program, which costs registers).

Shape suffixes: M rows and N keys of a tile, C the eight keys of a group, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.gpu.prototypes.online import redo
from benchmarks.gpu.prototypes.operands import Results, blocks, common, results, tiles, two_programs
from benchmarks.gpu.prototypes.sums import fold, load_tile, overflowed, store_rows
from benchmarks.implementations import Outputs
from benchmarks.shapes import Inputs
from rhythm.kernels.launch import launch
from rhythm.kernels.tiles import upcast


@triton.jit
def weigh(sum_MC, distance_sum_MC, score_MN, reference_M, offset, scale):
    """Add a tile. offset: first row − first key. Distances are relative to the first row, to avoid cancellation."""
    p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
    tile_MC, moment_MC = fold(p_MN)
    distance_sum_MC += tile_MC * offset
    distance_sum_MC -= moment_MC * (p_MN.shape[1] // 2)
    return sum_MC + tile_MC, distance_sum_MC


@triton.jit(do_not_specialize=["tokens", "heads"])
def lanes_kernel(
    q_tiles, k_tiles, row_span, lse, flags, tokens, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.num_programs(0) // heads
    block, head = blocks - 1 - tl.program_id(0) // heads, tl.program_id(0) % heads
    first = block * ROWS
    q_MD = load_tile(q_tiles, first, head, ROWS, D, UPCAST)
    zeros_MC = tl.zeros([ROWS, 8], tl.float32)

    diagonal = first // KEYS * KEYS  # a block lies within one tile of keys
    k_ND = load_tile(k_tiles, diagonal, head // GROUP, KEYS, D, UPCAST)
    score_MN = tl.dot(q_MD, tl.trans(k_ND))
    causal_MN = first + tl.arange(0, ROWS)[:, None] >= diagonal + tl.arange(0, KEYS)[None, :]
    score_MN = tl.where(causal_MN, score_MN, float("-inf"))
    largest_M = tl.max(score_MN, 1) * scale
    reference_M = tl.where(largest_M == float("-inf"), 0.0, largest_M)
    offset = (first - diagonal).to(tl.float32)
    sum_MC, distance_sum_MC = weigh(zeros_MC, zeros_MC, score_MN, reference_M, offset, scale)

    for down in tl.range(0, diagonal, KEYS, num_stages=STAGES):
        key = diagonal - KEYS - down
        k_ND = load_tile(k_tiles, key, head // GROUP, KEYS, D, UPCAST)
        score_MN = tl.dot(q_MD, tl.trans(k_ND))
        offset = (first - key).to(tl.float32)
        sum_MC, distance_sum_MC = weigh(sum_MC, distance_sum_MC, score_MN, reference_M, offset, scale)

    sum_M = tl.sum(sum_MC, 1)
    distance_sum_M = tl.sum(distance_sum_MC - sum_MC * tl.arange(0, 8).to(tl.float32)[None, :], 1)
    store_rows(row_span, lse, reference_M, sum_M, distance_sum_M, first, head, tokens, ROWS)
    tl.store(flags + head * blocks + block, tl.max(overflowed(sum_M, distance_sum_M).to(tl.int32), 0))


def sweep(inputs: Inputs, *, rows: int = 128, keys: int = 128) -> Results:
    """One launch: spans and lse; those of flagged blocks are invalid."""
    buffers = results(inputs, rows)
    launch(
        lanes_kernel,
        inputs.shape.query_heads * blocks(inputs, rows),
        q_tiles=tiles(inputs.q, rows),
        k_tiles=tiles(inputs.k, keys),
        row_span=buffers.row_span_HT,
        lse=buffers.lse_HT,
        flags=buffers.flags,
        ROWS=rows,
        KEYS=keys,
        STAGES=2,
        UPCAST=upcast(inputs.q.dtype),
        num_warps=8,
        num_stages=2,
        **two_programs(),
        **common(inputs),
    )
    return buffers


def run(inputs: Inputs) -> Outputs:
    """span and lse; 128 rows × 128 keys, two programs per multiprocessor."""
    buffers = sweep(inputs)
    redo(inputs, buffers, rows=128)
    return buffers.outputs()
