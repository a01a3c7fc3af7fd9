"""Computes γ from the signals: a table of strategies, and what each reads.

A strategy is a function from `StrategyInputs` to the bonus of each token, and an entry in STRATEGIES; configuration,
trainer, RhythmCredit and TRL read everything about it from there.

Shape suffixes: B responses, T positions, k tokens before an anchor, where its introductory token is sought.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rhythm.credit.heads import as_fraction, ascending_rank
from rhythm.credit.random_like import positions_like, uniform_scores

if TYPE_CHECKING:
    from rhythm.credit.config import CreditConfig, Select

Reads = Literal["attention", "entropy"]


@dataclass(frozen=True)
class StrategyInputs:
    """What a strategy may read of a batch; tensors are fp32 [B, T], NaN outside the responses.

    Attributes:
        response: bool [B, T], true on response tokens.
        attention: (WAAD, FAI); empty where they were not measured, and then the strategy does not read them.
        entropy: nats; None likewise.
        generator: for random numbers; torch's default one if None.
        whole_batch: adds up a tensor over the processes that share the batch.
    """

    response: Tensor
    attention: tuple[Tensor, ...]
    entropy: Tensor | None
    generator: torch.Generator | None
    whole_batch: Callable[[Tensor], Tensor] = lambda x: x


@dataclass(frozen=True)
class Strategy:
    """One way to make γ.

    Attributes:
        bonus: → fp32 [B, T], γ − 1 of each token in units of γ_amp − 1.
        reads: what must have been measured for it; empty: nothing, so that no forward pass is needed.
        meaning: for the help; a phrase.
    """

    bonus: Callable[[StrategyInputs, CreditConfig], Tensor]
    reads: frozenset[Reads]
    meaning: str


def _none(inputs: StrategyInputs, config: CreditConfig) -> Tensor:
    # At the mass of the others: the same for every token, so that only its place is left to differ.
    return inputs.response.float() * (config.mass == "matched")


def _random(inputs: StrategyInputs, config: CreditConfig) -> Tensor:
    if config.random_like is None:
        return _top_q(uniform_scores(inputs.response, inputs.generator), config.top_fraction).float()
    chosen_BT = STRATEGIES[config.random_like].bonus(inputs, config) > 0
    return positions_like(chosen_BT, inputs.response, inputs.generator, inputs.whole_batch).float()


def _entropy(inputs: StrategyInputs, config: CreditConfig) -> Tensor:
    assert inputs.entropy is not None
    return _top_q(inputs.entropy, config.top_fraction, config.select).float()


def _local_chunk(inputs: StrategyInputs, config: CreditConfig) -> Tensor:
    waad_BT, _ = inputs.attention
    return _top_q(_delta(waad_BT), config.top_fraction, config.select).float()


def _global_anchor(inputs: StrategyInputs, config: CreditConfig) -> Tensor:
    _, fai_BT = inputs.attention
    return _top_q(fai_BT, config.top_fraction, config.select).float()


def _coupled(inputs: StrategyInputs, config: CreditConfig) -> Tensor:
    """Eqs. 17 and 18."""
    waad_BT, fai_BT = inputs.attention
    delta_BT = _delta(waad_BT)
    anchor_BT = _top_q(fai_BT, config.top_fraction, config.select)
    tau_waad_B1 = config.tau_waad.level(waad_BT)
    if config.tau_delta is not None:
        tau_delta_B1 = config.tau_delta.level(delta_BT)
    else:
        in_T_loc_BT = _top_q(delta_BT, config.top_fraction)
        tau_delta_B1 = delta_BT.masked_fill(~in_T_loc_BT, torch.inf).amin(dim=-1, keepdim=True)

    # Δ of t − 1, t − 2, …, t − k: latest first, because argmax takes the first of equals.
    k = min(config.neighborhood, max(delta_BT.shape[-1], 1))  # no token has more before it
    before_BTk = F.pad(delta_BT, (k, 0), value=torch.nan).unfold(-1, k, 1)[:, :-1].flip(-1)
    before_BTk = before_BTk.masked_fill(before_BTk.isnan(), -torch.inf)
    peak_BT, lag_BT = before_BTk.amax(dim=-1), before_BTk.argmax(dim=-1) + 1

    dominated_BT = anchor_BT & (waad_BT <= tau_waad_B1) & (peak_BT >= tau_delta_B1)
    position_T = torch.arange(waad_BT.shape[-1], device=waad_BT.device)
    intro_BT = (position_T - lag_BT).clamp(min=0)
    # A count only to be compared with 0: an introductory token of several anchors gets its bonus once.
    introduces_BT = torch.zeros_like(intro_BT).scatter_add_(-1, intro_BT, dominated_BT.long()) > 0
    return (
        (anchor_BT & ~dominated_BT).float()
        + (1 - config.alpha) * dominated_BT.float()
        + config.alpha * introduces_BT.float()
    )


def _delta(waad_BT: Tensor) -> Tensor:
    """Δ_t = |WAAD_t − WAAD_{t+1}| (eq. 13), [B, T]; NaN at the last token of the response and outside."""
    return F.pad(waad_BT.diff(dim=-1).abs(), (0, 1), value=torch.nan)


def _top_q(x_BT: Tensor, q: float, select: Select = "top") -> Tensor:
    """bool [B, T]: the ⌈q·n⌉ largest (or smallest) of each row's n defined entries, ties to the earlier."""
    share = as_fraction(q)
    defined_B1 = (~x_BT.isnan()).sum(dim=-1, keepdim=True)
    count_B1 = -(-share.numerator * defined_B1 // share.denominator)
    return ascending_rank(-x_BT if select == "top" else x_BT) < count_B1


_NOTHING: frozenset[Reads] = frozenset()
_ATTENTION: frozenset[Reads] = frozenset({"attention"})
_ENTROPY: frozenset[Reads] = frozenset({"entropy"})

STRATEGIES = {
    "none": Strategy(_none, _NOTHING, "γ alike for all tokens (1 unless mass is matched), a control"),
    "random": Strategy(_random, _NOTHING, "tokens drawn at random, a control"),
    "entropy": Strategy(_entropy, _ENTROPY, "tokens of the highest entropy, a control"),
    "local_chunk": Strategy(_local_chunk, _ATTENTION, "where WAAD jumps, at the boundaries of phrases (eq. 14)"),
    "global_anchor": Strategy(_global_anchor, _ATTENTION, "what later tokens attend to most (eq. 16)"),
    "coupled": Strategy(
        _coupled,
        _ATTENTION,
        "anchors, sharing with the token that introduces them where it dominates them (eq. 18)",
    ),
}
"""By name, as in the configuration's credit.strategy."""
