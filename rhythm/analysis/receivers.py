"""Chooses receiver heads (Bogdan et al., arXiv 2506.19143): heads that attend mostly to a few tokens or sentences.

Shape suffixes: N positions of prompt and response, M response tokens, S sentences, H heads of a layer, n of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rhythm.analysis.attention import ObservedAttention
from rhythm.credit.heads import as_fraction, ascending_rank

LEAST_VALUES = 4  # the kurtosis of fewer is meaningless: that of two is always −2


def excess_kurtosis(x_HM: Tensor) -> Tensor:
    """m₄ / m₂² − 3 of each row's defined entries, fp64 [H]; NaN for fewer than four entries or equal ones."""
    x_HM = x_HM.double()
    defined_HM = ~x_HM.isnan()
    central_HM = torch.where(defined_HM, x_HM - x_HM.nanmean(dim=1, keepdim=True), 0.0)
    count_H = defined_HM.sum(dim=1)
    second_H, fourth_H = ((central_HM**power).sum(dim=1) / count_H for power in (2, 4))
    # Equal entries have a small variance from rounding.
    spread_H = second_H > (1e-12 * x_HM.abs().nan_to_num().amax(dim=1)) ** 2 if x_HM.shape[1] else second_H > 0
    return torch.where((count_H >= LEAST_VALUES) & spread_H, fourth_H / second_H**2 - 3, torch.nan)


def received_between_sentences(attention: ObservedAttention, sentence_M: Tensor, gap: int) -> Tensor:
    """Mean attention that each sentence receives from sentences at least `gap` later, fp32 [H, S].

    Weights are averaged over the tokens of both sentences, then over the attending sentences, each with the same
    weight. NaN if no sentence is that far after.

    Args:
        sentence_M: int64, sentence index of each response token, from 0, ascending.
    """
    count_S = torch.bincount(sentence_M).float()
    sentences, heads = len(count_S), attention.query.shape[1]
    of_columns_NS = torch.nn.functional.one_hot(sentence_M, sentences) / count_S
    received_HS = torch.zeros(heads, sentences, device=sentence_M.device)
    index_S = torch.arange(sentences, device=sentence_M.device)
    for row_R, weights_HRC in attention.row_tiles():
        column_of_response = weights_HRC[:, :, attention.prompt_len :]
        mean_HRS = column_of_response @ of_columns_NS[: column_of_response.shape[2]]
        reader_R = sentence_M[row_R - attention.prompt_len]
        far_RS = (reader_R[:, None] - index_S) >= gap
        received_HS += torch.where(far_RS, mean_HRS / count_S[reader_R, None], 0.0).sum(dim=1)
    readers_S = (sentences - gap - index_S).clamp(min=0)
    return (received_HS / readers_S).masked_fill(readers_S == 0, torch.nan)


def choose_receivers(kurtosis_n: Tensor, count: int) -> Tensor:
    """The `count` heads of largest kurtosis, bool [n]; ties go to the earlier head, and NaN is never chosen."""
    return (ascending_rank(-kurtosis_n) < count) & ~kurtosis_n.isnan()


def receiver_count(share: float | None, pool: int, global_: int) -> int:
    """The number of receiver heads: that of global heads, or a share of the pool: max(1, ⌊share·n + ½⌋)."""
    if share is None:
        return global_
    fraction = as_fraction(share)
    return max(1, (2 * fraction.numerator * pool + fraction.denominator) // (2 * fraction.denominator))
