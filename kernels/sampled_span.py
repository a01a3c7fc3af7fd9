"""Spans from a sample of each response's rows, for a lse that came from outside.

The response is cut into equal strata, and the middle row of each is used. A program's rows lie apart, so q is gathered.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms, common_arguments
from rhythm.kernels.launch import kernel_key, launch, options, run_with_tile
from rhythm.kernels.scores import capped_products, first_visible
from rhythm.kernels.sequences import Sequences, extent
from rhythm.kernels.tile_tables import Tile
from rhythm.kernels.tiles import (
    LOG2_E,
    finite_or_nan,
    gather_rows,
    head_base,
    load_rows,
    query_base,
    signed,
)
from rhythm.kernels.tuning import Sample


@triton.jit(do_not_specialize=["sequences", "tokens", "count", "rows", "sliding_window"])
def sampled_span_kernel(
    q, k, lengths, lse, sums, strides, sequences, tokens, heads, count, scale, rows, sliding_window, cap_scale,
    form: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """sums [B, Hq, blocks]: Σ over the sampled rows of a block of Σ_s A[t, s]·(t − s)."""
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    block, head = tl.program_id(0) // heads % tl.cdiv(count, ROWS), tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads // tl.cdiv(count, ROWS)
    start, length, prompt, first_row, missing = extent(sequence, lengths, sequences, tokens, rows)
    response = length - prompt
    index_M = block * ROWS + tl.arange(0, ROWS)
    stratum_M = ((2 * index_M + 1).to(tl.int64) * response // (2 * count)).to(tl.int32)
    row_M = prompt + tl.where(response > count, stratum_M, index_M)
    used_M = index_M < tl.minimum(count, response)

    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, head // form.group, form)
    q_MD = signed(gather_rows(q_base, strides.q, row_M, used_M, form), form.sign)
    lse_M = tl.load(lse + head.to(tl.int64) * tokens + start + row_M, mask=used_M, other=0.0)
    lse_M = finite_or_nan(lse_M)
    sum_M = tl.zeros([ROWS], tl.float32)
    begin = 0
    if sliding_window is not None:
        begin = first_visible(tl.min(tl.where(used_M, row_M, length), 0), sliding_window)
    for key in tl.range(begin, tl.max(tl.where(used_M, row_M, -1), 0) + 1, KEYS, num_stages=tile.stages):
        k_ND = load_rows(k_base, strides.k, key, length, KEYS, True, form)
        distance_MN = row_M[:, None] - (key + tl.arange(0, KEYS))[None, :]
        exponent_MN = capped_products(q_MD, k_ND, cap_scale, form) * scale - (lse_M * LOG2_E)[:, None]
        visible_MN = distance_MN >= 0
        if sliding_window is not None:
            visible_MN = visible_MN & (distance_MN < sliding_window)
        p_MN = tl.exp2(tl.where(visible_MN, exponent_MN, float("-inf")))
        sum_M += tl.sum(p_MN * distance_MN.to(tl.float32), 1)
    total = tl.sum(tl.where(used_M, sum_M, 0.0).to(tl.float64), 0)
    at = (sequence * heads + head).to(tl.int64) * tl.cdiv(count, ROWS) + block
    tl.store(sums + at, total)


def sampled_span(
    q: Tensor, k: Tensor, lse_HT: Tensor, sequences: Sequences, *, scale: float, count: int, forms: Forms = PLAIN
) -> Tensor:
    """Mean row span over `count` rows of each response (all rows where there are fewer).

    Returns:
        fp32 [B, Hq]; NaN for sequences without response rows.
    """
    heads = q.shape[-2]
    arguments = common_arguments(q, k, sequences, scale, forms)

    def run(tile: Tile) -> Tensor:
        blocks = triton.cdiv(count, tile.rows)
        sums = torch.empty((sequences.count, heads, blocks), dtype=torch.float64, device=q.device)
        launch(
            sampled_span_kernel,
            sums.numel(),
            lse=lse_HT,
            sums=sums,
            count=count,
            tile=tile,
            **arguments,
            **options(tile),
        )
        return sums

    def on_sample(sample: Sample) -> None:
        sampled_span(sample.q, sample.k, sample.lse, sample.sequences, scale=scale, count=count)

    key = kernel_key("sampled", q, arguments)
    *_, sums_BHN = run_with_tile(key, q, k, False, run, on_sample)
    return (sums_BHN.sum(dim=-1) / response_rows(sequences, q.device)[:, None].clamp(max=count)).float()


def response_rows(sequences: Sequences, device: torch.device) -> Tensor:
    """Number of response rows of each sequence, int64 [B], computed on the device."""

    def lengths(bounds: Tensor | None, total: int) -> Tensor:
        if bounds is None:
            return torch.full((sequences.count,), total // sequences.count, device=device)
        return bounds.clamp(0, total).diff().clamp(min=0).long()

    length_B = lengths(sequences.cu_seqlens, sequences.tokens)
    response_B = length_B
    if sequences.prompt_lens is not None:
        response_B = length_B - torch.minimum(sequences.prompt_lens.clamp(min=0), length_B)
    if not sequences.fewer_rows:
        return response_B
    return torch.minimum(response_B, lengths(sequences.cu_rows, sequences.rows or 0))
