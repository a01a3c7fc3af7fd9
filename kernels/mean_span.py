"""Sums of row spans → spans: the mean over each sequence's response rows, in fp64 and in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.launch import start
from rhythm.kernels.sequences import Sequences, bound


@dataclass(frozen=True)
class BlockSums:
    """What the row sweep's programs leave: fp64 [blocks, Hq], the row spans of a block's response rows added up.

    A sequence's blocks are those of `locate` (sequences.py) for blocks of `rows` rows, the last block first;
    from_prompt: they begin where its prompt ends. Entries of blocks that begin beyond the sequence are not defined.
    """

    sums: Tensor
    rows: int
    from_prompt: bool


@triton.jit(do_not_specialize=["sequences", "tokens", "blocks"])
def mean_span_kernel(
    sums, cu_seqlens, prompt_lens, span, sequences, tokens, blocks, heads,
    PACKED: tl.constexpr, PROMPTS: tl.constexpr, FROM_PROMPT: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    if PACKED:
        start = bound(cu_seqlens, sequence, tokens)
        length = tl.maximum(bound(cu_seqlens, sequence + 1, tokens) - start, 0)
        first = start // ROWS + sequence
    else:
        length = tokens // sequences
        first = sequence * tl.cdiv(length, ROWS)
    response = length
    if PROMPTS:
        response -= tl.minimum(tl.maximum(tl.load(prompt_lens + sequence).to(tl.int32), 0), length)
    count = tl.cdiv(response if FROM_PROMPT else length, ROWS)
    place_N = tl.arange(0, SUMS)
    sum_N = tl.zeros([SUMS], tl.float64)
    for block in range(0, count, SUMS):
        at_N = sums + (blocks - 1 - (first + block + place_N)).to(tl.int64) * heads + head
        sum_N += tl.load(at_N, mask=block + place_N < count, other=0.0)
    mean = tl.sum(sum_N, 0) / response.to(tl.float64)
    tl.store(span + tl.program_id(0), tl.where(response > 0, mean, float("nan")).to(tl.float32))


def mean_span(sums: BlockSums, sequences: Sequences, span_BH: Tensor) -> None:
    """Fills the spans, fp32 [B, Hq]; NaN where there are no response rows."""
    blocks, heads = sums.sums.shape
    packed, prompts = sequences.cu_seqlens is not None, sequences.prompt_lens is not None
    if span_BH.numel():
        start(
            mean_span_kernel,
            sequences.count * heads,
            sums=sums.sums,
            cu_seqlens=sequences.cu_seqlens if packed else sums.sums,
            prompt_lens=sequences.prompt_lens if prompts else sums.sums,
            span=span_BH,
            sequences=sequences.count,
            tokens=sequences.tokens,
            blocks=blocks,
            heads=heads,
            PACKED=packed,
            PROMPTS=prompts,
            FROM_PROMPT=sums.from_prompt,
            ROWS=sums.rows,
            SUMS=1024,  # all of 131072 tokens at 128 rows a block: one step
            num_warps=4,
        )
