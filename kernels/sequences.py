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
    cu_rows: Tensor | None

    @classmethod
    def of(cls, sequences: Sequences) -> Lengths:
        return cls(sequences.cu_seqlens, sequences.prompt_lens, sequences.cu_rows)


@triton.jit
def bound(cu_seqlens, i, tokens):
    """cu_seqlens[i], clamped to the tokens there are."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens)


@triton.jit
def extent(sequence, lengths, sequences, tokens, rows):
    """(first token, length, prompt length, first row on q's axis, tokens without a row) of one of the sequences.

    rows: length of q's axis, None where it is the token axis. The first tokens of a sequence may have no row in q; they
    count as prompt.
    """
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
    if rows is None:
        return start, length, prompt, start, 0
    else:
        if lengths.cu_rows is not None:
            first_row = bound(lengths.cu_rows, sequence, rows)
            count = tl.maximum(bound(lengths.cu_rows, sequence + 1, rows) - first_row, 0)
        else:
            count = rows // sequences
            first_row = sequence * count
        return start, length, tl.maximum(prompt, length - count), first_row, length - count


@triton.jit
def locate(program, programs, lengths, sequences, tokens, rows, FROM: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, first row of the block, and the sequence's `extent`).

    A block whose first row is at or beyond the length has no work. Sequence i owns the blocks from
    cu_seqlens[i] // BLOCK + i on, at least as many as it needs. The last blocks run first, since their rows are the
    longest. FROM: where blocks begin: "token" 0, the first "row" of q, or the first row of the "response".
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
        start, length, prompt, first_row, missing = extent(sequence, lengths, sequences, tokens, rows)
        index = block - (start // BLOCK + sequence)
    else:
        blocks = tl.cdiv(tokens // sequences, BLOCK)
        sequence = block // blocks
        index = block % blocks
        start, length, prompt, first_row, missing = extent(sequence, lengths, sequences, tokens, rows)
    first = index * BLOCK
    if FROM == "response":
        first += prompt
    if FROM == "row" and rows is not None:
        first += missing
    return sequence, first, start, length, prompt, first_row, missing
