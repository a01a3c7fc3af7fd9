"""Four warpgroups of 64 rows and a warp that loads keys for them: lanes.py's arithmetic in Gluon, for Hopper.

Triton waits for each product immediately, and all warps of a program meet at barriers in each tile. Here warpgroups
share only the tiles of keys: while one waits for its product, three compute exponentials. 256 rows per tile of keys
halve the bytes of K read through the L2 cache. There are two variants: with q in shared memory (`ss`) a product reads
both operands from there, at 96 of 128 bytes per cycle; with q in registers (`rs`) it reads only K from there, but the
registers then hold only tiles of 64 keys.

Shape suffixes: M the 64 rows of a warpgroup, N keys of a tile, C the eight keys of a group, D head size.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from benchmarks.gpu.prototypes.gluon_shim import load_tile, tiles
from benchmarks.gpu.prototypes.online import redo
from benchmarks.gpu.prototypes.operands import Results, blocks, common, results
from benchmarks.implementations import Outputs
from benchmarks.shapes import Inputs
from rhythm.kernels.launch import launch

ROWS = 64  # per warpgroup: rows of one matrix instruction
WARPGROUPS = 4


@gluon.jit
def halves(x_MX):
    """(left, right) half of the columns: only register names change, no data moves."""
    HALF: gl.constexpr = x_MX.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x_MX, [x_MX.shape[0], 2, HALF]), (0, 2, 1)))


@gluon.jit
def fold(sum_MX, moment_MX, UNIT: gl.constexpr):
    """(Σ_i p, Σ_i p·8i / UNIT) over groups of eight keys, [64, 8] each, in the threads that hold them.

    moment_MX is of what was folded into sum_MX before, in the same unit.
    """
    if sum_MX.shape[1] == 8:
        return sum_MX, moment_MX
    else:
        HALF: gl.constexpr = sum_MX.shape[1] / 2 / UNIT
        left_sum, right_sum = halves(sum_MX)
        left_moment, right_moment = halves(moment_MX)
        moment = gl.fma(right_sum, gl.full_like(right_sum, HALF), left_moment + right_moment)
        return fold(left_sum + right_sum, moment, UNIT)


@gluon.jit
def weigh(sum_MC, distance_sum_MC, score_MN, reference_M, offset, scale, N: gl.constexpr):
    """Add a tile to Σ p and Σ p·(first row − key's group), and return p. offset: first row − first key.

    Σ p·place by halves: that of both halves, and the right one's Σ p times the half's length. In units of the longest
    half the first step is free: its moment is the right half itself.
    """
    p_MN = gl.exp2(score_MN * scale - reference_M[:, None])
    left_MX, right_MX = halves(p_MN)
    tile_MC, moment_MC = fold(left_MX + right_MX, right_MX, N // 2)
    distance_sum_MC = gl.fma(tile_MC, gl.full_like(tile_MC, offset), distance_sum_MC)
    distance_sum_MC = gl.fma(moment_MC, gl.full_like(moment_MC, -0.5 * N), distance_sum_MC)
    return sum_MC + tile_MC, distance_sum_MC, p_MN


@gluon.jit
def mask_and_reference(score_MN, first, key, row_M, key_N, scale):
    """(scores of the diagonal tile, −inf above the diagonal; each row's largest, times the scale)."""
    score_MN = gl.where((first + row_M)[:, None] >= (key + key_N)[None, :], score_MN, float("-inf"))
    largest_M = gl.max(score_MN, 1) * scale
    return score_MN, gl.where(largest_M == float("-inf"), 0.0, largest_M)


@gluon.jit
def store_rows(
    row_span, lse, reference_M, sum_MC, distance_sum_MC, row_M, first, head, tokens, ROW_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Sum over threads; store row spans and lse. Returns (Σ p, whether the row's sums overflowed)."""
    place_C = gl.arange(0, 8, layout=gl.SliceLayout(0, sum_MC.type.layout)).to(gl.float32)
    sum_M = gl.convert_layout(gl.sum(sum_MC, 1), ROW_LAYOUT)
    distance_sum_M = gl.convert_layout(gl.sum(distance_sum_MC - sum_MC * place_C[None, :], 1), ROW_LAYOUT)
    at_M = head.to(gl.int64) * tokens + first + row_M
    exists_M = first + row_M < tokens
    gl.store(row_span + at_M, distance_sum_M / sum_M + row_M.to(gl.float32), mask=exists_M)
    gl.store(lse + at_M, (reference_M + gl.log2(sum_M)) * 0.6931471805599453, mask=exists_M)
    fits_M = (sum_M < float("inf")) & (gl.abs(distance_sum_M) < float("inf"))
    return sum_M, gl.where(fits_M, 0, 1)


@gluon.jit
def consume(
    shared,
    WHICH: gl.constexpr, WARPGROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, RS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows against tiles of keys, from its diagonal tile down to key 0."""
    q_smem, k_smem, q_ready, full, empty, row_span, lse, flags, block, head, last, scale, tokens = shared
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, SCORES)
    first = (block * WARPGROUPS + WHICH) * 64
    diagonal = first // N
    # Tiles that only later warpgroups need are released without being read.
    for skipped in range(0, last - diagonal):
        mbarrier.arrive(empty.index(skipped))
    slot = (last - diagonal) % STAGES
    phase = (last - diagonal) // STAGES & 1
    row_M = gl.arange(0, 64, layout=ROW_LAYOUT)
    key_N = gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
    zeros_MN = gl.zeros([64, N], gl.float32, layout=SCORES)
    mbarrier.wait(q_ready, 0)
    q_MD = q_smem.index(WHICH)
    if RS:
        q_MD = q_MD.load(gl.DotOperandLayout(0, SCORES, 2))

    mbarrier.wait(full.index(slot), phase)
    score_MN = warpgroup_mma(q_MD, k_smem.index(slot).permute((1, 0)), zeros_MN, use_acc=False, is_async=True)
    score_MN = warpgroup_mma_wait(0, [score_MN])
    mbarrier.arrive(empty.index(slot))
    score_MN, reference_M = mask_and_reference(score_MN, first, diagonal * N, row_M, key_N, scale)
    offset = (first - diagonal * N).to(gl.float32)
    zeros_MC, _ = fold(zeros_MN, zeros_MN, 1)
    sum_MC, distance_sum_MC, _p_MN = weigh(zeros_MC, zeros_MC, score_MN, reference_M, offset, scale, N)
    for _ in range(0, diagonal):
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
        offset += N
        mbarrier.wait(full.index(slot), phase)
        score_MN = warpgroup_mma(q_MD, k_smem.index(slot).permute((1, 0)), zeros_MN, use_acc=False, is_async=True)
        score_MN = warpgroup_mma_wait(0, [score_MN])
        mbarrier.arrive(empty.index(slot))
        sum_MC, distance_sum_MC, _p_MN = weigh(sum_MC, distance_sum_MC, score_MN, reference_M, offset, scale, N)

    _sum_M, bad_M = store_rows(
        row_span, lse, reference_M, sum_MC, distance_sum_MC, row_M, first, head, tokens, ROW_LAYOUT
    )  # fmt: skip
    if first < tokens:
        gl.store(flags + head * ((tokens + 63) // 64) + first // 64, gl.max(bad_M, 0))


@gluon.jit
def load(
    q_tiles, k_tiles, q_smem, k_smem, q_ready, full, empty, block, head, key_head, last,
    WARPGROUPS: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: q once, then tiles of keys from the last down, as slots become empty."""
    mbarrier.expect(q_ready, WARPGROUPS * q_tiles.block_type.nbytes)
    for which in gl.static_range(WARPGROUPS):
        load_tile(q_tiles, [(block * WARPGROUPS + which) * 64, head * D], q_ready, q_smem.index(which))
    for i in range(0, last + 1):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)  # the first round finds every slot empty
        mbarrier.expect(full.index(slot), k_tiles.block_type.nbytes)
        load_tile(k_tiles, [(last - i) * N, key_head * D], full.index(slot), k_smem.index(slot))


@gluon.jit(do_not_specialize=["tokens", "heads"])
def gluon_row_kernel(
    q_tiles, k_tiles, row_span, lse, flags, tokens, heads, scale,
    GROUP: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    RS: gl.constexpr,
):  # fmt: skip
    WARPGROUPS: gl.constexpr = 4
    block, head = gl.num_programs(0) // heads - 1 - gl.program_id(0) // heads, gl.program_id(0) % heads
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [WARPGROUPS, 64, D], q_tiles.layout)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, D], k_tiles.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=WARPGROUPS)
    last = (block * WARPGROUPS + WARPGROUPS - 1) * 64 // N  # tile of the last warpgroup's diagonal
    shared = (q_smem, k_smem, q_ready, full, empty, row_span, lse, flags, block, head, last, scale, tokens)
    gl.warp_specialize(
        [
            (consume, (shared, 0, WARPGROUPS, N, STAGES, RS)),
            (consume, (shared, 1, WARPGROUPS, N, STAGES, RS)),
            (consume, (shared, 2, WARPGROUPS, N, STAGES, RS)),
            (consume, (shared, 3, WARPGROUPS, N, STAGES, RS)),
            (load, (q_tiles, k_tiles, q_smem, k_smem, q_ready, full, empty, block, head, head // GROUP, last,
                    WARPGROUPS, N, D, STAGES)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 24],
    )  # fmt: skip


def sweep(inputs: Inputs, *, keys: int, q_in_registers: bool) -> Results:
    """One launch: spans and lse; those of flagged blocks are invalid."""
    buffers = results(inputs, ROWS)
    launch(
        gluon_row_kernel,
        inputs.shape.query_heads * blocks(inputs, WARPGROUPS * ROWS),
        q_tiles=tiles(inputs.q, ROWS),
        k_tiles=tiles(inputs.k, keys),
        row_span=buffers.row_span_HT,
        lse=buffers.lse_HT,
        flags=buffers.flags,
        N=keys,
        STAGES={128: 4, 64: 6}[keys],
        REGISTERS=112,
        RS=q_in_registers,
        num_warps=4,
        **common(inputs),
    )
    return buffers


def run(inputs: Inputs, *, keys: int, q_in_registers: bool) -> Outputs:
    """span and lse; 256 rows per program, one program per multiprocessor."""
    buffers = sweep(inputs, keys=keys, q_in_registers=q_in_registers)
    redo(inputs, buffers, rows=ROWS)
    return buffers.outputs()
