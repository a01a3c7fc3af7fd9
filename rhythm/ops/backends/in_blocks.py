"""Answers on request (`also=`) and column sums in plain torch, by blocks of rows, for backends without their own.

Memory is O(Hq · N) for the longest sequence of N tokens. Sequence lengths are read on the host, and q·k is computed a
second time, in fp32 (fp64 for fp64 q).

Shape suffixes: T tokens of all sequences, S those that have a query, N tokens of one sequence, R rows of a block, C
keys that are needed, H query heads, G key heads, D head size, A answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.reference import column_sums, masked_scores, row_answers, row_lse, visible_keys

SCORES_AT_ONCE = 1 << 24
"""A limit on memory: 64 MB of fp32 scores, and a few times that for intermediate results."""


@dataclass(frozen=True)
class Columns:
    """How the weights of the rows that reach a key are combined.

    Attributes:
        reduce: "sum" or "max".
        row_weights_HT: [H or 1, T] fp32 or fp64, factors of the rows. None: all are 1.
    """

    reduce: str
    row_weights_HT: Tensor | None = None


@dataclass(frozen=True)
class _Block:
    """Rows of one sequence, and their scores against its keys 0 … C − 1.

    Attributes:
        start, prompt: where the sequence begins on the token axis, and its tokens before the response.
        row_R: int64, positions in the sequence.
        score_HRC: masked scores.
        lse_HR: the given one of these rows; None: none is.
    """

    start: int
    prompt: int
    row_R: Tensor
    score_HRC: Tensor
    lse_HR: Tensor | None

    @property
    def places(self) -> slice:
        """Where the rows lie on the token axis."""
        first = self.start + int(self.row_R[0])
        return slice(first, first + len(self.row_R))


def answers(request: Request) -> Tensor:
    """[A, H, T], what `request.also` names, of response rows; NaN on others, but for max_logit where it is wanted."""
    answers_AHT = _undefined(request, len(request.also), request.q.shape[-2], request.sequences.tokens)
    for block in _blocks(request, _needed_keys(request)):
        answers_AHT[:, :, block.places] = row_answers(
            block.score_HRC,
            block.lse_HR,
            request.also,
            prompt_len=block.prompt,
            first=request.first,
            sinks_H=request.sinks_H,
        )
    if request.prompt_rows:
        at = request.also.index("max_logit")
        for block in _blocks(request, None, of_prompts=True):
            answers_AHT[at, :, block.places] = row_answers(
                block.score_HRC, None, ("max_logit",), prompt_len=0, first=0, sinks_H=request.sinks_H
            )[0]
    return answers_AHT


def columns(request: Request, wanted: Columns) -> Tensor:
    """[H, T]: `column_sums` of response rows that see a key at a distance within the horizon."""
    lo, hi = request.horizon
    heads, weights_HT = request.q.shape[-2], wanted.row_weights_HT
    start = 0.0 if wanted.reduce == "sum" else -torch.inf
    sums_HT = torch.full_like(_undefined(request, heads, request.sequences.tokens), start)
    for block in _blocks(request, None):
        lse_HR = row_lse(block.score_HRC, request.sinks_H) if block.lse_HR is None else block.lse_HR
        lse_HR = lse_HR.to(block.score_HRC.dtype)
        lse_HR = lse_HR.masked_fill(~lse_HR.isfinite(), torch.nan)
        weights_HRC = torch.exp(block.score_HRC - lse_HR[..., None])
        position_C = torch.arange(weights_HRC.shape[-1], device=request.q.device)
        distance_RC = block.row_R[:, None] - position_C
        reached_RC = visible_keys(block.row_R, position_C, request.sliding_window) & (distance_RC >= lo)
        if hi is not None:
            reached_RC &= distance_RC <= hi
        row_weights_HR = None if weights_HT is None else weights_HT[:, block.places]
        of_block_HC = column_sums(weights_HRC, row_weights_HR, reached_RC, wanted.reduce)
        seen_HC = sums_HT[:, block.start : block.start + of_block_HC.shape[1]]
        seen_HC[:] = seen_HC + of_block_HC if wanted.reduce == "sum" else torch.maximum(seen_HC, of_block_HC)
    return sums_HT


def _needed_keys(request: Request) -> int | None:
    """How many of a sequence's first keys the answers need; None: all."""
    if request.also_sweeps:
        return None
    prompts = request.sequences.host.prompt_lens if "prompt_mass" in request.also else []
    return max([request.first if "first_mass" in request.also else 0, *prompts])


def _undefined(request: Request, *shape: int) -> Tensor:
    dtype = torch.float64 if request.q.dtype == torch.float64 else torch.float32
    return request.q.new_full(shape, torch.nan, dtype=dtype)


def _blocks(request: Request, keys: int | None, *, of_prompts: bool = False) -> Iterator[_Block]:
    """Blocks of the response rows (or of the prompts' rows that q has), against the first `keys` keys, or all seen."""
    q_SHD, k_TGD, host = request.q.flatten(0, -3), request.k.flatten(0, -3), request.sequences.host
    dtype = torch.float64 if q_SHD.dtype == torch.float64 else torch.float32
    group = q_SHD.shape[1] // k_TGD.shape[1]
    of_sequences = zip(pairwise(host.cu_seqlens), host.cu_rows[1:], host.prompt_lens, host.missing, strict=True)
    for (start, end), row_end, prompt, missing in of_sequences:
        begin, stop = (missing, prompt) if of_prompts else (prompt, end - start)
        size = max(1, SCORES_AT_ONCE // max(1, q_SHD.shape[1] * (end - start)))
        for first in range(begin, stop, size):
            last = min(first + size, stop)
            row_R = torch.arange(first, last, device=q_SHD.device)
            key_C = torch.arange(last if keys is None else min(last, keys), device=q_SHD.device)
            q_HRD = q_SHD[row_end - (end - start) + row_R].to(dtype).transpose(0, 1)
            k_HCD = k_TGD[start : start + len(key_C)].to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
            visible_RC = visible_keys(row_R, key_C, request.sliding_window)
            score_HRC = masked_scores(q_HRD, k_HCD, visible_RC, request.scale, request.softcap)
            lse = request.lse_HT
            yield _Block(start, prompt, row_R, score_HRC, None if lse is None else lse[:, start + first : start + last])
