"""From signals to γ, the factor on each token's advantage (eqs. 13 to 18).

All is computed for a batch of responses at once; outside a response it is NaN, and NaN is never selected.

Shape suffixes: B responses, T positions, k tokens before an anchor, where its introductory token is sought.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rhythm.credit.heads import as_fraction, ascending_rank
from rhythm.credit.signals import RhythmSignals
from rhythm.shapes import check_dense, check_shape, integer
from rhythm.system.extras import needs
from rhythm.system.renamed import renamed_keys

with needs("rhythm.credit"):
    from pydantic import BaseModel, Field, model_validator

Strategy = Literal["none", "random", "entropy", "local_chunk", "global_anchor", "coupled"]
Select = Literal["top", "bottom"]
ApplyTo = Literal["nonnegative", "all"]


class QuantileThreshold(BaseModel, extra="forbid", frozen=True):
    """A threshold relative to the response: a quantile of its defined values, linear between neighbours."""

    quantile: float = Field(ge=0, le=1, description="quantile of the response's values; 0.5: median")

    def level(self, x_BT: Tensor) -> Tensor:
        """[B, 1], NaN for a row without defined entries. NaN marks undefined entries of x_BT; T ≥ 1."""
        share = as_fraction(self.quantile)
        defined_B1 = (~x_BT.isnan()).sum(dim=-1, keepdim=True)
        # Whole numbers, so that a quantile that falls on an entry is exactly that entry.
        place_B1 = share.numerator * (defined_B1 - 1).clamp(min=0)
        below_B1, rest_B1 = place_B1 // share.denominator, place_B1 % share.denominator
        sorted_BT = x_BT.sort(dim=-1).values
        low_B1, high_B1 = sorted_BT.gather(-1, below_B1), sorted_BT.gather(-1, below_B1 + (rest_B1 > 0))
        return torch.lerp(low_B1, high_B1, (rest_B1 / share.denominator).to(x_BT.dtype))


class ValueThreshold(BaseModel, extra="forbid", frozen=True):
    """A threshold fixed for all responses."""

    value: float = Field(allow_inf_nan=False, description="level in tokens")

    def level(self, x_BT: Tensor) -> Tensor:
        """[B, 1]."""
        return torch.full_like(x_BT[:, :1], self.value)


Threshold = QuantileThreshold | ValueThreshold
MEDIAN = QuantileThreshold(quantile=0.5)


class CreditConfig(BaseModel, extra="forbid", frozen=True):
    """How γ is made of the signals, and which advantages it multiplies."""

    strategy: Strategy = Field(
        default="coupled",
        description="tokens to amplify; none, random, entropy: controls; local_chunk: where WAAD jumps, at "
        "the boundaries of phrases (eq. 14); global_anchor: what later tokens attend to most (eq. 16); "
        "coupled: anchors, sharing with the token that introduces them where it dominates them (eq. 18)",
    )
    top_fraction: float = Field(
        default=0.4, gt=0, le=1, description="share of a response's tokens to select; rounded up"
    )
    gamma_amp: float = Field(
        default=1.5, ge=1, allow_inf_nan=False, description="γ of a selected token; all others keep 1"
    )
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="coupled: share of a dominated anchor's bonus that goes to its introductory token",
    )
    neighborhood: int = Field(
        default=3,
        ge=1,
        description="coupled: an anchor's introductory token is among this many tokens before it",
    )
    tau_waad: Threshold = Field(
        default=MEDIAN,
        description="coupled: highest WAAD of a dominated anchor; {quantile: x} of the response's WAAD, or "
        "{value: tokens}",
    )
    tau_delta: Threshold | None = Field(
        default=None,
        description="coupled: least Δ that the introductory token of a dominated anchor has; {quantile: x} "
        "of the response's Δ, {value: tokens}, or null: the smallest among those of top_fraction",
    )
    select: Select = Field(
        default="top",
        description="bottom selects the tokens of lowest Δ, FAI or entropy instead, for ablations; which "
        "anchors count as dominated, and by which token, is judged as ever, and random stays random",
    )
    apply_to: ApplyTo = Field(
        default="nonnegative", description="advantages that γ multiplies: the nonnegative ones, or all"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: object) -> object:
        if said := renamed_keys(values, {"q": "top_fraction"}):
            raise ValueError(said)
        return values


def credit_weights(
    waad: Tensor,
    fai: Tensor,
    *,
    strategy: Strategy,
    entropy: Tensor | None = None,
    q: float = 0.4,
    gamma_amp: float = 1.5,
    alpha: float = 0.5,
    neighborhood: int = 3,
    tau_waad: Threshold | Mapping[str, float] = MEDIAN,
    tau_delta: Threshold | Mapping[str, float] | None = None,
    select: Select = "top",
    generator: torch.Generator | None = None,
) -> Tensor:
    """γ of one response.

    Args:
        waad, fai: [n] signals of the response's tokens; NaN where undefined.
        q: CreditConfig's top_fraction.
        strategy … select: see CreditConfig.
        entropy: [n] nats; needed by the strategy "entropy".
        generator: for the strategy "random"; torch's default one if None.

    Returns:
        γ [n], fp32, detached.

    Raises:
        ValueError: a shape that is not [n]; an option outside its range; entropy missing.
    """
    if not isinstance(q, int | float) or not 0 < q <= 1:
        raise ValueError(f"q is {q!r}; it must be above 0 and at most 1")
    config = CreditConfig.model_validate(
        {
            "strategy": strategy,
            "top_fraction": q,
            "gamma_amp": gamma_amp,
            "alpha": alpha,
            "neighborhood": integer("neighborhood", neighborhood, 1),
            "tau_waad": tau_waad,
            "tau_delta": tau_delta,
            "select": select,
        }
    )
    for name, x in (("waad", waad), ("fai", fai), ("entropy", waad if entropy is None else entropy)):
        check_dense(name, x)
    shape = check_shape("waad", waad, (None,))
    check_shape("fai", fai, shape)
    if entropy is not None:
        check_shape("entropy", entropy, shape)
        entropy = entropy[None]
    mask_1n = torch.ones((1, *shape), dtype=torch.bool, device=waad.device)
    return _gamma(waad[None], fai[None], entropy, mask_1n, config, generator)[0]


def batch_credit_weights(
    signals: RhythmSignals,
    response_mask_BT: Tensor,
    config: CreditConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """γ of a batch of responses, each exactly as `credit_weights` gives it alone.

    Neither padding nor the other rows matter. The strategy "random" draws one number per response token in
    reading order, so on one generator a batch draws what its rows, one after the other, would draw.

    Args:
        signals: [B, T] each; what they hold outside the responses is ignored.
        response_mask_BT: [B, T], true on response tokens: one contiguous run a row, anywhere in it; an empty
            one is fine.
        config: strategy and options.
        generator: for the strategy "random"; torch's default one if None.

    Returns:
        γ [B, T], fp32, detached; 1 outside the responses.

    Raises:
        ValueError: a shape that is not [B, T]; the strategy "entropy" without signals.entropy.
    """
    shape = check_shape("response_mask", response_mask_BT, (None, None))
    check_shape("signals.waad", signals.waad, shape)
    check_shape("signals.fai", signals.fai, shape)
    if signals.entropy is not None:
        check_shape("signals.entropy", signals.entropy, shape)
    return _gamma(signals.waad, signals.fai, signals.entropy, response_mask_BT.bool(), config, generator)


@torch.no_grad()
def _gamma(
    waad_BT: Tensor,
    fai_BT: Tensor,
    entropy_BT: Tensor | None,
    response_BT: Tensor,
    config: CreditConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """γ [B, T]; the arguments are those of batch_credit_weights, taken apart."""
    if config.strategy == "none" or response_BT.numel() == 0:
        return torch.ones(response_BT.shape, dtype=torch.float32, device=response_BT.device)
    waad_BT, fai_BT = _inside(waad_BT, response_BT), _inside(fai_BT, response_BT)
    if config.strategy == "coupled":
        bonus_BT = _coupled_bonus(waad_BT, fai_BT, config)
    elif config.strategy == "local_chunk":
        bonus_BT = _top_q(_delta(waad_BT), config.top_fraction, config.select).float()
    elif config.strategy == "global_anchor":
        bonus_BT = _top_q(fai_BT, config.top_fraction, config.select).float()
    elif config.strategy == "random":
        bonus_BT = _top_q(_random_scores(response_BT, generator), config.top_fraction).float()
    elif entropy_BT is None:
        raise ValueError('entropy is None; the strategy "entropy" needs it')
    else:
        bonus_BT = _top_q(_inside(entropy_BT, response_BT), config.top_fraction, config.select).float()
    return 1 + (config.gamma_amp - 1) * bonus_BT


def _coupled_bonus(waad_BT: Tensor, fai_BT: Tensor, config: CreditConfig) -> Tensor:
    """[B, T] bonus in units of γ_amp − 1 (eqs. 17 and 18); WAAD and FAI are NaN outside the responses."""
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


def _random_scores(response_BT: Tensor, generator: torch.Generator | None) -> Tensor:
    """[B, T] uniform, drawn in reading order on the generator's own device; NaN outside the responses."""
    device = response_BT.device if generator is None else generator.device
    draws = torch.rand(int(response_BT.sum()), generator=generator, device=device)
    scores_BT = torch.full(response_BT.shape, torch.nan, device=response_BT.device)
    return scores_BT.masked_scatter_(response_BT, draws.to(response_BT.device))


def _inside(x_BT: Tensor, response_BT: Tensor) -> Tensor:
    """fp32, NaN outside the responses."""
    return x_BT.float().masked_fill(~response_BT, torch.nan)
