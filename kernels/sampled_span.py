"""Spans from some rows of each response, for a lse that came from outside.

The response is cut into equal strata and each gives its middle row, so a program's rows lie apart: q is gathered.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.configurations import Kind, Tile
from rhythm.kernels.launch import launch, options, start
from rhythm.kernels.sequences import Sequences, bound
from rhythm.kernels.tiles import common_arguments, finite_or_nan, head_base, load_rows, padded_size, product, signed
from rhythm.kernels.tuning import Sample


@triton.jit(do_not_specialize=["sequences", "tokens", "count"])
def sampled_span_kernel(
    q, k, cu_seqlens, prompt_lens, lse, sums,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    sequences, tokens, heads, count, scale,
    SIGN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, PROMPTS: tl.constexpr, BATCHED: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums [B, Hq, blocks]: Σ over the rows of a block of Σ_s A[t, s]·(t − s)."""
    block, head = tl.program_id(0) // heads % tl.cdiv(count, ROWS), tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads // tl.cdiv(count, ROWS)
    if PACKED:
        begin = bound(cu_seqlens, sequence, tokens)
        length = tl.maximum(bound(cu_seqlens, sequence + 1, tokens) - begin, 0)
    else:
        length = tokens // sequences
        begin = sequence * length
    prompt = tl.minimum(tl.maximum(tl.load(prompt_lens + sequence).to(tl.int32), 0), length) if PROMPTS else 0
    response = length - prompt
    index_M = block * ROWS + tl.arange(0, ROWS)
    stratum_M = ((2 * index_M + 1).to(tl.int64) * response // (2 * count)).to(tl.int32)
    row_M = prompt + tl.where(response > count, stratum_M, index_M)
    used_M = index_M < tl.minimum(count, response)

    q_base = head_base(q, sequence, begin, head, q_batch, q_token, q_head, BATCHED)
    k_base = head_base(k, sequence, begin, head // GROUP, k_batch, k_token, k_head, BATCHED)
    dim_D = tl.arange(0, PADDED)
    at_MD = q_base + row_M[:, None].to(tl.int64) * q_token + dim_D[None, :].to(tl.int64) * q_dim
    q_MD = tl.load(at_MD, mask=used_M[:, None] & (dim_D < SIZE)[None, :], other=0.0)
    q_MD = signed(q_MD.to(tl.float32) if UPCAST else q_MD, SIGN)
    lse_M = tl.load(lse + head.to(tl.int64) * tokens + begin + row_M, mask=used_M, other=0.0)
    lse_M = finite_or_nan(lse_M)
    sum_M = tl.zeros([ROWS], tl.float32)
    for key in tl.range(0, tl.max(tl.where(used_M, row_M, -1), 0) + 1, KEYS, num_stages=STAGES):
        k_ND = load_rows(k_base, key, length, k_token, k_dim, KEYS, True, SIZE, PADDED, WIDE, UPCAST)
        distance_MN = row_M[:, None] - (key + tl.arange(0, KEYS))[None, :]
        exponent_MN = product(q_MD, k_ND, PRECISION) * scale - (lse_M * 1.4426950408889634)[:, None]
        p_MN = tl.exp2(tl.where(distance_MN >= 0, exponent_MN, float("-inf")))
        sum_M += tl.sum(p_MN * distance_MN.to(tl.float32), 1)
    total = tl.sum(tl.where(used_M, sum_M, 0.0).to(tl.float64), 0)
    at = (sequence * heads + head).to(tl.int64) * tl.cdiv(count, ROWS) + block
    tl.store(sums + at, total)


def sampled_span(q: Tensor, k: Tensor, lse_HT: Tensor, sequences: Sequences, *, scale: float, count: int) -> Tensor:
    """[B, Hq] fp32: the mean over `count` rows of each response (all where there are fewer); NaN without any."""
    heads = q.shape[-2]
    arguments = common_arguments(q, k, sequences, scale)
    found: list[Tensor] = []

    def run(tile: Tile) -> None:
        blocks = triton.cdiv(count, tile.rows)
        sums = torch.empty((sequences.count, heads, blocks), dtype=torch.float64, device=q.device)
        found[:] = [sums]
        start(
            sampled_span_kernel,
            sums.numel(),
            lse=lse_HT,
            sums=sums,
            count=count,
            ROWS=tile.rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            **arguments,
            **options(tile),
        )

    def again(sample: Sample) -> None:
        sampled_span(sample.q, sample.k, sample.lse, sample.sequences, scale=scale, count=count)

    launch(Kind("sampled", q.element_size(), padded_size(q.shape[-1])), q, k, False, run, again)
    (sums,) = found
    return (sums.sum(dim=-1) / sampled_rows(sequences, q.device)[:, None].clamp(max=count)).float()


def sampled_rows(sequences: Sequences, device: torch.device) -> Tensor:
    """Response rows of each sequence, int64 [B], on the device."""
    if sequences.cu_seqlens is None:
        lengths = torch.full((sequences.count,), sequences.tokens // sequences.count, device=device)
    else:
        lengths = sequences.cu_seqlens.clamp(0, sequences.tokens).diff().clamp(min=0).long()
    if sequences.prompt_lens is None:
        return lengths
    return lengths - torch.minimum(sequences.prompt_lens.clamp(min=0), lengths)
