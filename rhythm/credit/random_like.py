"""Draws random positions, as many and as far into the response as another strategy's, to tell what is left of its
advantage over `random` once position alone is accounted for.

Shape suffixes: B responses, T positions, K bins of relative positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BINS = 20
"""Of relative positions: a twentieth of a response each."""


def positions_like(
    chosen_BT: Tensor,
    response_BT: Tensor,
    generator: torch.Generator | None = None,
    whole_batch: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """In each response as many random positions as `chosen_BT` has there, more often where it chooses more often.

    The token at place t of n lies at (t + ½)/n of its response, in one of 20 bins. A bin's rate is the share of its
    tokens, in all responses, that `chosen_BT` chooses. Within a response, tokens are included with probabilities
    proportional to these rates, at most 1, that add up to the number of positions (systematic sampling in random order:
    exactly that number, with exactly these probabilities). With few responses the rates are those of the responses
    themselves, and the draw comes close to `chosen_BT`.

    Args:
        chosen_BT: bool [B, T], inside the responses.
        response_BT: bool [B, T], true on response tokens; one contiguous run a row.
        generator: torch's default one if None; draws a number per response token in reading order, then one per row.
        whole_batch: adds up a tensor over the processes that share the batch.

    Returns:
        bool [B, T].
    """
    place_BT = response_BT.cumsum(dim=-1) - 1
    length_B1 = response_BT.sum(dim=-1, keepdim=True).clamp(min=1)
    bin_BT = ((2 * place_BT + 1) * BINS // (2 * length_B1)).clamp(0, BINS - 1)
    counts_2K = torch.stack([torch.bincount(bin_BT[where], minlength=BINS) for where in (chosen_BT, response_BT)])
    chosen_K, tokens_K = whole_batch(counts_2K.double())
    rate_BT = torch.where(response_BT, (chosen_K / tokens_K.clamp(min=1))[bin_BT], 0.0)
    wanted_B1 = chosen_BT.sum(dim=-1, keepdim=True)
    return _systematic(_scaled_to(rate_BT, wanted_B1), wanted_B1, response_BT, generator)


def _scaled_to(rate_BT: Tensor, total_B1: Tensor) -> Tensor:
    """min(1, λ·rate) with the λ of each row that makes it add up to `total_B1`, at most the number of rates above 0."""
    sorted_BT = rate_BT.sort(dim=-1, descending=True).values
    rest_BT = sorted_BT.flip(-1).cumsum(dim=-1).flip(-1)
    # λ if the j largest are 1. The right j is the first at which the next one is not above 1.
    at_one_T = torch.arange(rate_BT.shape[-1], device=rate_BT.device)
    scale_BT = (total_B1 - at_one_T) / rest_BT
    fits_BT = (scale_BT * sorted_BT <= 1 + 1e-9) & (rest_BT > 0)
    scale_B1 = scale_BT.gather(-1, fits_BT.long().argmax(dim=-1, keepdim=True))
    return torch.where(total_B1 > 0, (scale_B1 * rate_BT).clamp(max=1.0), 0.0)


def _systematic(
    inclusion_BT: Tensor, total_B1: Tensor, response_BT: Tensor, generator: torch.Generator | None
) -> Tensor:
    """bool [B, T]: tokens in random order on a line, each as long as its probability; one is chosen at every whole
    number past a random start.
    """
    order_BT = uniform_scores(response_BT, generator).argsort(dim=-1)
    line_BT = inclusion_BT.gather(-1, order_BT).cumsum(dim=-1)
    line_BT = torch.where(line_BT > total_B1 - 1e-6, total_B1.double(), line_BT)  # rounding must not cost a position
    start_B1 = _draws(len(response_BT), generator, response_BT.device)[:, None].double()
    ends_BT = (line_BT + start_B1).floor()
    hit_BT = ends_BT > torch.cat([torch.zeros_like(start_B1), ends_BT[:, :-1]], dim=-1)
    return torch.zeros_like(response_BT).scatter(-1, order_BT, hit_BT)


def uniform_scores(response_BT: Tensor, generator: torch.Generator | None) -> Tensor:
    """[B, T] uniform, drawn in reading order on the generator's own device; NaN outside the responses."""
    draws = _draws(int(response_BT.sum()), generator, response_BT.device)
    scores_BT = torch.full(response_BT.shape, torch.nan, device=response_BT.device)
    return scores_BT.masked_scatter_(response_BT, draws)


def _draws(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.rand(count, generator=generator, device=device if generator is None else generator.device).to(device)
