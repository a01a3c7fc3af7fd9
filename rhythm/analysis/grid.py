"""The settings between which an analysis compares γ: the analysis' own, changed in one of them, in two, or in more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from rhythm.credit.config import CreditConfig, QuantileThreshold, Threshold
from rhythm.tap.signals_config import SignalsConfig

CREDIT = ("top_fraction", "gamma_amp", "alpha", "neighborhood", "tau_waad", "tau_delta")
SIGNALS = ("quantile", "layers", "window", "horizon", "grouping")
KEYS = CREDIT + SIGNALS


class SensitivityConfig(BaseModel, extra="forbid", frozen=True):
    """The values that each setting takes besides the analysis' own, in turn."""

    changes: int = Field(
        default=2, ge=1, le=len(KEYS), description="how many of the settings below are changed at a time, at most"
    )
    top_fraction: tuple[float, ...] = Field(default=(0.1, 0.2, 0.3, 0.5, 0.6), description="of credit.top_fraction")
    gamma_amp: tuple[float, ...] = Field(default=(1.25, 2.0), description="of credit.gamma_amp")
    alpha: tuple[float, ...] = Field(default=(0.0, 0.25, 0.75, 1.0), description="of credit.alpha")
    neighborhood: tuple[int, ...] = Field(default=(1, 2, 5, 8), description="of credit.neighborhood")
    tau_waad: tuple[Threshold, ...] = Field(
        default=tuple(QuantileThreshold(quantile=q) for q in (0.25, 0.75, 1.0)), description="of credit.tau_waad"
    )
    tau_delta: tuple[Threshold | None, ...] = Field(
        default=tuple(QuantileThreshold(quantile=q) for q in (0.25, 0.5, 0.9)), description="of credit.tau_delta"
    )
    quantile: tuple[float, ...] = Field(default=(0.1, 0.2, 0.4, 0.5), description="of signals.quantile")
    layers: tuple[int | tuple[int, ...] | Literal["all"] | None, ...] = Field(
        default=(1, 3, 10, "all"), description="of signals.layers"
    )
    window: tuple[int, ...] = Field(default=(3, 5, 20, 50), description="of signals.window")
    horizon: tuple[tuple[int, int | None], ...] = Field(
        default=((1, 50), (5, 50), (10, 30), (10, 100), (1, None)), description="of signals.horizon"
    )
    grouping: tuple[Literal["sequence", "batch"], ...] = Field(
        default=("batch",), description="of signals.grouping; batch: all responses of the analysis share their heads"
    )

    @model_validator(mode="after")
    def _each_is_allowed_where_it_belongs(self) -> SensitivityConfig:
        for key in KEYS:
            for value in getattr(self, key):
                try:
                    _owner(key).model_validate({key: value})
                except ValidationError as error:
                    raise ValueError(f"{key} holds {text_of(value)}: {error.errors()[0]['msg']}") from error
        return self

    def others(self, credit: CreditConfig, signals: SignalsConfig) -> dict[str, list[Any]]:
        """Key → the values that differ from these settings, each once."""
        own = own_values(credit, signals)
        return {key: [v for v in dict.fromkeys(getattr(self, key)) if v != own[key]] for key in KEYS}

    def settings(self, credit: CreditConfig, signals: SignalsConfig) -> Iterator[Setting]:
        """These settings themselves, then those with one change, two, …, up to `changes`."""
        others = {key: values for key, values in self.others(credit, signals).items() if values}
        for count in range(self.changes + 1):
            for keys in combinations(others, count):
                for values in product(*(others[key] for key in keys)):
                    yield Setting.of(credit, signals, dict(zip(keys, values, strict=True)))


@dataclass(frozen=True)
class Setting:
    """One of the settings. changed: key → its text, of those that differ from the analysis' own."""

    credit: CreditConfig
    signals: SignalsConfig
    changed: dict[str, str]

    @staticmethod
    def of(credit: CreditConfig, signals: SignalsConfig, changes: Mapping[str, Any]) -> Setting:
        ours = {key: value for key, value in changes.items() if key in CREDIT}
        theirs = {key: value for key, value in changes.items() if key in SIGNALS}
        return Setting(
            credit.model_copy(update=ours),
            signals.model_copy(update=theirs),
            {key: text_of(value) for key, value in changes.items()},
        )


def own_values(credit: CreditConfig, signals: SignalsConfig) -> dict[str, Any]:
    """Key → value of these settings."""
    return {key: getattr(credit if key in CREDIT else signals, key) for key in KEYS}


def text_of(value: Any) -> str:
    """A value as it is shown: 0.2, [10, 50], quantile 0.5, none."""
    if isinstance(value, BaseModel):
        return " ".join(f"{name} {number}" for name, number in value.model_dump().items())
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(text_of, value))}]"
    return "none" if value is None else str(value)


def _owner(key: str) -> type[BaseModel]:
    return CreditConfig if key in CREDIT else SignalsConfig
