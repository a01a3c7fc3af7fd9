"""Statistics of chunked attention (Llama 4): each chunk of a sequence attends as if it were a sequence of its own.

Sequences are cut at their chunks for the kernels. A row's WAAD is then that of the whole sequence. Spans are averaged
over a sequence's chunks, and FAI's mean is over rows of later chunks too, whose attention is 0.

Shape suffixes: B sequences, C chunks of all sequences, N their tokens with the padding left out, H query heads, G key
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rhythm.ops.statistics import AttentionStatistics, attention_statistics
from rhythm.tap.padding import PaddedBatch, copied


@dataclass(frozen=True)
class _Cut:
    """The chunks of a batch, known on the host.

    Attributes:
        chunks: of each sequence, B numbers.
        lens, prompt_lens: tokens of each chunk, and how many of them are prompt.
    """

    chunks: list[int]
    lens: list[int]
    prompt_lens: list[int]

    @staticmethod
    def of(batch: PaddedBatch, chunk: int) -> _Cut:
        chunks, lens, prompt_lens = [], [], []
        for length, prompt in zip(batch.host.lens, batch.host.prompt_lens, strict=True):
            starts = range(0, length, chunk)
            chunks.append(len(starts))
            for start in starts:
                lens.append(min(chunk, length - start))
                prompt_lens.append(min(max(prompt - start, 0), lens[-1]))
        return _Cut(chunks, lens, prompt_lens)


def chunked_statistics(
    q_NHD: Tensor,
    k_NGD: Tensor,
    batch: PaddedBatch,
    chunk: int,
    *,
    horizon: tuple[int, int | None],
    **options: Any,
) -> AttentionStatistics:
    """The statistics of attention in chunks of `chunk` tokens, counted from each sequence's first token.

    Args:
        batch: on q's device; q and k are its tokens with the padding left out. Nothing here waits for the device.
        options: of `attention_statistics`, but for lengths and horizon.
    """
    cut, device = _Cut.of(batch, chunk), q_NHD.device
    bounds = copied(torch.tensor([0, *accumulate(cut.lens)], dtype=torch.int32), device)
    prompt_lens_C = copied(torch.tensor(cut.prompt_lens, dtype=torch.int64), device)
    got = attention_statistics(q_NHD, k_NGD, cu_seqlens=bounds, prompt_lens=prompt_lens_C, horizon=horizon, **options)
    assert got.span is not None

    rows_C1 = (bounds.diff() - prompt_lens_C)[:, None]
    sum_CH = torch.where(rows_C1 > 0, got.span * rows_C1, 0.0)
    chunks_B = copied(torch.tensor(cut.chunks, dtype=torch.int64), device)
    sum_BH = torch.segment_reduce(sum_CH, "sum", lengths=chunks_B, axis=0, unsafe=True)
    span_BH = sum_BH / (batch.lens - batch.prompt_lens)[:, None]

    whole_N, of_chunk_N = _rows_reached(batch, chunk, horizon)
    fai_HN = torch.where(of_chunk_N > 0, got.fai * of_chunk_N / whole_N, 0.0)
    return replace(got, span=span_BH, fai=fai_HN.masked_fill(whole_N == 0, torch.nan))


def _rows_reached(batch: PaddedBatch, chunk: int, horizon: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
    """int64 [N] each: response rows within the horizon of each token, and those among them in its own chunk."""
    lo, hi = horizon
    length_N, prompt_N = batch.lens[batch.sequence], batch.prompt_lens[batch.sequence]
    position_N = batch.packed(batch.positions)
    end_N = torch.minimum(position_N // chunk * chunk + chunk, length_N)

    def count(end_N: Tensor) -> Tensor:
        reach_N = end_N if hi is None else torch.minimum(end_N, position_N + min(hi, chunk + batch.host.longest) + 1)
        return (reach_N - torch.maximum(prompt_N, position_N + min(lo, batch.host.longest))).clamp(min=0)

    return count(length_N), count(end_N)
