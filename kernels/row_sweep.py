"""One sweep over the keys for a block of rows: lse and sums of row spans.

Weights p are relative to a reference that is fixed before the far keys: the row's largest score in the tiles on the
diagonal, which come first. So the steady loop over far keys needs neither maxima nor rescaling, nor masks: a score
costs a fused multiply-add into exp2 and two additions. Its sums stay in the threads: tiles are folded into eight
columns, the keys 8i + c, of which each has Σ p and Σ p·(t₀ − 8i), t₀ the block's first row; from these Σ p·(t − s)
follows by terms of rows alone. Σ p is at least 1, and fp32 holds scores up to 88 nats above the reference. Blocks in
which a sum overflows, or whose exponents are so large that fp32 has no room for the digits of p (STEEP), are computed
again by the online softmax, with products that are subtracted before they are scaled: exact for scores of any size.

With a sliding window the sweep begins at the first key that the block's first row sees; keys that later rows don't see
go through a loop of their own. With V row_values.py takes this kernel's place, and on Hopper gluon_row.py can
(gluon_choice.py).

Shape suffixes: M rows and N keys of a tile, C the eight columns, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms, common_arguments, scales
from rhythm.kernels.gluon_choice import chosen, gluon_module, tile_again, uncovered
from rhythm.kernels.launch import kernel_key, launch, options, run_with_tile
from rhythm.kernels.mean_span import BlockSums
from rhythm.kernels.online import RowResults, masked, online_softmax_step, store_rows
from rhythm.kernels.row_values import row_values_kernel
from rhythm.kernels.scores import capped_products, first_visible
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import Tile
from rhythm.kernels.tiles import (
    STEEP,
    head_base,
    load_q,
    load_rows,
    load_tma,
    query_base,
    tma_compatible,
    tma_descriptor,
)
from rhythm.kernels.tuning import Sample


@triton.jit
def halves(x_MN):
    """(left, right) half of the columns. A thread has columns of both, so no data moves."""
    HALF: tl.constexpr = x_MN.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x_MN, [x_MN.shape[0], 2, HALF]), (0, 2, 1)))


@triton.jit
def fold(exponent_MN):
    """(Σ_i p, Σ_i p·i) of p = 2^exponent over the columns 8i + c, [M, 8] each.

    Σ p·i of a tile is that of its halves, plus Σ p of the right half times the half's length: two operations per score.
    """
    left_MN, right_MN = halves(exponent_MN)
    if exponent_MN.shape[1] == 16:
        right_MC = tl.exp2(right_MN)
        return tl.exp2(left_MN) + right_MC, right_MC
    else:
        left_MC, left_moment_MC = fold(left_MN)
        right_MC, right_moment_MC = fold(right_MN)
        moment_MC = left_moment_MC + right_moment_MC + right_MC * (exponent_MN.shape[1] // 16)
        return left_MC + right_MC, moment_MC


@triton.jit
def add_tile(sum_MC, distance_sum_MC, score_MN, reference_M, key, first, scale):
    """(Σ p, Σ p·(first row − 8i)) with a tile's scores; key: its first."""
    tile_MC, moment_MC = fold(score_MN * scale - reference_M[:, None])
    distance_sum_MC += tile_MC * (first - key).to(tl.float32)
    distance_sum_MC -= moment_MC * 8
    return sum_MC + tile_MC, distance_sum_MC


@triton.jit
def finished(sum_MC, distance_sum_MC, eight_C, largest_M, reference_M, scale):
    """(largest product, Σ p, Σ p·(first row − key), whether the row must be computed again) of rows that saw all keys.

    p is now relative to that product, whose exponent is within an ulp or two of the reference. eight_C: 0.0 … 7.0.
    """
    sum_M = tl.sum(sum_MC, 1)
    distance_sum_M = tl.sum(distance_sum_MC - sum_MC * eight_C[None, :], 1)
    # A row that saw no finite score near the diagonal has no reference: its size is infinite. A sum of NaN stays NaN.
    finite_M = (sum_M < float("inf")) & (tl.abs(distance_sum_M) < float("inf"))
    again_M = (tl.abs(largest_M) >= STEEP) | ((sum_M == sum_M) & ~finite_M)
    largest_M = reference_M / scale
    move_M = tl.exp2(reference_M - largest_M * scale)
    return largest_M, sum_M * move_M, distance_sum_M * move_M, again_M


@triton.jit(do_not_specialize=["sequences", "tokens", "rows", "sliding_window"])
def row_sweep_kernel(
    q, k, k_tiles, lengths, given_lse, results, strides, sequences, tokens, heads, scale, natural_scale, rows,
    sliding_window, cap_scale, sinks, form: tl.constexpr, tile: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Results of one block of rows of one head. given_lse may be None, and rows … sinks (arguments.py).

    AGAIN: of those blocks alone whose sum is not finite, which gluon_row.py leaves to it.
    """
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    # The longest rows of all heads come first, and heads that share keys run side by side.
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, first, start, length, prompt, first_row, missing = locate(
        program, tl.num_programs(0) // heads, lengths, sequences, tokens, rows, "response", ROWS
    )
    if first >= length:
        return
    if AGAIN:
        sum = tl.load(results.sums + tl.program_id(0))
        if tl.abs(sum) < float("inf"):
            return
    key_head = head // form.group
    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, key_head, form)
    q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
    # Full fp32 keeps both operands in registers: without reloading q would stay there from tile to tile.
    RELOAD: tl.constexpr = form.precision == "ieee" and q_MD.dtype == tl.float32
    FEW: tl.constexpr = KEYS if KEYS < 32 else 32
    # Masks of windows take registers, and tanh does.
    NEAR_KEYS: tl.constexpr = KEYS if sliding_window is None and cap_scale is None else FEW

    begin, far, near = 0, 0, first // KEYS * KEYS
    if sliding_window is not None:
        begin = first_visible(first, sliding_window)
        # Every row of the block sees the keys from `far` on.
        edge = tl.cdiv(tl.maximum(first_visible(first + ROWS - 1, sliding_window) - begin, 0), FEW) * FEW
        far = tl.minimum(begin + edge, begin + (first - begin) // FEW * FEW)
        near = far + (first - far) // KEYS * KEYS
    end = tl.minimum(first + ROWS, length)

    largest_M = tl.zeros([ROWS], tl.float32) - float("inf")
    reference_M = largest_M
    sum_MC, distance_sum_MC = tl.zeros([ROWS, 8], tl.float32), tl.zeros([ROWS, 8], tl.float32)
    for key in tl.range(near, end, NEAR_KEYS, num_stages=1, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        if tile.tma and NEAR_KEYS == KEYS:
            k_ND = load_tma(k_tiles, sequence, start, key, key_head, KEYS, form)  # no row sees keys of other sequences
        else:
            k_ND = load_rows(k_base, strides.k, key, length, NEAR_KEYS, True, form)
        score_MN = masked(capped_products(q_MD, k_ND, cap_scale, form), key, first, sliding_window, True)
        larger_M = tl.maximum(largest_M, tl.max(score_MN, 1) * scale)
        reference_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
        shrink_M = tl.exp2(largest_M - reference_M)
        sum_MC, distance_sum_MC = add_tile(
            sum_MC * shrink_M[:, None], distance_sum_MC * shrink_M[:, None], score_MN, reference_M, key, first, scale
        )
        largest_M = larger_M
    for key in tl.range(far, near, KEYS, num_stages=tile.stages, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        if tile.tma:
            k_ND = load_tma(k_tiles, sequence, start, key, key_head, KEYS, form)
        else:
            k_ND = load_rows(k_base, strides.k, key, length, KEYS, False, form)
        score_MN = capped_products(q_MD, k_ND, cap_scale, form)
        sum_MC, distance_sum_MC = add_tile(sum_MC, distance_sum_MC, score_MN, reference_M, key, first, scale)
    if sliding_window is not None:
        for key in tl.range(begin, far, FEW, num_stages=1, disable_licm=RELOAD):
            if RELOAD:
                q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
            k_ND = load_rows(k_base, strides.k, key, length, FEW, False, form)
            score_MN = masked(capped_products(q_MD, k_ND, cap_scale, form), key, first, sliding_window, False)
            sum_MC, distance_sum_MC = add_tile(sum_MC, distance_sum_MC, score_MN, reference_M, key, first, scale)

    place_M = tl.arange(0, ROWS)
    largest_M, sum_M, distance_sum_M, again_M = finished(
        sum_MC, distance_sum_MC, tl.arange(0, 8).to(tl.float32), largest_M, reference_M, scale
    )
    if tl.max((again_M & (first + place_M < length)).to(tl.int32), 0) > 0:
        zeros_M = tl.zeros([ROWS], tl.float32)
        state = (zeros_M - float("inf"), zeros_M, zeros_M, tl.zeros([ROWS, 1], tl.float32))
        for key in tl.range(begin, end, FEW, num_stages=1, disable_licm=RELOAD):
            if RELOAD:
                q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
            k_ND = load_rows(k_base, strides.k, key, length, FEW, True, form)
            state = online_softmax_step(
                state, q_MD, k_ND, k_ND, key, first, scale, sliding_window, cap_scale, True, False, False, form
            )
        largest_M, sum_M, distance_sum_M, _ = state
    at_M = head.to(tl.int64) * tokens + start + first + place_M
    response_M = (first + place_M >= prompt) & (first + place_M < length)
    store_rows(
        results, given_lse, largest_M, sum_M, distance_sum_M, at_M, place_M, response_M, head, scale, natural_scale,
        sinks, results.sums + tl.program_id(0),
    )  # fmt: skip


def row_sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sequences: Sequences,
    lse_HT: Tensor,
    *,
    scale: float,
    forms: Forms = PLAIN,
    given_lse_HT: Tensor | None = None,
    softmax: Softmax | None = None,
) -> tuple[BlockSums, Tensor | None]:
    """Fills lse, fp32 [Hq, T], at the response rows.

    q is [T, Hq, D] or [B, T, Hq, D], or has fewer rows; sequences lie on the flattened token axis. given_lse_HT, finite
    or NaN, is used for the spans alone. softmax is filled as well, for the bands.

    Returns:
        (the sums of row spans, from which bands makes spans, and out where v is given: q's rows, flattened).
    """
    if uncovered(q, k, v, sequences, scale, forms, given_lse_HT) is None and chosen(q.device):
        sweep = gluon_module().gluon_row_sweep
        return sweep(q, k, sequences, lse_HT, scale=scale, softmax=softmax, again=tile_again()), None
    heads, size = q.shape[-2:]
    out_SHD = None if v is None else torch.empty((q.shape[:-2].numel(), heads, size), dtype=q.dtype, device=q.device)
    parts, steep = (None, None) if softmax is None else (softmax.parts, softmax.steep)
    arguments = common_arguments(q, k, sequences, scale, forms, v) | {
        "given_lse": given_lse_HT,
        "natural_scale": scales(scale, forms.softcap).natural,
        "sinks": forms.sinks,
    }

    def run(tile: Tile) -> BlockSums:
        blocks = sequences.blocks(tile.rows)
        sums_NH = torch.empty((blocks, heads), dtype=torch.float64, device=q.device)
        launch(
            row_sweep_kernel if v is None else row_values_kernel,
            heads * blocks,
            k_tiles=tma_descriptor(k, tile.keys) if tile.tma else None,
            results=RowResults(sums_NH, lse_HT, parts, steep, out_SHD),
            tile=tile,
            **({} if v is None else {"v": v, "v_tiles": tma_descriptor(v, tile.keys) if tile.tma else None}),
            **arguments,
            **options(tile, arguments),
        )
        return BlockSums(sums_NH, tile.rows, from_prompt=v is None)

    def on_sample(sample: Sample) -> None:
        row_sweep(
            sample.q,
            sample.k,
            None if v is None else sample.v,
            sample.sequences,
            sample.results[0],
            scale=scale,
            softmax=None if softmax is None else sample.softmax,
        )

    key = kernel_key("row" if v is None else "row_values", q, arguments)
    tma = tma_compatible(k) and (v is None or tma_compatible(v))
    *_, sums = run_with_tile(key, q, k, tma, run, on_sample)
    return sums, out_SHD
