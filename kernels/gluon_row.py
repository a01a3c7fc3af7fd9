"""The row sweep for Hopper in Gluon, Triton's explicit dialect: lse and sums of spans of plain attention, 2-byte types.

Four warpgroups of 64 rows share each tile of keys, which a fifth part, one warp, loads for them: while one warpgroup
waits for its product, three compute exponentials. A program stays on its multiprocessor and goes through blocks of 256
rows, the longest first. What is computed per tile and what is stored per row are the plain kernel's own functions
(row_sweep.py), and so is where blocks lie. A block of 64 rows whose sums overflow, or whose exponents are so large that
fp32 has no room for the digits of p, gets an infinite sum; the plain kernel computes those again in a second launch.

Tiles of keys lie relative to the block's first row: first + 128 (the diagonal of the upper two warpgroups), the
sequence's first keys (first % 128 of them), first (the diagonal of the lower two), first − 128, and so on down to
first % 128. So each warpgroup masks one tile, or two where a prompt is no multiple of 128.

Shape suffixes: M the 64 rows of a warpgroup, N keys of a tile, I groups of eight columns, C the eight (row_sweep.py),
D head size (padded to a power of two).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rhythm.kernels.arguments import PLAIN, common_arguments, scales
from rhythm.kernels.launch import launch, options
from rhythm.kernels.mean_span import BlockSums
from rhythm.kernels.online import RowResults, store_rows
from rhythm.kernels.row_sweep import add_tile, finished, fold, row_sweep_kernel
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import HOPPER_GLUON, Tile
from rhythm.kernels.tiles import tma_descriptor

# (descriptor, place, barrier, shared memory); Triton 3.6 has only its older name.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

WARPGROUPS = gl.constexpr(4)
ROWS = gl.constexpr(HOPPER_GLUON.rows)
"""Rows of a warpgroup, and of one matrix instruction."""
KEYS = gl.constexpr(HOPPER_GLUON.keys)
STAGES = gl.constexpr(HOPPER_GLUON.stages)
REGISTERS = gl.constexpr(HOPPER_GLUON.max_registers)
"""Per thread of the warpgroups that request them; the first one gets what they leave, which is no less."""
LOADER_REGISTERS = gl.constexpr(24)


class Memory(NamedTuple):
    """Shared memory: q of each warpgroup, a ring of tiles of keys, and barriers.

    Those are one allocation, since each one takes registers of every warpgroup. In this order: q of each warpgroup is
    full; is empty; each slot of the ring is full; is empty.
    """

    q: Any
    k: Any
    barriers: Any


class Work(NamedTuple):
    """Which blocks there are: arguments of `locate` (sequences.py); blocks: per head, of WARPGROUPS · ROWS rows."""

    lengths: Any
    sequences: Any
    tokens: Any
    heads: Any
    blocks: Any
    row_blocks: Any
    workers: Any


@gluon.jit
def q_full(memory, which):
    return memory.barriers.index(which)


@gluon.jit
def q_empty(memory, which):
    return memory.barriers.index(WARPGROUPS + which)


@gluon.jit
def k_full(memory, slot):
    return memory.barriers.index(2 * WARPGROUPS + slot)


@gluon.jit
def k_empty(memory, slot):
    return memory.barriers.index(2 * WARPGROUPS + STAGES + slot)


@gluon.jit
def next_slot(slot, phase):
    """The ring's next slot, and the phase of its barriers, which changes when the ring begins again."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def load_row_tile(tiles, sequence, start, row, head, barrier, memory, BATCHED: gl.constexpr):
    """Loads a tile of one head, from a sequence's row on; `barrier` is full when it has arrived."""
    mbarrier.expect(barrier, tiles.block_type.nbytes)
    if BATCHED:
        load_tile(tiles, [sequence, row, head, 0], barrier, memory.reshape(tiles.block_shape))
    else:
        load_tile(tiles, [0, start + row, head, 0], barrier, memory.reshape(tiles.block_shape))


@gluon.jit
def load_blocks(q_tiles, k_tiles, memory, work, form: gl.constexpr):
    """The warp that loads: for each block its tiles of keys, in the order above, and q after the first of them."""
    slot, phase, q_phase = 0, 1, 1  # the first round finds every slot empty
    for item in range(gl.program_id(0), work.blocks * work.heads, work.workers):
        head = item % work.heads
        sequence, first, start, length, _, _, _ = locate(
            item // work.heads, work.blocks, work.lengths, work.sequences, work.tokens, None, "response",
            WARPGROUPS * ROWS,
        )  # fmt: skip
        if first < length:
            upper, bottom = gl.where(first + KEYS < length, 1, 0), gl.where(first % KEYS > 0, 1, 0)
            key = first + upper * KEYS
            for i in range(0, upper + bottom + 1 + first // KEYS):
                mbarrier.wait(k_empty(memory, slot), phase)
                at_bottom = (bottom > 0) & (i == upper)
                load_row_tile(
                    k_tiles, sequence, start, gl.where(at_bottom, 0, key), head // form.group,
                    k_full(memory, slot), memory.k.index(slot), form.batched,
                )  # fmt: skip
                key -= gl.where(at_bottom, 0, KEYS)
                slot, phase = next_slot(slot, phase)
                if i == 0:
                    for which in gl.static_range(WARPGROUPS):
                        mbarrier.wait(q_empty(memory, which), q_phase)
                        load_row_tile(
                            q_tiles, sequence, start, first + which * ROWS, head, q_full(memory, which),
                            memory.q.index(which), form.batched,
                        )  # fmt: skip
            q_phase ^= 1


@gluon.jit
def products(memory, slot, phase, q_MD, zeros_MN, form: gl.constexpr):
    """[M, N] products of q and the tile of keys in a slot, which this warpgroup does not need afterwards."""
    mbarrier.wait(k_full(memory, slot), phase)
    k_ND = memory.k.index(slot)
    product_MN = warpgroup_mma(q_MD, k_ND.permute((1, 0)), zeros_MN, use_acc=False, is_async=True)
    product_MN = warpgroup_mma_wait(0, [product_MN])
    mbarrier.arrive(k_empty(memory, slot))
    return product_MN


@gluon.jit
def up_to(score_MN, last_M):
    """Scores of the columns n ≤ last, others −inf; n = 8i + c. The i are constants, so they take no register."""
    score_MIC = gl.reshape(score_MN, [ROWS, KEYS // 8, 8])
    LAYOUT: gl.constexpr = score_MIC.type.layout
    last_M = gl.convert_layout(last_M, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    eight_C = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    column_I = 8 * gl.arange(0, KEYS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    visible_MIC = column_I[None, :, None] <= last_M[:, None, None] - eight_C[None, None, :]
    return gl.reshape(gl.where(visible_MIC, score_MIC, float("-inf")), [ROWS, KEYS])


@gluon.jit
def of_rows(x_M, tile):
    """x in the layout in which its values lie with the rows of a tile."""
    return gl.convert_layout(x_M, gl.SliceLayout(1, tile.type.layout))


@gluon.jit
def sums_place(sequence, first, start, prompt, work, head):
    """Where BlockSums.sums has the ROWS rows from `first` on."""
    if work.lengths.cu_seqlens is not None:
        before = start // ROWS + sequence
    else:
        before = sequence * (work.row_blocks // work.sequences)
    return (work.row_blocks - 1 - before - (first - prompt) // ROWS) * work.heads + head


@gluon.jit
def sweep_rows(common, WHICH: gl.constexpr, form: gl.constexpr):
    """One warpgroup: its 64 rows of each block."""
    memory, work, results, scale, natural_scale = common
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    UPPER: gl.constexpr = WHICH * ROWS // KEYS  # 1 for the two whose diagonal is in the block's second tile
    zeros_MN = gl.zeros([ROWS, KEYS], gl.float32, layout=SCORES)
    place_M = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    q_MD = memory.q.index(WHICH)
    slot, phase, q_phase = 0, 0, 0
    for item in range(gl.program_id(0), work.blocks * work.heads, work.workers):
        head = item % work.heads
        sequence, first, start, length, prompt, _, _ = locate(
            item // work.heads, work.blocks, work.lengths, work.sequences, work.tokens, None, "response",
            WARPGROUPS * ROWS,
        )  # fmt: skip
        if first < length:
            row = first + WHICH * ROWS
            upper, bottom = gl.where(first + KEYS < length, 1, 0), gl.where(first % KEYS > 0, 1, 0)
            far = first // KEYS + UPPER
            # The lower warpgroups don't need the upper ones' diagonal, and one without rows needs no tile.
            skipped = gl.where(row < length, upper * (1 - UPPER), upper + bottom + 1 + first // KEYS)
            for _ in range(0, skipped):
                mbarrier.wait(k_full(memory, slot), phase)  # else it would be emptied in an earlier round
                mbarrier.arrive(k_empty(memory, slot))
                slot, phase = next_slot(slot, phase)
            mbarrier.wait(q_full(memory, WHICH), q_phase)
            if row < length:
                zeros_MC, _moment_MC = fold(zeros_MN)
                zeros_MC = gl.full_like(zeros_MC, 0.0)
                sum_MC, distance_sum_MC = zeros_MC, zeros_MC
                largest_M = gl.full_like(place_M, float("-inf"), dtype=gl.float32)
                reference_M = gl.full_like(largest_M, 0.0)
                for i in range(0, bottom + 1):
                    at_bottom = (bottom > 0) & (i == UPPER)
                    key = gl.where(at_bottom, 0, first + UPPER * KEYS)
                    last_M = gl.minimum(row + place_M, gl.where(at_bottom, first % KEYS - 1, length)) - key
                    score_MN = up_to(products(memory, slot, phase, q_MD, zeros_MN, form), last_M)
                    slot, phase = next_slot(slot, phase)
                    larger_M = gl.maximum(largest_M, of_rows(gl.max(score_MN, 1), zeros_MN) * scale)
                    reference_M = gl.where(larger_M == float("-inf"), 0.0, larger_M)
                    shrink_MC = of_rows(gl.exp2(largest_M - reference_M), zeros_MC)[:, None]
                    sum_MC, distance_sum_MC = add_tile(
                        sum_MC * shrink_MC, distance_sum_MC * shrink_MC, score_MN, of_rows(reference_M, score_MN),
                        key, row, scale,
                    )  # fmt: skip
                    largest_M = larger_M
                key = first + UPPER * KEYS
                for _ in range(0, far):
                    key -= KEYS
                    score_MN = products(memory, slot, phase, q_MD, zeros_MN, form)
                    slot, phase = next_slot(slot, phase)
                    sum_MC, distance_sum_MC = add_tile(
                        sum_MC, distance_sum_MC, score_MN, reference_M, key, row, scale
                    )  # fmt: skip
                mbarrier.arrive(q_empty(memory, WHICH))

                eight_C = gl.arange(0, 8, layout=gl.SliceLayout(0, zeros_MC.type.layout)).to(gl.float32)
                largest_M, sum_M, distance_sum_M, again_M = finished(
                    sum_MC, distance_sum_MC, eight_C, of_rows(largest_M, zeros_MC), of_rows(reference_M, zeros_MC),
                    scale,
                )  # fmt: skip
                own_M = of_rows(place_M, zeros_MC)
                distance_sum_M = gl.where(again_M, float("inf"), distance_sum_M)
                at_M = head.to(gl.int64) * work.tokens.to(gl.uint32) + start + row + own_M
                store_rows(
                    results, None, largest_M, sum_M, distance_sum_M, at_M, own_M, row + own_M < length, head, scale,
                    natural_scale, None, results.sums + sums_place(sequence, row, start, prompt, work, head),
                )  # fmt: skip
            else:
                mbarrier.arrive(q_empty(memory, WHICH))
            q_phase ^= 1


@gluon.jit(do_not_specialize=["sequences", "tokens", "blocks", "row_blocks", "workers"])
def gluon_row_kernel(
    q_tiles, k_tiles, lengths, results, sequences, tokens, heads, blocks, row_blocks, workers, scale, natural_scale,
    form: gl.constexpr,
):  # fmt: skip
    """Results of the row sweep without a given lse; programs share all blocks of all heads."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, form.padded], k_tiles.dtype)
    BARRIERS: gl.constexpr = 2 * WARPGROUPS + 2 * STAGES
    memory = Memory(
        gl.allocate_shared_memory(k_tiles.dtype, [WARPGROUPS, ROWS, form.padded], LAYOUT),
        gl.allocate_shared_memory(k_tiles.dtype, [STAGES, KEYS, form.padded], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout()),
    )
    for which in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full(memory, which), count=1)
        mbarrier.init(q_empty(memory, which), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full(memory, slot), count=1)
        mbarrier.init(k_empty(memory, slot), count=WARPGROUPS)
    work = Work(lengths, sequences, tokens, heads, blocks, row_blocks, workers)
    common = (memory, work, results, scale, natural_scale)
    gl.warp_specialize(
        [
            (sweep_rows, (common, 0, form)),
            (sweep_rows, (common, 1, form)),
            (sweep_rows, (common, 2, form)),
            (sweep_rows, (common, 3, form)),
            (load_blocks, (q_tiles, k_tiles, memory, work, form)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, LOADER_REGISTERS],
    )


def gluon_row_sweep(
    q: Tensor, k: Tensor, sequences: Sequences, lse_HT: Tensor, *, scale: float, softmax: Softmax | None, again: Tile
) -> BlockSums:
    """What `row_sweep` computes of plain attention (gluon_choice.py says of which): in two launches, of which the
    second, with the tile `again` of as many rows as a warpgroup has, does nothing in most blocks.
    """
    heads = q.shape[-2]
    sums_NH = torch.empty((sequences.blocks(ROWS.value), heads), dtype=torch.float64, device=q.device)
    parts, steep = (None, None) if softmax is None else (softmax.parts, softmax.steep)
    results = RowResults(sums_NH, lse_HT, parts, steep, None)
    arguments = common_arguments(q, k, sequences, scale, PLAIN)
    shared = {name: arguments[name] for name in ("lengths", "sequences", "tokens", "heads", "scale", "form")}
    blocks = sequences.blocks(WARPGROUPS.value * ROWS.value)
    programs = min(multiprocessors(q.device), heads * blocks)
    launch(
        gluon_row_kernel,
        programs,
        row_blocks=sums_NH.shape[0],
        workers=programs,
        q_tiles=gluon_descriptor(q, ROWS.value),
        k_tiles=gluon_descriptor(k, KEYS.value),
        results=results._replace(steep=None),  # a steep block is computed again
        blocks=blocks,
        natural_scale=scales(scale, None).natural,
        num_warps=4,
        enable_fp_fusion=True,
        **shared,
    )
    launch(
        row_sweep_kernel,
        heads * sums_NH.shape[0],
        k_tiles=tma_descriptor(k, again.keys) if again.tma else None,
        given_lse=None,
        results=results,
        natural_scale=scales(scale, None).natural,
        sinks=None,
        tile=again,
        AGAIN=True,
        **arguments,
        **options(again, arguments),
    )
    return BlockSums(sums_NH, ROWS.value, from_prompt=True)


def gluon_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """tma_descriptor (tiles.py) with the layout that its tiles have in shared memory."""
    tiles = tma_descriptor(x, rows)
    layout = gl.NVMMASharedLayout.get_default_for(tiles.block_shape, getattr(gl, str(x.dtype).removeprefix("torch.")))
    return TensorDescriptor(tiles.base, tiles.shape, tiles.strides, tiles.block_shape, layout)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 for tensors without data, which are only compiled for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
