"""The control: the online softmax, as in rhythm's row sweep with the output, in plain Triton.

The gain of a fixed reference is the difference to this. The same kernel recomputes the blocks that another prototype
flagged (`redo`); programs of other blocks return immediately.

Shape suffixes: M rows and N keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.gpu.prototypes.operands import Results, blocks, common, results, tiles, two_programs
from benchmarks.gpu.prototypes.sums import load_tile, online_softmax_step, store_out, store_rows
from benchmarks.implementations import Outputs
from benchmarks.shapes import Inputs
from rhythm.kernels.launch import launch
from rhythm.kernels.tiles import upcast


@triton.jit(do_not_specialize=["tokens", "heads"])
def online_kernel(
    q_tiles, k_tiles, v_tiles, row_span, lse, out, flags, tokens, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    VALUES: tl.constexpr, FLAGGED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.num_programs(0) // heads
    block, head = blocks - 1 - tl.program_id(0) // heads, tl.program_id(0) % heads  # the longest rows come first
    if FLAGGED and tl.load(flags + head * blocks + block) == 0:
        return
    first = block * ROWS
    q_MD = load_tile(q_tiles, first, head, ROWS, D, UPCAST)
    zeros_M = tl.zeros([ROWS], tl.float32)
    state = (zeros_M - float("inf"), zeros_M, zeros_M, tl.zeros([ROWS, D if VALUES else 1], tl.float32))

    diagonal = first // KEYS * KEYS  # a block lies within one tile of keys
    for key in tl.range(0, diagonal, KEYS, num_stages=STAGES):
        k_ND = load_tile(k_tiles, key, head // GROUP, KEYS, D, UPCAST)
        v_ND = load_tile(v_tiles, key, head // GROUP, KEYS, D, UPCAST) if VALUES else k_ND
        score_MN = tl.dot(q_MD, tl.trans(k_ND))
        state = online_softmax_step(state, score_MN, v_ND, (first - key).to(tl.float32), scale, VALUES)
    k_ND = load_tile(k_tiles, diagonal, head // GROUP, KEYS, D, UPCAST)
    v_ND = load_tile(v_tiles, diagonal, head // GROUP, KEYS, D, UPCAST) if VALUES else k_ND
    score_MN = tl.dot(q_MD, tl.trans(k_ND))
    causal_MN = first + tl.arange(0, ROWS)[:, None] >= diagonal + tl.arange(0, KEYS)[None, :]
    score_MN = tl.where(causal_MN, score_MN, float("-inf"))
    state = online_softmax_step(state, score_MN, v_ND, (first - diagonal).to(tl.float32), scale, VALUES)

    largest_M, sum_M, distance_sum_M, out_MD = state
    store_rows(row_span, lse, largest_M, sum_M, distance_sum_M, first, head, tokens, ROWS)
    if VALUES:
        store_out(out, out_MD, sum_M, first, head, tokens, heads, ROWS, D)


def run(inputs: Inputs) -> Outputs:
    """span and lse; 128 rows × 128 keys, two programs per multiprocessor."""
    buffers = results(inputs, rows=128)
    _launch(inputs, buffers, 128, False, False, KEYS=128, STAGES=2, num_warps=8, num_stages=2, **two_programs())
    return buffers.outputs()


def redo(inputs: Inputs, buffers: Results, rows: int, *, values: bool = False) -> None:
    """Recompute the blocks of `rows` rows whose flag is set. The host doesn't read the flags."""
    warps = 4 if rows == 64 else 8
    _launch(inputs, buffers, rows, values, True, KEYS=rows, STAGES=1, num_warps=warps, num_stages=1)


def _launch(inputs: Inputs, buffers: Results, rows: int, values: bool, flagged: bool, **settings: int) -> None:
    keys = settings["KEYS"]
    launch(
        online_kernel,
        inputs.shape.query_heads * blocks(inputs, rows),
        q_tiles=tiles(inputs.q, rows),
        k_tiles=tiles(inputs.k, keys),
        v_tiles=tiles(inputs.v, keys),
        row_span=buffers.row_span_HT,
        lse=buffers.lse_HT,
        out=buffers.out,
        flags=buffers.flags,
        ROWS=rows,
        VALUES=values,
        FLAGGED=flagged,
        UPCAST=upcast(inputs.q.dtype),
        **common(inputs),
        **settings,
    )
