"""The options of the signals and of γ, spelled once for Python, YAML, TRL, the analysis and Megatron.

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from rhythm.credit.heads import as_fraction, sampled_layers
from rhythm.credit.strategies import STRATEGIES, Reads
from rhythm.system.extras import needs
from rhythm.system.renamed import renamed_keys

with needs("rhythm.credit.config"):
    from pydantic import BaseModel, Field, field_validator, model_validator

Select = Literal["top", "bottom"]
ApplyTo = Literal["nonnegative", "all"]

HORIZONS: dict[str, tuple[int, int | None]] = {"paper": (10, 50), "revised": (10, 100)}
"""Horizons of FAI by name: the paper's, and its revised version's."""

MAX_TOKENS = 2**31 - 1
"""Of a window or a horizon: longer than any sequence."""


class SignalsConfig(BaseModel, extra="forbid", frozen=True):
    """How attention statistics become WAAD and FAI."""

    layers: int | tuple[int, ...] | Literal["all"] | None = Field(
        default=None,
        description="layers whose query heads form the pool: how many to sample from the middle third (null: 5), their "
        "indices in rising order, or all",
    )
    window: int = Field(default=10, ge=1, le=MAX_TOKENS, description="W of WAAD (eq. 9), in tokens")
    horizon: tuple[int, int | None] = Field(
        default=(10, 50),
        description="[low, high] of FAI (eq. 10) in tokens, high null: to the end; or paper, or revised",
    )
    quantile: float = Field(
        default=0.3, gt=0, le=0.5, description="share of the pool that is local, and that is global"
    )
    grouping: Literal["sequence", "batch", "calibrated"] = Field(
        default="sequence",
        description="who shares head groups: none, a batch, or all batches (fixed on the first)",
    )
    backend: Literal["auto", "cpu", "triton", "reference"] = Field(
        default="auto", description="backend of the statistics; auto takes the fastest there is"
    )

    def layers_of(self, depth: int, readable: Sequence[int] | None = None) -> list[int]:
        """The layers to read of a model with `depth` layers, rising. "all" means those of `readable`, None: every one.

        Raises:
            ValueError: an index that the model doesn't have.
        """
        if self.layers == "all":
            return list(range(depth) if readable is None else readable)
        if self.layers is None:
            return sampled_layers(depth)
        if isinstance(self.layers, int):
            return sampled_layers(depth, self.layers)
        if self.layers[-1] >= depth:
            raise ValueError(f"layers is {list(self.layers)}; the model has layers 0 to {depth - 1}")
        return list(self.layers)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Only what differs from the defaults."""
        fields = type(self).model_fields
        return ((name, getattr(self, name)) for name in fields if getattr(self, name) != fields[name].default)

    @property
    def per(self) -> Literal["sequence", "batch"]:
        """What `select_heads` sorts the spans of. Calibrated groups are those of the first batch."""
        return "sequence" if self.grouping == "sequence" else "batch"

    @field_validator("layers", mode="before")
    @classmethod
    def _count_or_indices(cls, value: object) -> object:
        if value is None or (isinstance(value, str) and value == "all"):
            return value
        if (count := _integers([value])) and count[0] >= 1:
            return count[0]
        indices = _integers(value) if isinstance(value, Sequence) else None
        if indices and indices[0] >= 0 and indices == tuple(sorted(set(indices))):
            return indices
        raise ValueError(
            f"layers is {value!r}; it must be how many to sample (at least 1), indices in rising order, 'all' or null"
        )

    @field_validator("window", "horizon", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        if any(isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"must hold whole numbers, got {value!r}")
        return value

    @field_validator("horizon", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in HORIZONS:
                raise ValueError(f"must be [low, high] or one of {sorted(HORIZONS)}, got {value!r}")
            return HORIZONS[value]
        return value

    @field_validator("horizon")
    @classmethod
    def _upright(cls, value: tuple[int, int | None]) -> tuple[int, int | None]:
        low, high = value
        if low < 0 or (high is not None and high < low) or max(low, high or 0) > MAX_TOKENS:
            raise ValueError(f"must be [low, high] with 0 <= low <= high <= {MAX_TOKENS}, got {list(value)}")
        return value


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

    strategy: str = Field(
        default="coupled",
        description="tokens to amplify; " + "; ".join(f"{name}: {each.meaning}" for name, each in STRATEGIES.items()),
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

    @property
    def reads(self) -> frozenset[Reads]:
        """What the strategy reads; empty for one that needs no forward pass."""
        return STRATEGIES[self.strategy].reads

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"must be one of {', '.join(STRATEGIES)}, got {value!r}")
        return value


def _integers(values: Sequence[Any]) -> tuple[int, ...] | None:
    """None if one is no integer."""
    numbers = [value for value in values if isinstance(value, SupportsIndex) and not isinstance(value, bool)]
    return tuple(index(number) for number in numbers) if len(numbers) == len(values) else None
