"""One sweep over the keys for a block of rows: lse, sums of row spans and WAAD, and the output where V is given.

Flash attention's online softmax with two more sums beside Σ p: Σ p·j, j the key's place in its tile, from which
Σ p·(t − s) follows by terms of rows alone; and near the diagonal Σ p·(W − (t − s)) over t − s < W, since
Σ A·min(t − s, W) = W − Σ_{t−s<W} A·(W − (t − s)) for rows that sum to 1. The steady loop over far keys has neither
masks nor window weights: a score costs a maximum, a fused multiply-add into exp2, and the two sums. Near the diagonal
products are subtracted before they are scaled, which is exact however large they are; where far ones are too large for
the fused form (STEEP), that loop takes all keys.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.configurations import Kind, Tile
from rhythm.kernels.launch import launch, options, start
from rhythm.kernels.mean_span import BlockSums
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tiles import (
    STEEP,
    common_arguments,
    describable,
    descriptor,
    head_base,
    load_descriptor,
    load_q,
    load_rows,
    padded_size,
    product,
    scales,
    strides,
    wide,
)
from rhythm.kernels.tuning import Sample


@triton.jit
def moments(p_MN, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(Σ_j p·1, Σ_j p·j) of each row: with j = 2i or 2i + 1, the sums of neighbours serve both."""
    even_M, odd_M = tl.split(tl.reshape(p_MN, [ROWS, KEYS // 2, 2]))
    place = (2 * tl.arange(0, KEYS // 2)).to(tl.float32)[None, :]
    pair_M = even_M + odd_M
    return tl.sum(pair_M, 1), tl.sum(pair_M * place + odd_M, 1)


@triton.jit
def absorb(
    state, q_MD, k_ND, v_ND, key, first, scale, window,
    NEAR: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax; NEAR: it may lie above the diagonal or within the window.

    state: (largest, Σ p, Σ p·(first row − key), Σ p·(W − distance) within the window, Σ p·v). largest is the product
    that p is relative to where NEAR, and its exponent, rounded, far from the diagonal.
    """
    largest_M, sum_M, reach_M, inside_M, out_MD = state
    ROWS: tl.constexpr = q_MD.shape[0]
    KEYS: tl.constexpr = k_ND.shape[0]
    score_MN = product(q_MD, k_ND, PRECISION)
    if NEAR:
        place_N = (tl.arange(0, KEYS) + (key - first)).to(tl.float32)
        distance_MN = tl.arange(0, ROWS).to(tl.float32)[:, None] - place_N[None, :]
        score_MN = tl.where(distance_MN >= 0, score_MN, float("-inf"))
    larger_M = tl.maximum(largest_M, tl.max(score_MN, 1) * (1.0 if NEAR else scale))
    # While every score so far is −inf any finite reference will do.
    reference_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    if NEAR:
        shrink_M = tl.exp2((largest_M - reference_M) * scale)
        p_MN = tl.exp2((score_MN - reference_M[:, None]) * scale)
    else:
        shrink_M = tl.exp2(largest_M - reference_M)
        p_MN = tl.exp2(score_MN * scale - reference_M[:, None])
    tile_sum_M, tile_place_M = moments(p_MN, ROWS, KEYS)
    sum_M = sum_M * shrink_M + tile_sum_M
    reach_M = reach_M * shrink_M + (tile_sum_M * (first - key).to(tl.float32) - tile_place_M)
    inside_M = inside_M * shrink_M
    if NEAR:
        inside_M += tl.sum(p_MN * tl.maximum(window - distance_MN, 0.0), 1)
    if VALUES:
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD * shrink_M[:, None], input_precision=PRECISION)
    return larger_M, sum_M, reach_M, inside_M, out_MD


@triton.jit
def before_near(state, scale):
    """(the state for the loop near the diagonal, whether it is empty: the far keys were too steep and come again).

    p becomes relative to a product: one whose exponent is within an ulp or two of the reference so far will do. An
    output that overflowed is NaN from here on, which mend_output (values.py) sets right.
    """
    reference_M, sum_M, reach_M, inside_M, out_MD = state
    steep = tl.max(tl.abs(reference_M), 0) >= STEEP
    largest_M = tl.where(steep, float("-inf"), reference_M / scale)
    move_M = tl.where(steep, 0.0, tl.exp2(reference_M - largest_M * scale))
    sum_M = tl.where(steep, 0.0, sum_M * move_M)
    reach_M = tl.where(steep, 0.0, reach_M * move_M)
    return (largest_M, sum_M, reach_M, inside_M, out_MD * move_M[:, None]), steep


@triton.jit(do_not_specialize=["sequences", "tokens", "window"])
def row_sweep_kernel(
    q, k, v, k_tiles, v_tiles, cu_seqlens, prompt_lens, given_lse, sums, waad, lse, parts, steep, out,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim, v_batch, v_token, v_head, v_dim,
    sequences, tokens, heads, scale, natural_scale, window,
    GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr, VALUES: tl.constexpr,
    GIVEN: tl.constexpr, PARTS: tl.constexpr,
    SIGN: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The longest rows of all heads come first, and heads that share keys run side by side.
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, start, length, prompt, first = locate(
        program, tl.num_programs(0) // heads, cu_seqlens, prompt_lens, sequences, tokens, PACKED, PROMPTS,
        not VALUES, ROWS,
    )  # fmt: skip
    if first >= length:
        return
    q_base = head_base(q, sequence, start, head, q_batch, q_token, q_head, BATCHED)
    k_base = head_base(k, sequence, start, head // GROUP, k_batch, k_token, k_head, BATCHED)
    v_base = head_base(v, sequence, start, head // GROUP, v_batch, v_token, v_head, BATCHED)
    q_MD = load_q(q_base, first, length, q_token, q_dim, SIGN, ROWS, SIZE, PADDED, WIDE, UPCAST)
    # Full fp32 keeps both operands in registers: q would stay there from tile to tile.
    RELOAD: tl.constexpr = PRECISION == "ieee" and q_MD.dtype == tl.float32
    zeros_M = tl.zeros([ROWS], tl.float32)
    state = (zeros_M - float("inf"), zeros_M, zeros_M, zeros_M, tl.zeros([ROWS, PADDED if VALUES else 1], tl.float32))

    # Far keys: at distance ≥ window from every row of the block.
    near = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    for key in tl.range(0, near, KEYS, num_stages=STAGES, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, first, length, q_token, q_dim, SIGN, ROWS, SIZE, PADDED, WIDE, UPCAST)
        if TMA:
            k_ND = load_descriptor(k_tiles, sequence, start, key, head // GROUP, KEYS, PADDED, BATCHED, UPCAST)
        else:
            k_ND = load_rows(k_base, key, length, k_token, k_dim, KEYS, False, SIZE, PADDED, WIDE, UPCAST)
        v_ND = k_ND
        if VALUES:
            if TMA:
                v_ND = load_descriptor(v_tiles, sequence, start, key, head // GROUP, KEYS, PADDED, BATCHED, UPCAST)
            else:
                v_ND = load_rows(v_base, key, length, v_token, v_dim, KEYS, False, SIZE, PADDED, WIDE, UPCAST)
        state = absorb(state, q_MD, k_ND, v_ND, key, first, scale, window, False, VALUES, PRECISION)
    MOST: tl.constexpr = 16 if VALUES and PADDED > 128 else 32  # the output takes the registers
    NEAR_KEYS: tl.constexpr = KEYS if KEYS < MOST else MOST
    state, again = before_near(state, scale)
    near = tl.where(again, 0, near)
    for key in tl.range(near, tl.minimum(first + ROWS, length), NEAR_KEYS, num_stages=STAGES, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, first, length, q_token, q_dim, SIGN, ROWS, SIZE, PADDED, WIDE, UPCAST)
        k_ND = load_rows(k_base, key, length, k_token, k_dim, NEAR_KEYS, True, SIZE, PADDED, WIDE, UPCAST)
        v_ND = k_ND
        if VALUES:
            v_ND = load_rows(v_base, key, length, v_token, v_dim, NEAR_KEYS, True, SIZE, PADDED, WIDE, UPCAST)
        state = absorb(state, q_MD, k_ND, v_ND, key, first, scale, window, True, VALUES, PRECISION)

    largest_M, sum_M, reach_M, inside_M, out_MD = state
    place_M = tl.arange(0, ROWS)
    logit_M = largest_M * natural_scale
    defined_M = (sum_M > 0) & (tl.abs(logit_M) < float("inf"))  # else a score is NaN or +inf, or all are −inf
    if VALUES:
        dim_D = tl.arange(0, PADDED)
        at_MD = ((start + first + place_M).to(tl.int64) * heads + head)[:, None] * SIZE + dim_D[None, :]
        out_MD = (out_MD / tl.where(defined_M, sum_M, float("nan"))[:, None]).to(out.dtype.element_ty)
        tl.store(out + at_MD, out_MD, mask=(first + place_M < length)[:, None] & (dim_D < SIZE)[None, :])
    span_M = tl.where(defined_M, reach_M / sum_M + place_M.to(tl.float32), float("nan"))
    # Where the window holds the whole row, WAAD is its span: of W − Σ with W beyond the sequence nothing would be left.
    waad_M = tl.where(first + place_M < window, span_M, tl.where(defined_M, window - inside_M / sum_M, float("nan")))
    log2_sum_M = tl.where(defined_M, tl.log2(sum_M), float("nan"))
    lse_M = logit_M + log2_sum_M * 0.6931471805599453
    at_M = head.to(tl.int64) * tokens + start + first + place_M
    response_M = (first + place_M >= prompt) & (first + place_M < length)
    if GIVEN:  # the weights are those of a lse from outside: all of a row's by the same factor
        given_M = tl.load(given_lse + at_M, mask=response_M, other=0.0)
        span_M *= tl.exp2((lse_M - given_M) * 1.4426950408889634)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(response_M, span_M, 0.0).to(tl.float64), 0))
    tl.store(waad + at_M, waad_M, mask=response_M)
    tl.store(lse + at_M, lse_M, mask=response_M)
    if PARTS:
        tl.store(parts + 2 * at_M, largest_M, mask=response_M)
        tl.store(parts + 2 * at_M + 1, log2_sum_M, mask=response_M)
        exponent_M = tl.where(response_M & defined_M, tl.abs(largest_M * scale), 0.0)
        tl.store(steep, 1, mask=tl.max(exponent_M, 0) >= STEEP)  # whoever stores it, it is the same


def row_sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sequences: Sequences,
    waad_HT: Tensor,
    lse_HT: Tensor,
    *,
    scale: float,
    window: int,
    given_lse_HT: Tensor | None = None,
    softmax: Softmax | None = None,
) -> tuple[BlockSums, Tensor | None]:
    """Fills WAAD and lse, each fp32 [Hq, T], at the response rows.

    q is [T, Hq, D] or [B, T, Hq, D]; sequences lie on the flattened token axis. given_lse_HT, finite or NaN, is used
    for the spans alone. softmax is filled as well, for the column sweep.

    Returns:
        (the sums of row spans, from which mean_span makes spans, and out [T, Hq, D] where v is given).
    """
    heads, size = q.shape[-2:]
    out = None if v is None else torch.empty((sequences.tokens, heads, size), dtype=q.dtype, device=q.device)
    values = k if v is None else v
    arguments = common_arguments(q, k, sequences, scale)
    arguments["natural_scale"] = scales(scale)["natural_scale"]
    arguments["WIDE"] = arguments["WIDE"] or wide(values)
    v_batch, v_token, v_head, v_dim = strides(values)
    found: list[BlockSums] = []

    def run(tile: Tile) -> None:
        blocks = sequences.blocks(tile.rows)
        sums_NH = torch.empty((blocks, heads), dtype=torch.float64, device=q.device)
        found[:] = [BlockSums(sums_NH, tile.rows, from_prompt=v is None)]
        start(
            row_sweep_kernel,
            heads * blocks,
            v=values,
            k_tiles=descriptor(k, tile.keys) if tile.tma else k,
            v_tiles=descriptor(values, tile.keys) if tile.tma else values,
            given_lse=lse_HT if given_lse_HT is None else given_lse_HT,
            sums=sums_NH,
            waad=waad_HT,
            lse=lse_HT,
            parts=lse_HT if softmax is None else softmax.parts,
            steep=lse_HT if softmax is None else softmax.steep,
            out=q if out is None else out,
            v_batch=v_batch,
            v_token=v_token,
            v_head=v_head,
            v_dim=v_dim,
            window=min(window, sequences.tokens),
            VALUES=v is not None,
            GIVEN=given_lse_HT is not None,
            PARTS=softmax is not None,
            ROWS=tile.rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            TMA=tile.tma,
            **arguments,
            **options(tile),
        )

    kind = Kind("row" if v is None else "row_values", q.element_size(), padded_size(size))

    def again(sample: Sample) -> None:
        one, two, _ = sample.results
        row_sweep(
            sample.q, sample.k, None if v is None else sample.v, sample.sequences, one, two, scale=scale,
            window=window, softmax=None if softmax is None else sample.softmax,
        )  # fmt: skip

    launch(kind, q, k, describable(k) and describable(values), run, again)
    (sums,) = found
    return sums, out
