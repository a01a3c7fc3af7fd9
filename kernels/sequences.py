"""Where the sequences lie, and which program works on which block of which sequence.

Everything stays on the device: no program table is built and nothing here waits. Lengths that cu_seqlens or
prompt_lens give beyond the tensors are cut to them, so that no kernel reads outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """`count` sequences on a flattened axis of `tokens`.

    Attributes:
        cu_seqlens: int32 [count + 1]; None: all of the same length.
        prompt_lens: int32 or int64 [count]; None: no prompts.
    """

    cu_seqlens: Tensor | None
    prompt_lens: Tensor | None
    tokens: int
    count: int

    def blocks(self, size: int) -> int:
        """Upper bound on the number of blocks of `size` rows, so that the host never reads cu_seqlens."""
        if self.cu_seqlens is None:
            return self.count * int(triton.cdiv(self.tokens // self.count, size))
        return self.tokens // size + self.count


@triton.jit
def bound(cu_seqlens, i, tokens):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens)


@triton.jit
def locate(
    program, programs, cu_seqlens, prompt_lens, sequences, tokens,
    PACKED: tl.constexpr, PROMPTS: tl.constexpr, SKIP_PROMPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(sequence, its first token, length and prompt, first row of the block): no work where that is beyond the length.

    Sequence i has the blocks from cu_seqlens[i] // BLOCK + i on: at least as many as it needs. The last blocks come
    first, since their rows are the longest. SKIP_PROMPT: blocks begin where the prompt ends.
    """
    block = programs - 1 - program
    if PACKED:
        sequence = block * 0
        beyond = sequence + sequences
        while beyond - sequence > 1:  # the last sequence that begins at or before the block
            middle = (sequence + beyond) // 2
            before = bound(cu_seqlens, middle, tokens) // BLOCK + middle <= block
            sequence = tl.where(before, middle, sequence)
            beyond = tl.where(before, beyond, middle)
        start = bound(cu_seqlens, sequence, tokens)
        length = tl.maximum(bound(cu_seqlens, sequence + 1, tokens) - start, 0)
        index = block - (start // BLOCK + sequence)
    else:
        length = tokens // sequences
        sequence = block // tl.cdiv(length, BLOCK)
        index = block % tl.cdiv(length, BLOCK)
        start = sequence * length
    prompt = tl.minimum(tl.maximum(tl.load(prompt_lens + sequence).to(tl.int32), 0), length) if PROMPTS else 0
    first = index * BLOCK
    if SKIP_PROMPT:
        first += prompt
    return sequence, start, length, prompt, first
