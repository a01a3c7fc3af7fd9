"""The sequences of a call, and which block of which sequence each program works on.

All of it is computed on the device, so that no launch waits for lengths. Lengths from cu_seqlens or prompt_lens that
reach beyond the tensors are clamped to them, so that no kernel reads outside.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rhythm.shapes import Sequences as Sequences


class Lengths(NamedTuple):
    """The tensors of `Sequences`, as kernels take them.

    Numbers that differ from call to call are arguments of their own, named in do_not_specialize: of those in a tuple
    Triton compiles one variant for 1, one for multiples of 16 and one for others.
    """

    cu_seqlens: Tensor | None
    prompt_lens: Tensor | None

    @classmethod
    def of(cls, sequences: Sequences) -> Lengths:
        return cls(sequences.cu_seqlens, sequences.prompt_lens)


@triton.jit
def bound(cu_seqlens, i, tokens):
    """cu_seqlens[i], clamped to the tokens there are."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens)


@triton.jit
def extent(sequence, lengths, sequences, tokens):
    """(first token, length, prompt length) of one of the sequences."""
    if lengths.cu_seqlens is not None:
        start = bound(lengths.cu_seqlens, sequence, tokens)
        length = tl.maximum(bound(lengths.cu_seqlens, sequence + 1, tokens) - start, 0)
    else:
        length = tokens // sequences
        start = sequence * length
    if lengths.prompt_lens is not None:
        prompt = tl.minimum(tl.maximum(tl.load(lengths.prompt_lens + sequence).to(tl.int32), 0), length)
    else:
        prompt = 0
    return start, length, prompt


@triton.jit
def locate(program, programs, lengths, sequences, tokens, SKIP_PROMPT: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, its first token, length and prompt length, first row of the block).

    A block whose first row is at or beyond the length has no work. Sequence i owns the blocks from
    cu_seqlens[i] // BLOCK + i on, at least as many as it needs. The last blocks run first, since their rows are the
    longest. SKIP_PROMPT: blocks begin where the prompt ends.
    """
    block = programs - 1 - program
    if lengths.cu_seqlens is not None:
        sequence = block * 0
        beyond = sequence + sequences
        while beyond - sequence > 1:  # the last sequence that begins at or before the block
            middle = (sequence + beyond) // 2
            before = bound(lengths.cu_seqlens, middle, tokens) // BLOCK + middle <= block
            sequence = tl.where(before, middle, sequence)
            beyond = tl.where(before, beyond, middle)
        start, length, prompt = extent(sequence, lengths, sequences, tokens)
        index = block - (start // BLOCK + sequence)
    else:
        blocks = tl.cdiv(tokens // sequences, BLOCK)
        sequence = block // blocks
        index = block % blocks
        start, length, prompt = extent(sequence, lengths, sequences, tokens)
    first = index * BLOCK
    if SKIP_PROMPT:
        first += prompt
    return sequence, start, length, prompt, first
