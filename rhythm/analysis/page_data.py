"""Prepares the data that report.html's script draws, as plain JSON: responses, attention maps, and heads."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rhythm.analysis.response import AttentionMap, HeadMap, ResponseResult
from rhythm.analysis.results import Heads
from rhythm.reports.format import format_number, format_percent, token_scale

MAX_TOKENS = 3000  # shown per response
UNDEFINED = 255  # the byte of a weight that is NaN

Json = dict[str, Any]


@dataclass(frozen=True)
class Signal:
    """A signal of the tokens. key: its field in `Tokens`; hue: the page's color; low: where the color scale begins."""

    key: str
    name: str
    hue: str
    unit: str
    meaning: str
    low: float | None = None


SIGNALS = (
    Signal(
        "waad",
        "WAAD",
        "waad",
        "tokens",
        "windowed average attention distance: how far back the local heads attend, clipped at the window",
    ),
    Signal(
        "fai",
        "FAI",
        "fai",
        "",
        "future attention influence: mean attention that tokens in the horizon pay to the token, in the global heads",
    ),
    Signal("fai_receiver", "Receiver FAI", "receiver", "", "the same, over the receiver heads"),
    Signal("entropy", "Entropy", "entropy", "nats", "entropy of the token's distribution at temperature 1"),
    Signal("gamma", "γ", "gamma", "", "factor that training would apply to the token's advantage; 1 is none", low=1.0),
)
GROUPS = {"top": "highest FAI", "bottom": "lowest FAI", "matched": "low FAI beside the highest"}
SETS = {  # set of heads → (name of a member, hue)
    "local": ("local", "waad"),
    "global": ("global", "fai"),
    "receiver": ("receiver", "receiver"),
    "receiver_sentence": ("sentence receiver", "receiver"),
}


def response_data(response: ResponseResult) -> Json:
    """A response: its tokens, signals, peaks, chunks, attenders of anchors and maps, up to MAX_TOKENS tokens."""
    n = min(len(response.tokens.texts), MAX_TOKENS)
    jaccards: dict[tuple[int, str], list[float]] = defaultdict(list)
    for trial in response.trials or ():
        jaccards[trial.position, trial.group].append(trial.jaccard)
    return {
        "name": _title(response),
        "prompt": response.prompt,
        "facts": _facts(response),
        "tokens": response.tokens.texts[:n],
        "hidden": len(response.tokens.texts) - n,
        "scales": {signal.key: _scale(response, signal) for signal in SIGNALS},
        "values": {signal.key: rounded(getattr(response.tokens, signal.key)[:n]) for signal in SIGNALS},
        "peaks": {key: [i for i in indices if i < n] for key, indices in vars(response.peaks).items()},
        "chunks": [i for i in response.chunks if i < n],
        "attenders": {
            anchor.token: [[attender.token, rounded([attender.weight])[0]] for attender in anchor.attenders]
            for anchor in response.anchors
            if anchor.attenders and anchor.token < n
        },
        "trials": {
            position: f"replaced as {GROUPS[group]}, mean Jaccard {format_number(float(np.nanmean(values)))}"
            for (position, group), values in jaccards.items()
            if position < n and not all(map(math.isnan, values))
        },
        "maps": None
        if response.maps is None
        else {"local": map_data(response.maps.local), "global": map_data(response.maps.global_)},
        "band": None if response.maps is None else pixels(response.maps.local.band[:n]),
    }


def _scale(response: ResponseResult, signal: Signal) -> list[float | None] | None:
    """(low, high, largest value) of the color scale; None where the signal is undefined."""
    values = getattr(response.tokens, signal.key)
    scale = token_scale(values, signal.low)
    return None if scale is None else rounded([*scale, max(value for value in values if not math.isnan(value))])


def map_data(attention: AttentionMap) -> Json:
    """A mean attention map as an image."""
    return {**pixels(attention.weights), "cell": attention.cell, "prompt": attention.prompt_columns}


def pixels(weights: Sequence[Sequence[float]]) -> Json:
    """√(weight / peak) as bytes 0…254, row by row, in base64; 255 is NaN.

    The square root keeps small weights visible: most are far below the largest.
    """
    weights_RC: NDArray[np.float64] = np.array(weights, dtype=np.float64)
    known = np.isfinite(weights_RC)
    peak = float(weights_RC.max(where=known, initial=0.0))
    strength = np.sqrt(np.clip(np.where(known, weights_RC, 0.0) / (peak or 1.0), 0.0, 1.0))
    levels = np.where(known, np.rint((UNDEFINED - 1) * strength), UNDEFINED).astype(np.uint8)
    return {
        "rows": levels.shape[0],
        "columns": levels.shape[1],
        "peak": rounded([peak])[0],
        "data": base64.b64encode(levels.tobytes()).decode("ascii"),
    }


def heads_data(heads: Heads) -> Json:
    """Every head of the model: the quantities that can color its square, its sets, and the text of its tooltip."""
    members = {summary.name: set(summary.heads) for summary in heads.sets}
    quantities: list[tuple[str, str, str, bool, HeadMap]] = [
        ("span", "Mean span", "entropy", True, heads.span),
        ("kurtosis", "Kurtosis", "receiver", True, heads.kurtosis),
        ("kurtosis_sentence", "Kurtosis, sentences", "receiver", True, heads.kurtosis_sentence),
        ("attention_entropy", "Attention entropy", "entropy", False, heads.entropy),
        ("sink_mass", "Sink mass", "local", False, heads.sink_mass),
        ("prompt_mass", "Prompt mass", "global", False, heads.prompt_mass),
        *((s.name, f"In {SETS[s.name][0]} sets", SETS[s.name][1], False, s.chosen) for s in heads.sets),
    ]

    quantities = [quantity for quantity in quantities if quantity[-1]]  # earlier versions had none of some

    def notes(layer: int, head: int) -> list[str]:
        texts = [
            f"span {format_number(heads.span[layer][head])} tokens",
            f"kurtosis {format_number(heads.kurtosis[layer][head])}, "
            f"of sentences {format_number(heads.kurtosis_sentence[layer][head])}",
        ]
        if heads.entropy:
            texts.append(f"attention entropy {format_number(heads.entropy[layer][head])} nats")
            shares = (("first 4 tokens", heads.sink_mass), ("prompt", heads.prompt_mass))
            texts += [f"{format_percent(of_heads[layer][head])} on the {where}" for where, of_heads in shares]
        for summary in heads.sets:
            if not math.isnan(share := summary.chosen[layer][head]):
                belongs = (layer, head) in members[summary.name]
                if share or belongs:
                    texts.append(
                        f"{SETS[summary.name][0]} in {format_percent(share)} of the responses"
                        + ("" if belongs else ", not pooled")
                    )
        return texts

    return {
        "layers": [
            {
                "index": layer,
                "pool": layer in heads.pool_layers,
                "heads": [
                    {"sets": [name for name in members if (layer, head) in members[name]], "notes": notes(layer, head)}
                    for head in range(heads.heads)
                ],
            }
            for layer in range(heads.layers)
        ],
        "quantities": [
            {"key": key, "name": name, "hue": hue, "log": log, "values": [rounded(row) for row in values]}
            for key, name, hue, log, values in quantities
            if any(not math.isnan(value) for row in values for value in row)
        ],
    }


def rounded(values: Iterable[float]) -> list[float | None]:
    """The values to four significant digits; None (null) where undefined or infinite."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def _title(response: ResponseResult) -> str:
    """The entry in the list of responses: its name and the longest line of its prompt."""
    lines = [line.strip() for line in response.prompt.splitlines() if len(line.strip()) > 3]
    text = max(lines, key=len, default="")
    return f"{response.name} · {text[:70]}{'…' if len(text) > 70 else ''}"


def _facts(response: ResponseResult) -> list[str]:
    facts = [f"row {response.row}", response.source]
    if response.finished is not None:
        facts.append("ended by itself" if response.finished else "cut at the limit")
    tokens = len(response.tokens.texts)
    facts.append(f"{tokens:,} tokens after a prompt of {response.prompt_tokens:,}")
    facts.append(f"{len(response.chunks):,} chunks")
    facts.append(f"{len(response.anchors):,} anchors")
    if not response.complete:
        facts.append("no counterfactuals yet")
    return facts if response.answer is None else [*facts, f"answer of the row: {response.answer[-60:]}"]
