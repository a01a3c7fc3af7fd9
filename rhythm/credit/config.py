"""The options of γ, spelled once for Python, YAML, TRL, the analysis and Megatron.

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from rhythm.credit.heads import as_fraction
from rhythm.credit.strategies import STRATEGIES, Reads
from rhythm.system.extras import needs
from rhythm.system.renamed import renamed_keys

with needs("rhythm.credit"):
    from pydantic import BaseModel, Field, field_validator, model_validator

Select = Literal["top", "bottom"]
ApplyTo = Literal["nonnegative", "all"]
Mass = Literal["as_is", "matched"]


class QuantileThreshold(BaseModel, extra="forbid", frozen=True):
    """A threshold relative to the response: a quantile of its defined values, linear between neighbors."""

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
    """How γ is computed from the signals, and which advantages it multiplies."""

    strategy: str = Field(
        default="coupled",
        description="tokens to amplify; "
        + "; ".join(f"{name}: {strategy.meaning}" for name, strategy in STRATEGIES.items()),
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
        description="bottom selects the tokens of lowest Δ, FAI or entropy instead (ablation); dominance is decided "
        "as usual, and random is unaffected",
    )
    apply_to: ApplyTo = Field(
        default="nonnegative", description="advantages that γ multiplies: the nonnegative ones, or all"
    )

    mass: Mass = Field(
        default="as_is",
        description="matched scales γ − 1 by one factor per batch, so that its mean over the batch's response tokens "
        "is (gamma_amp − 1)·top_fraction, for none too: then strategies differ only in where the credit goes",
    )
    mean_preserving: bool = Field(
        default=False, description="divide γ by its mean over each response: credit is moved, none is added"
    )
    random_like: str | None = Field(
        default=None,
        description="random: draw as many tokens as this strategy selects in the same response, from its own "
        "distribution over relative positions; tells attention from position",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: object) -> object:
        if said := renamed_keys(values, {"q": "top_fraction"}):
            raise ValueError(said)
        return values

    @property
    def reads(self) -> frozenset[Reads]:
        """What the strategy reads; empty for one that needs no forward pass."""
        like = frozenset() if self.random_like is None else STRATEGIES[self.random_like].reads
        return STRATEGIES[self.strategy].reads | like

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"must be one of {', '.join(STRATEGIES)}, got {value!r}")
        return value

    @field_validator("random_like")
    @classmethod
    def _selects(cls, value: str | None) -> str | None:
        selecting = [name for name in STRATEGIES if name not in ("none", "random")]
        if value is not None and value not in selecting:
            raise ValueError(f"must be one of {', '.join(selecting)}, or null, got {value!r}")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.random_like is not None and self.strategy != "random":
            raise ValueError(f"random_like is {self.random_like!r}, which needs strategy random, not {self.strategy!r}")
        if self.mass == "matched" and self.mean_preserving:
            raise ValueError("mass is matched, and mean_preserving true: each undoes the other; must be one of them")
        return self
