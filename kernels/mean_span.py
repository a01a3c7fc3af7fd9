"""Row spans → spans: the mean over each sequence's response rows, in fp64 and in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rhythm.kernels.launch import start
from rhythm.kernels.sequences import Sequences, bound
from torch import Tensor


@triton.jit
def mean_span_kernel(
    row_span, cu_seqlens, prompt_lens, span, sequences, tokens, heads,
    PACKED: tl.constexpr, PROMPTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    if PACKED:
        start, end = bound(cu_seqlens, sequence, tokens), bound(cu_seqlens, sequence + 1, tokens)
    else:
        start, end = sequence * (tokens // sequences), (sequence + 1) * (tokens // sequences)
    first = start
    if PROMPTS:
        first += tl.minimum(tl.maximum(tl.load(prompt_lens + sequence).to(tl.int32), 0), tl.maximum(end - start, 0))
    row_M = tl.arange(0, ROWS)
    sum_M = tl.zeros([ROWS], tl.float64)
    for row in range(first, end, ROWS):
        at_M = row_span + head.to(tl.int64) * tokens + row + row_M
        sum_M += tl.load(at_M, mask=row + row_M < end, other=0.0).to(tl.float64)
    mean = tl.sum(sum_M, 0) / (end - first).to(tl.float64)
    tl.store(span + tl.program_id(0), tl.where(end > first, mean, float("nan")).to(tl.float32))


def mean_span(row_span_HT: Tensor, sequences: Sequences) -> Tensor:
    """[B, Hq] fp32; NaN where there are no response rows."""
    heads, tokens = row_span_HT.shape
    span_BH = torch.empty((sequences.count, heads), device=row_span_HT.device)
    packed, prompts = sequences.cu_seqlens is not None, sequences.prompt_lens is not None
    if span_BH.numel():
        start(
            mean_span_kernel,
            sequences.count * heads,
            row_span=row_span_HT,
            cu_seqlens=sequences.cu_seqlens if packed else row_span_HT,
            prompt_lens=sequences.prompt_lens if prompts else row_span_HT,
            span=span_BH,
            sequences=sequences.count,
            tokens=tokens,
            heads=heads,
            PACKED=packed,
            PROMPTS=prompts,
            ROWS=1024,
            num_warps=4,
        )
    return span_BH
