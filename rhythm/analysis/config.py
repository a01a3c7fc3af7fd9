"""The configuration of an analysis: every setting that affects its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from rhythm.analysis.counterfactual import CounterfactualConfig
from rhythm.credit.config import CreditConfig
from rhythm.credit.peaks import PeaksConfig as PeaksConfig
from rhythm.engines.interfaces import SamplingConfig
from rhythm.system.renamed import renamed_keys
from rhythm.tap.signals_config import SignalsConfig

SAMPLING = SamplingConfig(temperature=0.7)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sampling": {"temperature": 0.0},
        "signals": {"layers": "all", "horizon": [1, None]},
        "figure": "shortest_correct",
        "maps": 70,
    }
}
"""Values that a preset gives to keys that are not set."""


def _over(defaults: Mapping[str, Any], values: Any) -> Any:
    """`values` and, for keys that they don't set, `defaults`."""
    if not isinstance(values, Mapping):
        return values
    merged = dict(defaults) | dict(values)
    both = defaults.keys() & values.keys()
    return merged | {key: _over(defaults[key], values[key]) for key in both if isinstance(defaults[key], Mapping)}


class ReceiverConfig(BaseModel, extra="forbid", frozen=True):
    """Receiver heads: those whose attention is most concentrated on a few tokens."""

    sentence_gap: int = Field(
        default=4, ge=1, description="smallest distance, in sentences, at which attention between sentences counts"
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="fraction of the pool chosen as receivers; null: as many as global heads"
    )


class Table2Config(BaseModel, extra="forbid", frozen=True):
    """The baselines and intervals of Table 2."""

    permutations: int = Field(default=999, ge=1, description="number of permutations of the peaks")
    null: Literal["rotate", "shuffle"] = Field(
        default="rotate",
        description="how peaks are permuted. rotate: shift all peaks of a response, keeping their distances; shuffle: "
        "random positions",
    )
    resamples: int = Field(default=2000, ge=1, description="bootstrap resamples of the responses")


class AnalysisConfig(BaseModel, extra="forbid", frozen=True):
    """The settings that affect the results of an analysis. They must not change when a directory is continued."""

    preset: Literal["paper"] | None = Field(
        default=None,
        description="paper: what its appendix A.1 says, for keys that are not set: heads of all layers, FAI to the "
        "end of the response, the shortest correct response in Fig. 2; and greedy responses",
    )
    sampling: SamplingConfig = Field(default=SAMPLING, description="how responses are generated, for rows without one")
    responses_per_problem: int = Field(default=1, ge=1, description="responses generated per problem")
    problems_at_once: int = Field(default=8, ge=1, description="problems whose responses are generated together")
    signals: SignalsConfig = Field(
        default=SignalsConfig(),
        description="heads, WAAD and FAI; local, global and receiver heads are chosen from its layers",
    )
    credit: CreditConfig = Field(default=CreditConfig(), description="γ, computed as in training")
    peaks: PeaksConfig = Field(default=PeaksConfig(), description="what counts as a peak")
    receivers: ReceiverConfig = Field(default=ReceiverConfig(), description="receiver heads")
    table2: Table2Config = Field(default=Table2Config(), description="baselines and intervals of Table 2")
    counterfactuals: CounterfactualConfig | None = Field(
        default=CounterfactualConfig(), description="Table 1; null: no counterfactuals"
    )
    chat: bool = Field(
        default=False, description="apply the tokenizer's chat template, with the prompt as user message"
    )
    attended_anchors: int = Field(
        default=200, ge=0, description="for how many anchors per response, the strongest, attenders are recorded"
    )
    attenders: int = Field(default=8, ge=1, description="attenders recorded per anchor, the strongest")
    maps: int = Field(default=12, ge=0, description="compute attention maps for the first so many responses")
    figure: Literal["shortest", "shortest_correct"] = Field(
        default="shortest",
        description="response drawn in Figs. 2 and 8, one with maps if there is any; correct: by the row's answer",
    )
    seed: int = Field(default=0, ge=0, description="seed of sampling, permutations and resamples")

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: object) -> object:
        if said := renamed_keys(values, {"pool": "signals.layers"}):
            raise ValueError(said)
        return values

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: object) -> object:
        """The values on top of those of the preset. A section that is an object counts as set in all its keys."""
        preset = PRESETS.get(values.get("preset") or "") if isinstance(values, Mapping) else None
        return values if preset is None else _over(preset, values)

    @field_validator("sampling", mode="before")
    @classmethod
    def _keeps_our_temperature(cls, value: object) -> object:
        """Keep the default temperature of SAMPLING, not training's, where the section sets only other keys."""
        return {"temperature": SAMPLING.temperature, **value} if isinstance(value, Mapping) else value

    @field_validator("signals")
    @classmethod
    def _own_groups(cls, value: SignalsConfig) -> SignalsConfig:
        if value.grouping != "sequence":
            raise ValueError(
                f"grouping must be sequence: each response has its own head groups; got {value.grouping!r}"
            )
        return value
