"""Ways to draw the next token of each row from the model's logits.

Shape suffixes: b rows that go on, B all rows, V vocabulary, G generated positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rhythm.engines.interfaces import SamplingConfig


class Draw(Protocol):
    """Draws tokens."""

    def __call__(self, logits_bV: Tensor, row_b: Tensor, position: int) -> Tensor:
        """int64 [b], the tokens at generated position 0, 1, … of the rows `row_b`; logits are fp32."""


def draw_for(sampling: SamplingConfig, rows: int, device: torch.device, seeds: Sequence[int] | None) -> Draw:
    """How `sampling` draws for so many rows; `seeds`: of each row, in place of torch's global generator."""
    if sampling.temperature == 0:
        return Likeliest()
    return FromOneStream(sampling, rows) if seeds is None else FromOwnStreams(sampling, seeds, device)


class Likeliest:
    """The most likely token."""

    def __call__(self, logits_bV: Tensor, row_b: Tensor, position: int) -> Tensor:
        """See Draw."""
        return logits_bV.argmax(dim=-1)


class FromOneStream:
    """Draws by torch's global generator.

    At each position it gives random numbers to all rows, also to those that have ended: a row's tokens don't depend on
    when others end, and they are those of torch.multinomial, which draws like this: argmax p / E with E ~ Exp(1).
    """

    def __init__(self, sampling: SamplingConfig, rows: int) -> None:
        self._rows = rows
        self._warpers = _warpers(sampling)

    def __call__(self, logits_bV: Tensor, row_b: Tensor, position: int) -> Tensor:
        """See Draw."""
        exponential_BV = logits_bV.new_empty(self._rows, logits_bV.shape[-1]).exponential_()
        p_bV = torch.softmax(self._warpers(None, logits_bV), dim=-1)
        return p_bV.div_(exponential_BV if len(row_b) == self._rows else exponential_BV[row_b]).argmax(dim=-1)


class FromOwnStreams:
    """Draws by a generator of each row's own.

    The token is the first whose cumulative probability, after temperature, top-k and top-p, exceeds a uniform number:
    one number per row and position, so a row's tokens do not depend on the rows beside it.
    """

    def __init__(self, sampling: SamplingConfig, seeds: Sequence[int], device: torch.device) -> None:
        self._warpers = _warpers(sampling)
        rows = [
            torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self._uniform_GB = torch.stack(rows, dim=1).to(device)

    def __call__(self, logits_bV: Tensor, row_b: Tensor, position: int) -> Tensor:
        """See Draw."""
        cumulative_bV = torch.softmax(self._warpers(None, logits_bV), dim=-1).double().cumsum(dim=-1)
        # A share of the sum that was reached, which rounding keeps from being 1.
        level_b1 = self._uniform_GB[position, row_b, None] * cumulative_bV[:, -1:]
        return torch.searchsorted(cumulative_bV, level_b1, right=True)[:, 0].clamp(max=logits_bV.shape[-1] - 1)


def _warpers(sampling: SamplingConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
