"""Sums of row spans → spans: the mean over each sequence's response rows, in fp64 and in a fixed order.

Programs of the bands' launch (bands.py) do it, which comes after the row sweep that writes the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.sequences import extent

SUMS = tl.constexpr(1024)
"""Blocks that one step adds: all of 131072 tokens at 128 rows per block."""


@dataclass(frozen=True)
class BlockSums:
    """What the row sweep's programs write: for each block and head the sum of the row spans of its response rows.

    Attributes:
        sums: fp64 [blocks, Hq]. Blocks are those of `locate` (sequences.py), the last block first; entries of blocks
            that begin beyond their sequence are undefined.
        rows: rows per block.
        from_prompt: a sequence's blocks begin where its prompt ends, not at its first row in q.
    """

    sums: Tensor
    rows: int
    from_prompt: bool


@triton.jit
def span_program(
    program, sums, lengths, span, sequences, tokens, blocks, heads, rows, FROM_PROMPT: tl.constexpr, ROWS: tl.constexpr
):
    """The span of one head of one sequence; blocks: length of sums, for the rest see BlockSums."""
    sequence, head = program // heads, program % heads
    start, length, prompt, _, missing = extent(sequence, lengths, sequences, tokens, rows)
    packed_first, equal_first = start // ROWS + sequence, sequence * tl.cdiv(length, ROWS)
    first = equal_first if lengths.cu_seqlens is None else packed_first
    response = length - prompt
    count = tl.cdiv(response if FROM_PROMPT else length - missing, ROWS)
    place_N = tl.arange(0, SUMS)
    sum_N = tl.zeros([SUMS], tl.float64)
    for block in range(0, count, SUMS):
        at_N = sums + (blocks - 1 - (first + block + place_N)).to(tl.int64) * heads + head
        sum_N += tl.load(at_N, mask=block + place_N < count, other=0.0)
    mean = tl.sum(sum_N, 0) / response.to(tl.float64)
    tl.store(span + program, tl.where(response > 0, mean, float("nan")).to(tl.float32))
