"""The memory that an op's kernels write into: one launch fills it with NaN and replaces infinities in a given lse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.launch import launch
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tiles import finite_or_nan

ENTRIES = 1024


@dataclass(frozen=True)
class Results:
    """fp32 tensors, each with its own storage, as the results of an op must have.

    Attributes:
        span: [B, Hq].
        waad, fai, lse: [Hq, T].
        given_lse: [Hq, T], the lse from outside with NaN in place of ±inf, since such a row has no weights; None if
            none was given.
        softmax: memory for the row sweep; None if a lse was given.
    """

    span: Tensor
    waad: Tensor
    fai: Tensor
    lse: Tensor
    given_lse: Tensor | None
    softmax: Softmax | None


@triton.jit(do_not_specialize=["spans", "rows"])
def results_kernel(span, waad, fai, lse, given_lse, finite_lse, steep, spans, rows, ENTRIES: tl.constexpr):
    """ENTRIES entries of each result. Without given_lse (None) steep is set to 0."""
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    nan = tl.full([ENTRIES], float("nan"), tl.float32)
    tl.store(span + at, nan, mask=at < spans)
    tl.store(waad + at, nan, mask=at < rows)
    tl.store(fai + at, nan, mask=at < rows)
    tl.store(lse + at, nan, mask=at < rows)
    if given_lse is not None:
        tl.store(finite_lse + at, finite_or_nan(tl.load(given_lse + at, mask=at < rows)), mask=at < rows)
    else:
        tl.store(steep, 0, mask=tl.program_id(0) == 0)


def undefined_results(
    sequences: int, heads: int, tokens: int, device: torch.device, given_lse_HT: Tensor | None
) -> Results:
    """Results in which all but given_lse and softmax is NaN."""
    span_BH = torch.empty((sequences, heads), device=device)
    waad_HT, fai_HT, lse_HT = (torch.empty((heads, tokens), device=device) for _ in range(3))
    given_HT = finite_HT = softmax = None
    if given_lse_HT is None:
        softmax = Softmax.empty(heads, tokens, device)
    else:
        given_HT, finite_HT = given_lse_HT.float().contiguous(), torch.empty_like(lse_HT)
    if entries := max(span_BH.numel(), waad_HT.numel()):
        launch(
            results_kernel,
            triton.cdiv(entries, ENTRIES),
            span=span_BH,
            waad=waad_HT,
            fai=fai_HT,
            lse=lse_HT,
            given_lse=given_HT,
            finite_lse=finite_HT,
            steep=None if softmax is None else softmax.steep,
            spans=span_BH.numel(),
            rows=waad_HT.numel(),
            ENTRIES=ENTRIES,
            num_warps=4,
        )
    return Results(span_BH, waad_HT, fai_HT, lse_HT, finite_HT, softmax)
