"""How an analysis is made: every setting that decides its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from rhythm.analysis.counterfactual import CounterfactualConfig
from rhythm.credit.config import CreditConfig, SignalsConfig
from rhythm.engines.interfaces import SamplingConfig
from rhythm.system.renamed import renamed_keys

SAMPLING = SamplingConfig(temperature=0.7)


class PeaksConfig(BaseModel, extra="forbid", frozen=True):
    """What counts as a peak: arguments of scipy.signal.find_peaks, on a curve's run of defined values."""

    prominence: float = Field(
        default=0.25, ge=0, description="least prominence, in standard deviations of the response's curve"
    )
    distance: int = Field(default=1, ge=1, description="least distance between peaks, in tokens; the higher one stays")
    follow: int = Field(default=1, ge=0, description="an FAI peak up to this many tokens after a WAAD peak follows it")


class ReceiverConfig(BaseModel, extra="forbid", frozen=True):
    """Receiver heads: those whose received attention is the most unevenly spread."""

    sentence_gap: int = Field(default=4, ge=1, description="least distance at which attention between sentences counts")
    share: float | None = Field(
        default=None, gt=0, le=1, description="share of the pool that receives; null: as many heads as are global"
    )


class Table2Config(BaseModel, extra="forbid", frozen=True):
    """The baselines and intervals of Table 2."""

    permutations: int = Field(default=999, ge=1, description="permutations of the peaks")
    null: Literal["rotate", "shuffle"] = Field(
        default="rotate",
        description="rotate: a response's peaks keep their distances and begin elsewhere; shuffle: they keep only "
        "their number",
    )
    resamples: int = Field(default=2000, ge=1, description="bootstrap resamples of the responses")


class AnalysisConfig(BaseModel, extra="forbid", frozen=True):
    """What decides the results of an analysis; a directory is continued with the same alone."""

    sampling: SamplingConfig = Field(default=SAMPLING, description="how responses are generated, where a row has none")
    responses_per_problem: int = Field(default=1, ge=1, description="responses generated to each problem")
    problems_at_once: int = Field(default=8, ge=1, description="problems whose responses are generated together")
    signals: SignalsConfig = Field(
        default=SignalsConfig(),
        description="heads, WAAD and FAI; the heads of its layers may be local, global or receivers",
    )
    credit: CreditConfig = Field(default=CreditConfig(), description="γ, as training would put it")
    peaks: PeaksConfig = Field(default=PeaksConfig(), description="what counts as a peak")
    receivers: ReceiverConfig = Field(default=ReceiverConfig(), description="receiver heads")
    table2: Table2Config = Field(default=Table2Config(), description="baselines and intervals of Table 2")
    counterfactuals: CounterfactualConfig | None = Field(
        default=CounterfactualConfig(), description="Table 1; null: no counterfactuals"
    )
    chat: bool = Field(default=False, description="prompts are put into the tokenizer's chat template, as the user's")
    attended_anchors: int = Field(default=200, ge=0, description="strongest anchors whose attenders are kept")
    attenders: int = Field(default=8, ge=1, description="attenders kept of an anchor, the strongest")
    maps: int = Field(default=12, ge=0, description="first responses that get attention maps")
    seed: int = Field(default=0, ge=0, description="of sampling, permutations and resamples")

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: object) -> object:
        if said := renamed_keys(values, {"pool": "signals.layers"}):
            raise ValueError(said)
        return values

    @field_validator("sampling", mode="before")
    @classmethod
    def _keeps_our_temperature(cls, value: object) -> object:
        """A section that sets other keys alone has the temperature above, not training's."""
        return {"temperature": SAMPLING.temperature, **value} if isinstance(value, Mapping) else value

    @field_validator("signals")
    @classmethod
    def _own_groups(cls, value: SignalsConfig) -> SignalsConfig:
        if value.grouping != "sequence":
            raise ValueError(f"grouping must be sequence: every response has groups of its own; got {value.grouping!r}")
        return value
