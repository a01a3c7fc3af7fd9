"""Writes report.html of an analysis: a single file that needs neither network nor other files.

It shows the main findings; responses with tokens colored by a signal, curves and attention maps; the heads; the paper's
Tables 1 and 2; and all settings. Undefined values are hatched or written "–". Only the first responses are shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rhythm.analysis.content_words import content_words
from rhythm.analysis.counterfactual import CounterfactualConfig
from rhythm.analysis.lengths_output import lengths_data, read_lengths
from rhythm.analysis.page_data import SETS, SIGNALS, heads_data, response_data
from rhythm.analysis.response import ResponseResult, Trial
from rhythm.analysis.results import Analysis, Heads, Interval, Table1, Table2Row
from rhythm.analysis.sensitivity_output import read_sensitivity, sensitivity_data
from rhythm.reports.format import format_number, format_p_value, format_percent, template_environment
from rhythm.system.writing import replace_file

MAX_RESPONSES = 16
EXAMPLES_PER_GROUP = 2
CONTEXT_CHARACTERS = 240  # before a replaced token
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Headline:
    """A card with a finding, the numbers behind it, and what it does not show."""

    label: str
    value: str
    note: str
    caveat: str = ""


@dataclass(frozen=True)
class LiftBar:
    """Positions of a lift and its interval on the axis shared by the rows, in percent of its width."""

    zero: float
    low: float
    high: float
    value: float


@dataclass(frozen=True)
class Side:
    """The text after a token, in pieces (text, whether it is a content word that the other side doesn't have)."""

    title: str
    token: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Example:
    """A counterfactual as shown in the paper's appendix: the same context with two tokens and their continuations."""

    title: str
    note: str
    context: str
    sides: tuple[Side, Side]


def write_page(analysis: Analysis, path: Path | None = None, *, max_responses: int = MAX_RESPONSES) -> Path:
    """Write the page of an analysis, by default to report.html in its directory; returns its path."""
    path = analysis.directory / "report.html" if path is None else path
    replace_file(path, render(analysis, max_responses=max_responses))
    return path


def render(analysis: Analysis, *, max_responses: int = MAX_RESPONSES) -> str:
    """The page of an analysis as HTML, with its first `max_responses` responses."""
    environment = template_environment(TEMPLATES)
    # tojson also writes <, > and & as \u003c, …, so that no text can close the script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"number": format_number, "percent": format_percent, "interval": format_interval}
    environment.filters |= {"p_value": format_p_value, "lift": format_lift}
    drawn = list(islice(analysis.responses(), max_responses))
    return environment.get_template("analysis.html.j2").render(
        analysis=analysis,
        model=_last_part(analysis.model),
        facts=facts(analysis),
        unfinished=unfinished(analysis),
        headlines=headlines(analysis),
        signals=SIGNALS,
        table2=list(zip(analysis.table2, lift_bars(analysis.table2), strict=True)),
        set_names={name: title for name, (title, _) in SETS.items()},
        examples=examples(analysis, drawn),
        settings=list(flat_settings(analysis.settings)),
        lengths=None if (by_length := read_lengths(analysis)) is None else lengths_data(by_length, analysis.p_floor),
        sensitivity=None if (of_grid := read_sensitivity(analysis)) is None else sensitivity_data(of_grid),
        data={
            "signals": [vars(signal) for signal in SIGNALS],
            "responses": [response_data(response) for response in drawn],
            "heads": heads_data(analysis.heads),
        },
    )


def facts(analysis: Analysis) -> list[str]:
    """Short descriptions of what was analyzed."""
    heads, so_far = analysis.heads, analysis.so_far
    count = len(analysis.names) if so_far is None else so_far.responses
    pool = ", ".join(map(str, heads.pool_layers))
    return [
        ("" if so_far is None else f"{len(analysis.names):,} of ")
        + f"{count:,} response{'' if count == 1 else 's'}"
        + (f" to {_last_part(analysis.problems)}" if analysis.problems else ""),
        f"{heads.layers} layers of {heads.heads} heads",
        f"sets from layers {pool}" if len(heads.pool_layers) < heads.layers else "sets from all layers",
    ]


def unfinished(analysis: Analysis) -> list[str]:
    """Sentences about how much of an analysis there was when the page was written; none if it has finished."""
    if (so_far := analysis.so_far) is None:
        return []
    if so_far.counterfactuals is None:
        counterfactuals = []
    elif so_far.counterfactuals:
        counterfactuals = [f"Counterfactuals (Table 1) are of {so_far.counterfactuals:,} of {so_far.responses:,}."]
    else:
        counterfactuals = ["There are no counterfactuals (Table 1) yet."]
    return [
        f"Signals, heads and couplings (Table 2) are of {len(analysis.names):,} of {so_far.responses:,} responses.",
        *counterfactuals,
        "All numbers will change; load the page again for more.",
    ]


def headlines(analysis: Analysis) -> list[Headline]:
    """The most important findings: the lifts of Table 2, and Table 1's Pr(Top < Bottom)."""
    labels = {
        "entropy": "Entropy at WAAD peaks, in nats, over permuted ones",
        "cooccurrence": "Receiver and global FAI peaks together, over permuted ones",
        "follows": "FAI peaks at or just after WAAD peaks, over permuted ones",
    }
    shown = [
        Headline(
            labels[row.key],
            format_lift(row.permuted_lift),
            f"{_observed(row, row.observed)} against {_observed(row, row.permuted)} permuted; "
            f"{_compared(row.p_value, analysis.p_floor)}",
            shared_heads_caveat(analysis.heads) if row.key == "cooccurrence" else "",
        )
        for row in analysis.table2
    ]
    if (table := analysis.table1) is not None:
        shown.append(
            Headline(
                "Problems where replacing high-FAI tokens changes more",
                format_percent(table.top_below_bottom),
                f"Jaccard {format_number(table.top)} against {format_number(table.bottom)}; {_compared(table.p_value)}"
                + _so_far(analysis),
                _matched(table),
            )
        )
    return shown


def shared_heads_caveat(heads: Heads) -> str:
    """Why receiver and global heads share peaks even in an untrained model; docs/analysis.md explains it further."""
    overlap = next(overlap for overlap in heads.overlaps if overlap.name == "receiver")
    return (
        "Part of the lift comes from the method: both sets are chosen from the same pool and share heads by chance "
        f"({format_percent(overlap.random)}; here {format_percent(overlap.share)}), and a shared head has the same "
        "peaks. A small model with random weights shows +50%, too."
    )


def lift_bars(rows: Sequence[Table2Row]) -> list[LiftBar | None]:
    """Positions of the lifts over the closed form on a common axis; None where a lift is undefined."""
    edges = [0.0]
    for row in rows:
        edges += [edge for edge in (row.lift, row.lift_interval.low, row.lift_interval.high) if math.isfinite(edge)]
    low, width = min(edges), max(edges) - min(edges)

    def percent(value: float) -> float:
        return round(4 + 92 * (value - low) / width, 2) if width else 50.0

    return [
        LiftBar(
            percent(0.0),
            percent(row.lift_interval.low if math.isfinite(row.lift_interval.low) else row.lift),
            percent(row.lift_interval.high if math.isfinite(row.lift_interval.high) else row.lift),
            percent(row.lift),
        )
        if math.isfinite(row.lift)
        else None
        for row in rows
    ]


def _so_far(analysis: Analysis) -> str:
    """How many responses' counterfactuals Table 1 is about, if not of all."""
    if (so_far := analysis.so_far) is None:
        return ""
    return f"; {so_far.counterfactuals or 0:,} of {so_far.responses:,} responses so far"


def _matched(table: Table1) -> str:
    """What a control for position gives: FAI is higher early in a response, where more text is left to change."""
    if not table.matched_trials:
        return "Partly an effect of position: FAI is higher early in a response, where more text is left to change."
    return (
        f"Against tokens of low FAI beside them: {format_percent(table.top_below_matched)}, Jaccard "
        f"{format_number(table.matched)}; {_compared(table.matched_p_value)}"
    )


def examples(analysis: Analysis, responses: Sequence[ResponseResult]) -> list[Example]:
    """The counterfactuals whose Jaccard index is closest to their group's mean, at most one per response."""
    if analysis.table1 is None:
        return []
    config = CounterfactualConfig.model_validate(analysis.settings.get("counterfactuals") or {})
    chosen: list[Example] = []
    for group, mean in (("top", analysis.table1.top), ("bottom", analysis.table1.bottom)):
        closest: list[tuple[float, ResponseResult, Trial]] = []
        for response in responses:
            trials = response.trials or ()
            distances = [
                (abs(trial.jaccard - mean), i)
                for i, trial in enumerate(trials)
                if trial.group == group and not math.isnan(trial.jaccard)
            ]
            if distances:
                distance, i = min(distances)
                closest.append((distance, response, trials[i]))
        closest.sort(key=lambda candidate: candidate[0])
        chosen += [_example(response, trial, config) for _, response, trial in closest[:EXAMPLES_PER_GROUP]]
    return chosen


def flat_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("peaks.follow", "1"), … of nested settings."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            entries = value if isinstance(value, list | tuple) else [value]
            yield f"{prefix}{key}", ", ".join("none" if entry is None else str(entry) for entry in entries)


def format_interval(interval: Interval, percent: bool = False) -> str:
    """Format an interval as "0.12 to 0.34"; "" when undefined."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return ""
    form = format_percent if percent else format_number
    return f"{form(interval.low)} to {form(interval.high)}"


def format_lift(lift: float) -> str:
    """Format a lift as +51.2% or −3.0%; "–" when undefined."""
    return format_percent(lift) if lift < 0 or not math.isfinite(lift) else "+" + format_percent(lift)


def _observed(row: Table2Row, value: float) -> str:
    return format_number(value) if row.key == "entropy" else format_percent(value)


def _compared(p: float, floor: float = 0.0) -> str:
    """Format a p-value as "p = 0.034" with non-breaking spaces."""
    text = format_p_value(p, floor)
    return ("p " if text.startswith(("<", "≤")) else "p = ").replace(" ", "\u00a0") + text.replace(" ", "\u00a0")


def _example(response: ResponseResult, trial: Trial, config: CounterfactualConfig) -> Example:
    texts, following = response.tokens.texts, trial.position + 1
    before = "".join(texts[: trial.position])
    context = before if len(before) <= CONTEXT_CHARACTERS else "…" + before[-CONTEXT_CHARACTERS:]
    # The part that was compared: up to max_new_tokens tokens, without the response's end token.
    compared = "".join(texts[: following + config.max_new_tokens])
    if compared.startswith(response.response):
        compared = response.response
    after = compared[len("".join(texts[:following])) :]
    original = Side("Original", trial.original_token, tuple(_pieces(after, trial.continuation, config)))
    replaced = Side(
        f"Candidate {trial.candidate}, probability {format_number(trial.probability)}",
        trial.replacement_token,
        tuple(_pieces(trial.continuation, after, config)),
    )
    return Example(
        title=f"{'High' if trial.group == 'top' else 'Low'} FAI, {format_number(trial.fai)}: "
        f"Jaccard {format_number(trial.jaccard)}",
        note=f"response {response.name}, token {trial.position}" + ("" if trial.finished else "; cut at the limit"),
        context=context,
        sides=(original, replaced),
    )


def _pieces(text: str, other: str, config: CounterfactualConfig) -> Iterator[tuple[str, bool]]:
    """The text in pieces, with True for content words that the other text doesn't have."""
    lacking = content_words(text, config.word_pattern, config.stop_words) - content_words(
        other, config.word_pattern, config.stop_words
    )
    start = 0
    for match in re.finditer(config.word_pattern, text.replace("’", "'"), flags=re.IGNORECASE):
        if match.group().casefold() in lacking:
            if match.start() > start:
                yield text[start : match.start()], False
            yield text[match.start() : match.end()], True
            start = match.end()
    if start < len(text):
        yield text[start:], False


def _last_part(path: str) -> str:
    return Path(path).name or path
