"""How the rhythm changes with the length of the context: the same responses in contexts of 256 … 8192 tokens.

A response that is too long for a length is cut to its first tokens, as the model had written it by then. A shorter one
stays as it is, and other transcripts of the analysis (prompt and response) are put before its prompt, all of them whole
but the first, whose end is cut off. Signals, heads and peaks are therefore always those of tokens that the model wrote
in answer to their own prompt. What is artificial about an extended context: the model wrote the response without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, field_validator

from rhythm.analysis.bootstrap import bootstrap, ratio
from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.forward import Observer
from rhythm.analysis.heads import summarize_heads
from rhythm.analysis.kept_heads import prompt_ids_of
from rhythm.analysis.observation import observe_response
from rhythm.analysis.response import Anchor, Head, Number, Peaks, ResponseHeads, Tokens
from rhythm.analysis.results import Analysis, Interval, Table2Row, read_json, write_json
from rhythm.analysis.table2 import table2


class LengthsConfig(BaseModel, extra="forbid", frozen=True):
    """The lengths of context, and the responses measured at each."""

    tokens: tuple[int, ...] = Field(
        default=(256, 512, 1024, 2048, 4096, 8192),
        description="lengths of prompt and response with what is before them",
    )
    responses: int = Field(default=8, ge=1, description="responses measured at each length, the first of the analysis")
    least: int = Field(default=32, ge=1, description="tokens that must be left of a response that is cut")

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if not tokens or tokens[0] < 2 or list(tokens) != sorted(set(tokens)):
            raise ValueError(f"must be ascending and at least 2, got {list(tokens)}")
        return tokens


@dataclass(frozen=True)
class AtLength:
    """One response at one length; tokens and heads as in `ResponseResult`.

    Attributes:
        length: of the whole sequence. prompt, before: tokens of its own prompt, and of what was put before it.
        others: names of the responses put before it, in their order.
    """

    name: str
    row: int
    length: int
    prompt: int
    before: int
    others: tuple[str, ...]
    tokens: Tokens
    peaks: Peaks
    anchors: tuple[Anchor, ...]
    heads: ResponseHeads


@dataclass(frozen=True)
class LengthRow:
    """All responses at one length.

    Attributes:
        length: tokens of the sequences; 0: as they were generated.
        responses: number of them. tokens, before: mean number of response tokens, and of those before the own prompt.
        table2: the couplings of Table 2.
        local, global_: mean fraction of a set of heads that two problems share; random: its expected value for sets
            drawn at random.
        local_kept, global_kept: mean Jaccard index of a response's set and of its set as it was generated.
        reach, reach_interval: mean reach of the anchors, tokens.
        fai_anchors, fai: mean FAI of the anchors, and of all tokens.
    """

    length: int
    responses: int
    tokens: Number
    before: Number
    table2: tuple[Table2Row, ...]
    local: Number
    global_: Number
    random: Number
    local_kept: Number
    global_kept: Number
    reach: Number
    reach_interval: Interval
    fai_anchors: Number
    fai: Number


@dataclass(frozen=True)
class Lengths:
    """The results at all lengths; names: of the responses of the analysis."""

    names: tuple[str, ...]
    rows: tuple[LengthRow, ...]


def measure_lengths(
    model: Any,
    tokenizer: Any,
    analysis: Analysis,
    config: LengthsConfig,
    progress: Callable[[str], object] = lambda doing: None,
) -> Lengths:
    """The first responses of an analysis as they were generated, and at each length that model and responses allow.

    What was measured is kept in `lengths/` in the directory of the analysis, and not measured again.

    Args:
        progress: called with what is being done.

    Raises ValueError where the tokenizer is not that of the analysis, and as `Observer` does.
    """
    own = AnalysisConfig.model_validate(analysis.settings)
    observer = Observer(model, own.signals, sentence_gap=own.receivers.sentence_gap)
    context = getattr(observer.config, "max_position_embeddings", None)
    transcripts = _transcripts(analysis, tokenizer, own.chat)
    directory = analysis.directory / "lengths"
    directory.mkdir(exist_ok=True)
    measured: dict[int, list[AtLength]] = {}
    for length in (0, *config.tokens):
        if context is not None and length > context:
            break
        for each in transcripts[: config.responses]:
            sequence = sequence_of(each, transcripts, length, config.least)
            if sequence is not None:
                progress(f"response {each.name} at {len(sequence.prompt) + len(sequence.response):,} tokens")
                path = directory / f"{each.name}-{length}.json"
                at_length = _measured(observer, tokenizer, own, sequence, path)
                measured.setdefault(length, []).append(at_length)
    rows = (length_row(length, of, measured[0], own, observer.pool) for length, of in measured.items())
    return Lengths(analysis.names, tuple(rows))


@dataclass(frozen=True)
class Transcript:
    """A prompt and its response, as tokens."""

    name: str
    row: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """What the model reads: prompt has all before the response, of which the last `own` are its own prompt."""

    of: Transcript
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    own: int
    others: tuple[str, ...]


def sequence_of(of: Transcript, transcripts: Sequence[Transcript], length: int, least: int) -> Placed | None:
    """A response in `length` tokens; 0: as it was generated. None where fewer than `least` of its tokens would be left,
    or where the others are too short to fill the length without repeating one.
    """
    if length == 0:
        return Placed(of, of.prompt, of.response, len(of.prompt), ())
    room = length - len(of.prompt) - len(of.response)
    if room <= 0:
        response = of.response[: max(length - len(of.prompt), 0)]
        return Placed(of, of.prompt, response, len(of.prompt), ()) if len(response) >= least else None
    here = transcripts.index(of)
    parts, names = [], []
    for other in (*transcripts[here + 1 :], *transcripts[:here]):
        part = (*other.prompt, *other.response)[:room]
        parts.append(part)
        names.append(other.name)
        room -= len(part)
        if room == 0:
            before = tuple(token for part in reversed(parts) for token in part)
            return Placed(of, before + of.prompt, of.response, len(of.prompt), tuple(reversed(names)))
    return None


def length_row(
    length: int,
    measured: Sequence[AtLength],
    generated: Sequence[AtLength],
    config: AnalysisConfig,
    pool: Sequence[int],
) -> LengthRow:
    """The summary of responses at a length. generated: all as they were generated; pool: layers of the heads."""
    as_generated = {each.name: each.heads for each in generated}
    resamples, seed = config.table2.resamples, config.seed
    heads = summarize_heads(
        ((each.row, each.heads) for each in measured), pool_layers=tuple(pool), resamples=resamples, seed=seed
    )
    reaches = np.array([_sums(anchor.reach for anchor in each.anchors) for each in measured])
    at_anchors = np.array([_sums(each.tokens.fai[i] for i in each.peaks.fai) for each in measured]).sum(axis=0)
    of_all = np.array([_sums(each.tokens.fai) for each in measured]).sum(axis=0)
    with np.errstate(invalid="ignore"):
        reach, fai_anchors, fai = (float(np.divide(*of)) for of in (reaches.sum(axis=0), at_anchors, of_all))
    return LengthRow(
        length=length,
        responses=len(measured),
        tokens=float(np.mean([len(each.tokens.ids) for each in measured])),
        before=float(np.mean([each.before for each in measured])),
        table2=table2(
            ((each.tokens, each.peaks) for each in measured), config.table2, follow=config.peaks.follow, seed=seed
        ),
        local=heads.set("local").stability,
        global_=heads.set("global").stability,
        random=heads.set("global").stability_random,
        local_kept=_kept((each.heads.local, as_generated[each.name].local) for each in measured),
        global_kept=_kept((each.heads.global_, as_generated[each.name].global_) for each in measured),
        reach=reach,
        reach_interval=bootstrap(reaches, ratio(0, 1), resamples, np.random.default_rng([seed, 4])),
        fai_anchors=fai_anchors,
        fai=fai,
    )


def _transcripts(analysis: Analysis, tokenizer: Any, chat: bool) -> list[Transcript]:
    return [
        Transcript(each.name, each.row, tuple(prompt_ids_of(each, tokenizer, chat)), each.tokens.ids)
        for each in analysis.responses()
    ]


def _measured(observer: Observer, tokenizer: Any, config: AnalysisConfig, sequence: Placed, path: Path) -> AtLength:
    """The file's, if it is of this sequence, or a new one, which is written there."""
    before, length = len(sequence.prompt) - sequence.own, len(sequence.prompt) + len(sequence.response)
    if path.is_file():
        try:
            kept = read_json(AtLength, path)
        except ValueError:
            pass
        else:
            if (kept.others, kept.length, kept.tokens.ids) == (sequence.others, length, sequence.response):
                return kept
    seen = observe_response(observer, tokenizer, sequence.prompt, sequence.response, config, maps=False)
    at_length = AtLength(
        name=sequence.of.name,
        row=sequence.of.row,
        length=length,
        prompt=sequence.own,
        before=before,
        others=sequence.others,
        tokens=seen.tokens,
        peaks=seen.peaks,
        anchors=seen.anchors,
        heads=seen.heads,
    )
    write_json(at_length, path)
    return at_length


def _kept(pairs: Iterator[tuple[tuple[Head, ...], tuple[Head, ...]]]) -> float:
    return float(np.mean([len(set(one) & set(other)) / len(set(one) | set(other)) for one, other in pairs]))


def _sums(values: Any) -> tuple[float, int]:
    """(sum, number) of the defined values."""
    defined = [value for value in values if np.isfinite(value)]
    return sum(defined), len(defined)
