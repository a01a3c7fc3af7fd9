"""The attention forward with statistics in Gluon, for Hopper: FlashAttention-3's order, fixed reference.

Two warpgroups of 64 rows and one warp that loads. The next tile's scores and this tile's P·V are computed during the
exponentials; there is no maximum, and the output is never rescaled. Σ p and Σ p·(first row − key) are summed in fp32
by the threads that hold p, as in gluon_row.py. (A product of P with a column of positions would save a fifth of the
additions, but rounds P to bf16 and needs too many registers.)

Shape suffixes: M the 64 rows of a warpgroup, N keys of a tile, C the eight keys of a group, D head size.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from benchmarks.gpu.prototypes.gluon_row import ROWS, fold, mask_and_reference, store_rows, weigh
from benchmarks.gpu.prototypes.gluon_shim import load_tile, tiles
from benchmarks.gpu.prototypes.online import redo
from benchmarks.gpu.prototypes.operands import Results, blocks, common, results
from benchmarks.implementations import Outputs
from benchmarks.shapes import Inputs
from rhythm.kernels.launch import launch

WARPGROUPS = 2


@gluon.jit
def consume(shared, WHICH: gl.constexpr, WARPGROUPS: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """One warpgroup: its 64 rows against tiles of keys and values, from its diagonal tile down to key 0."""
    q_smem, k_smem, v_smem, q_ready, k_full, k_empty, v_full, v_empty = shared[0]
    row_span, lse, out, flags, block, head, heads, last, scale, tokens = shared[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, SCORES)
    first = (block * WARPGROUPS + WHICH) * 64
    diagonal = first // N
    for skipped in range(0, last - diagonal):
        mbarrier.arrive(k_empty.index(skipped))
        mbarrier.arrive(v_empty.index(skipped))
    i = last - diagonal
    row_M = gl.arange(0, 64, layout=ROW_LAYOUT)
    key_N = gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
    zeros_MN = gl.zeros([64, N], gl.float32, layout=SCORES)
    out_MD = gl.zeros([64, D], gl.float32, layout=OUT)
    q_MD = q_smem.index(WHICH)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_full.index(i % STAGES), i // STAGES & 1)
    score_MN = warpgroup_mma(q_MD, k_smem.index(i % STAGES).permute((1, 0)), zeros_MN, use_acc=False, is_async=True)
    score_MN = warpgroup_mma_wait(0, [score_MN])
    mbarrier.arrive(k_empty.index(i % STAGES))
    score_MN, reference_M = mask_and_reference(score_MN, first, diagonal * N, row_M, key_N, scale)
    offset = (first - diagonal * N).to(gl.float32)
    zeros_MC, _ = fold(zeros_MN, zeros_MN, 1)
    sum_MC, distance_sum_MC, p_MN = weigh(zeros_MC, zeros_MC, score_MN, reference_M, offset, scale, N)
    weight_MN = gl.convert_layout(p_MN.to(gl.bfloat16), WEIGHTS)
    for _ in range(0, diagonal):
        # In flight together: the next tile's scores, and this tile's weights times its values.
        j = i + 1
        mbarrier.wait(k_full.index(j % STAGES), j // STAGES & 1)
        score_MN = warpgroup_mma(
            q_MD, k_smem.index(j % STAGES).permute((1, 0)), zeros_MN, use_acc=False, is_async=True
        )  # fmt: skip
        mbarrier.wait(v_full.index(i % STAGES), i // STAGES & 1)
        out_MD = warpgroup_mma(weight_MN, v_smem.index(i % STAGES), out_MD, is_async=True)
        score_MN = warpgroup_mma_wait(1, [score_MN])
        mbarrier.arrive(k_empty.index(j % STAGES))
        offset += N
        sum_MC, distance_sum_MC, p_MN = weigh(sum_MC, distance_sum_MC, score_MN, reference_M, offset, scale, N)
        out_MD = warpgroup_mma_wait(0, [out_MD])
        mbarrier.arrive(v_empty.index(i % STAGES))
        weight_MN = gl.convert_layout(p_MN.to(gl.bfloat16), WEIGHTS)
        i = j
    mbarrier.wait(v_full.index(i % STAGES), i // STAGES & 1)
    out_MD = warpgroup_mma(weight_MN, v_smem.index(i % STAGES), out_MD, is_async=True)
    out_MD = warpgroup_mma_wait(0, [out_MD])
    mbarrier.arrive(v_empty.index(i % STAGES))

    sum_M, bad_M = store_rows(
        row_span, lse, reference_M, sum_MC, distance_sum_MC, row_M, first, head, tokens, ROW_LAYOUT
    )  # fmt: skip
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    out_row_M = first + gl.arange(0, 64, layout=OUT_ROWS)
    dim_D = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    at_MD = (out_row_M.to(gl.int64) * heads + head)[:, None] * D + dim_D[None, :]
    mean_MD = out_MD / gl.convert_layout(sum_M, OUT_ROWS)[:, None]
    gl.store(out + at_MD, mean_MD.to(gl.bfloat16), mask=(out_row_M < tokens)[:, None])
    # Σ p·v can overflow where Σ p does not.
    bad_out_M = gl.max(gl.where(gl.abs(out_MD) < float("inf"), 0, 1), 1)
    if first < tokens:
        bad = gl.maximum(gl.max(bad_M, 0), gl.max(bad_out_M, 0))
        gl.store(flags + head * ((tokens + 63) // 64) + first // 64, bad)


@gluon.jit
def load(
    q_tiles, k_tiles, v_tiles, shared, block, head, key_head, last,
    WARPGROUPS: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: q once, then tiles of keys and values from the last down, as slots become empty."""
    q_smem, k_smem, v_smem, q_ready, k_full, k_empty, v_full, v_empty = shared
    mbarrier.expect(q_ready, WARPGROUPS * q_tiles.block_type.nbytes)
    for which in gl.static_range(WARPGROUPS):
        load_tile(q_tiles, [(block * WARPGROUPS + which) * 64, head * D], q_ready, q_smem.index(which))
    for i in range(0, last + 1):
        slot = i % STAGES
        emptied = (i // STAGES & 1) ^ 1  # the first round finds every slot empty
        mbarrier.wait(k_empty.index(slot), emptied)
        mbarrier.expect(k_full.index(slot), k_tiles.block_type.nbytes)
        load_tile(k_tiles, [(last - i) * N, key_head * D], k_full.index(slot), k_smem.index(slot))
        mbarrier.wait(v_empty.index(slot), emptied)
        mbarrier.expect(v_full.index(slot), v_tiles.block_type.nbytes)
        load_tile(v_tiles, [(last - i) * N, key_head * D], v_full.index(slot), v_smem.index(slot))


@gluon.jit(do_not_specialize=["tokens", "heads"])
def gluon_values_kernel(
    q_tiles, k_tiles, v_tiles, row_span, lse, out, flags, tokens, heads, scale,
    GROUP: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WARPGROUPS: gl.constexpr = 2
    block, head = gl.num_programs(0) // heads - 1 - gl.program_id(0) // heads, gl.program_id(0) % heads
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [WARPGROUPS, 64, D], q_tiles.layout)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, D], k_tiles.layout)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, D], v_tiles.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=WARPGROUPS)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=WARPGROUPS)
    last = (block * WARPGROUPS + WARPGROUPS - 1) * 64 // N  # tile of the last warpgroup's diagonal
    memory = (q_smem, k_smem, v_smem, q_ready, k_full, k_empty, v_full, v_empty)
    rest = (row_span, lse, out, flags, block, head, heads, last, scale, tokens)
    gl.warp_specialize(
        [
            (consume, ((memory, rest), 0, WARPGROUPS, N, D, STAGES)),
            (consume, ((memory, rest), 1, WARPGROUPS, N, D, STAGES)),
            (load, (q_tiles, k_tiles, v_tiles, memory, block, head, head // GROUP, last, WARPGROUPS, N, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def sweep(inputs: Inputs, *, keys: int = 128) -> Results:
    """One launch: spans, lse and output; those of flagged blocks are invalid."""
    buffers = results(inputs, ROWS, values=True)
    launch(
        gluon_values_kernel,
        inputs.shape.query_heads * blocks(inputs, WARPGROUPS * ROWS),
        q_tiles=tiles(inputs.q, ROWS),
        k_tiles=tiles(inputs.k, keys),
        v_tiles=tiles(inputs.v, keys),
        row_span=buffers.row_span_HT,
        lse=buffers.lse_HT,
        out=buffers.out,
        flags=buffers.flags,
        N=keys,
        STAGES=2,
        num_warps=4,
        **common(inputs),
    )
    return buffers


def run(inputs: Inputs) -> Outputs:
    """span, lse and out; 128 rows per program, one program per multiprocessor."""
    buffers = sweep(inputs)
    redo(inputs, buffers, rows=ROWS, values=True)
    return buffers.outputs(values=True)
