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

from rhythm.ops.statistics import AttentionStatistics, attention_statistics, attention_with_statistics
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

    @property
    def rows(self) -> list[int]:
        """Response rows of each chunk."""
        return [length - prompt for length, prompt in zip(self.lens, self.prompt_lens, strict=True)]

    def lengths(self, device: torch.device) -> dict[str, Any]:
        """cu_seqlens and prompt_lens of the chunks, for the ops."""
        return {
            "cu_seqlens": copied(torch.tensor([0, *accumulate(self.lens)], dtype=torch.int32), device),
            "prompt_lens": copied(torch.tensor(self.prompt_lens, dtype=torch.int64), device),
        }

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
    chunk: int | None,
    *,
    horizon: tuple[int, int | None],
    **options: Any,
) -> AttentionStatistics:
    """The statistics of attention in chunks of `chunk` tokens, counted from each sequence's first token; None: whole.

    Args:
        batch: on q's device; q and k are its tokens with the padding left out. Nothing here waits for the device.
        options: of `attention_statistics`, but for lengths and horizon.
    """
    if chunk is None:
        return attention_statistics(q_NHD, k_NGD, **_lengths(batch), horizon=horizon, **options)
    cut = _Cut.of(batch, chunk)
    got = attention_statistics(q_NHD, k_NGD, **cut.lengths(q_NHD.device), horizon=horizon, **options)
    return _of_sequences(got, cut, batch, chunk, horizon)


def chunked_with_statistics(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    batch: PaddedBatch,
    chunk: int | None,
    *,
    horizon: tuple[int, int | None],
    **options: Any,
) -> tuple[Tensor, AttentionStatistics]:
    """(output [N, H, D], statistics) of the same attention; arguments as of `chunked_statistics`."""
    if chunk is None:
        return attention_with_statistics(q_NHD, k_NGD, v_NGD, **_lengths(batch), horizon=horizon, **options)
    cut = _Cut.of(batch, chunk)
    out_NHD, got = attention_with_statistics(
        q_NHD, k_NGD, v_NGD, **cut.lengths(q_NHD.device), horizon=horizon, **options
    )
    return out_NHD, _of_sequences(got, cut, batch, chunk, horizon)


def _lengths(batch: PaddedBatch) -> dict[str, Any]:
    return {"cu_seqlens": batch.cu_seqlens, "prompt_lens": batch.prompt_lens}


def _of_sequences(
    got: AttentionStatistics, cut: _Cut, batch: PaddedBatch, chunk: int, horizon: tuple[int, int | None]
) -> AttentionStatistics:
    """The statistics of whole sequences, made of those of their chunks."""
    span_BH = got.span
    if span_BH is not None:
        rows_C1 = copied(torch.tensor(cut.rows, dtype=torch.int64), span_BH.device)[:, None]
        sum_CH = torch.where(rows_C1 > 0, span_BH * rows_C1, 0.0)
        chunks_B = copied(torch.tensor(cut.chunks, dtype=torch.int64), span_BH.device)
        sum_BH = torch.segment_reduce(sum_CH, "sum", lengths=chunks_B, axis=0, unsafe=True)
        span_BH = sum_BH / (batch.lens - batch.prompt_lens)[:, None]

    whole_N, of_chunk_N = _rows_reached(batch, chunk, horizon)
    fai_HN = torch.where(of_chunk_N > 0, got.fai * of_chunk_N / whole_N, 0.0)
    first_HN = got.first_mass
    if first_HN is not None:  # that of a sequence's first tokens, which its later chunks don't see
        first_HN = torch.where(batch.packed(batch.positions) < chunk, first_HN, first_HN * 0)
    return replace(got, span=span_BH, fai=fai_HN.masked_fill(whole_N == 0, torch.nan), first_mass=first_HN)


def _rows_reached(batch: PaddedBatch, chunk: int, horizon: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
    """int64 [N] each: response rows within the horizon of each token, and those among them in its own chunk."""
    length_N, prompt_N = batch.lens[batch.sequence], batch.prompt_lens[batch.sequence]
    position_N, longest = batch.packed(batch.positions), batch.host.longest
    end_N = torch.minimum(position_N // chunk * chunk + chunk, length_N)
    whole_N, of_chunk_N = (rows_in_reach(position_N, prompt_N, end, horizon, longest) for end in (length_N, end_N))
    return whole_N, of_chunk_N


def rows_in_reach(
    position_N: Tensor, first_N: Tensor, end_N: Tensor, horizon: tuple[int, int | None], longest: int
) -> Tensor:
    """int64 [N]: how many of the rows first … end − 1 are within the horizon of the token at `position`.

    Args:
        position_N, first_N, end_N: int64 [N], places in a sequence of at most `longest` tokens.
    """
    lo, hi = horizon
    reach_N = end_N if hi is None else torch.minimum(end_N, position_N + min(hi, longest) + 1)
    return (reach_N - torch.maximum(first_N, position_N + min(lo, longest))).clamp(min=0)
