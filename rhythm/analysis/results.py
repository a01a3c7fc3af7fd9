"""What an analysis finds, as plain frozen dataclasses; to and from JSON (rhythm.analysis.rows: as frames).

Token indices count a response's tokens from 0, the prompt left out. A head is (layer, head). Undefined numbers
are NaN here, null in JSON and empty in CSV. Shapes: n tokens of a response, L layers, H query heads a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, TypeAdapter

from rhythm.system.writing import replace_file

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float; null in JSON is NaN."""
Numbers = tuple[Number, ...]
Head = tuple[int, int]
HeadMap = tuple[Numbers, ...]
"""[L][H]; NaN where a layer was not read."""
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a response; every field has n entries.

    Attributes:
        ids: in the tokenizer's vocabulary.
        texts: joined, they are the response; a token that ends inside a character has "".
        waad: tokens (eq. 9), mean over the local heads.
        fai: mean attention received within the horizon (eq. 10), mean over the global heads.
        fai_receiver: the same over the receiver heads (token level).
        entropy: nats, of the model's distribution at temperature 1 before the token.
        logprob: nats, of the token in that distribution.
        gamma: the factor that training would put on the token's advantage.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    waad: Numbers
    fai: Numbers
    fai_receiver: Numbers
    entropy: Numbers
    logprob: Numbers
    gamma: Numbers


@dataclass(frozen=True)
class Peaks:
    """Rising token indices of the peaks of four curves."""

    waad: tuple[int, ...]
    fai: tuple[int, ...]
    fai_receiver: tuple[int, ...]
    entropy: tuple[int, ...]


@dataclass(frozen=True)
class Attender:
    """A later token of the response that attends to an anchor; weight: mean over the global heads of A[t, s]."""

    token: int
    weight: float


@dataclass(frozen=True)
class Anchor:
    """A peak of FAI, and who attends to it, the strongest first."""

    token: int
    attenders: tuple[Attender, ...]


@dataclass(frozen=True)
class ResponseHeads:
    """Every head on one response, and the sets chosen from the pool.

    Attributes:
        span: [L][H] tokens (eq. 7).
        kurtosis: [L][H] excess kurtosis of the to-the-end column scores over the response's tokens.
        kurtosis_sentence: the same of scores between sentences, at least the minimum gap apart; NaN with too few.
        local, global_: the heads of the pool that look back the least and the furthest.
        receiver, receiver_sentence: those of largest kurtosis; as many as global ones, none where undefined.
        sentences: how many the response has.
    """

    span: HeadMap
    kurtosis: HeadMap
    kurtosis_sentence: HeadMap
    local: tuple[Head, ...]
    global_: tuple[Head, ...]
    receiver: tuple[Head, ...]
    receiver_sentence: tuple[Head, ...]
    sentences: int


@dataclass(frozen=True)
class AttentionMap:
    """A mean attention map (eq. 8) over the rows of a response, as `rhythm.analysis.maps.MeanMap` says; 4 digits.

    Attributes:
        weights: [R][C].
        cell: tokens a cell is high and wide.
        prompt_columns: columns that are the prompt's.
        band: [n][W], attention to the nearest W tokens; NaN before the sequence.
    """

    weights: tuple[Numbers, ...]
    cell: int
    prompt_columns: int
    band: tuple[Numbers, ...]


@dataclass(frozen=True)
class Maps:
    """The mean maps over the local and the global heads."""

    local: AttentionMap
    global_: AttentionMap


@dataclass(frozen=True)
class Trial:
    """A counterfactual: one token replaced, and a greedy continuation.

    Attributes:
        group: among the positions of highest or of lowest FAI.
        position: index of the replaced token.
        fai: of that token.
        original_token, replacement_token: texts; `*_id` in the vocabulary.
        candidate: rank of the replacement in the model's distribution there, 1 is the likeliest.
        probability: of the replacement there.
        jaccard: overlap of the content words after the position, original and continued (eq. 11); NaN where
            neither has one.
        continuation: text after the replacement.
        finished: the continuation ended by itself.
    """

    group: Literal["top", "bottom"]
    position: int
    fai: float
    original_id: int
    original_token: str
    replacement_id: int
    replacement_token: str
    candidate: int
    probability: float
    jaccard: Number
    continuation: str
    finished: bool


@dataclass(frozen=True)
class ResponseResult:
    """All that was found in one response.

    Attributes:
        name: "00012-0": row and sample.
        row: of the file of problems, from 1; sample: which of its responses, from 0.
        source: the response was in the file, or generated.
        finished: it ended by itself, rather than at the limit; None where it was given.
        prompt: as the model got it; prompt_tokens: how many.
        answer: the row's own, if it has one.
        chunks: index of the first token of each chunk: 0, and the peaks of WAAD.
        anchors: the peaks of FAI, the strongest `attended_anchors` of them with attenders.
        maps: None if they were not asked for.
        trials: empty if counterfactuals were not asked for.
        digest: of the row's prompt and, where given, response; a changed row is told by it.
    """

    name: str
    row: int
    sample: int
    source: Literal["given", "generated"]
    finished: bool | None
    prompt: str
    prompt_tokens: int
    response: str
    answer: str | None
    tokens: Tokens
    peaks: Peaks
    chunks: tuple[int, ...]
    anchors: tuple[Anchor, ...]
    heads: ResponseHeads
    maps: Maps | None = None
    trials: tuple[Trial, ...] = ()
    digest: str = ""

    def after(self, position: int) -> str:
        """The response's text after the token at `position`."""
        return "".join(self.tokens.texts[position + 1 :])


@dataclass(frozen=True)
class Interval:
    """A 95 % interval; NaN where there are too few responses for one."""

    low: Number
    high: Number


@dataclass(frozen=True)
class Table1:
    """Counterfactuals. A problem counts where both groups have a defined Jaccard index.

    Attributes:
        top, bottom: mean Jaccard index of the trials at the highest and lowest FAI.
        top_below_bottom: share of the problems whose mean over the top is lower than that over the bottom.
        p_value: of a sign test over the problems, one-sided: top lower than bottom.
        problems, top_trials, bottom_trials: how many there are.
    """

    top: Number
    top_interval: Interval
    bottom: Number
    bottom_interval: Interval
    top_below_bottom: Number
    p_value: Number
    problems: int
    top_trials: int
    bottom_trials: int


@dataclass(frozen=True)
class Table2Row:
    """A coupling of two signals, over all responses.

    Attributes:
        key: entropy: mean entropy at peaks of WAAD, nats. cooccurrence: share of the receiver heads' FAI peaks that
            are the global heads' too. follows: share of FAI peaks at a peak of WAAD or up to `follow` tokens after.
        observed, interval: the statistic, and its bootstrap interval over responses.
        random: the paper's closed form: mean entropy of all tokens; share of tokens that are global FAI peaks;
            share of tokens at or just after a peak of WAAD.
        lift, lift_interval: observed / random − 1.
        permuted, permuted_lift: mean over the permutations of the first signal's peaks, and the lift over it.
        p_value: share of the permutations, the observed one included, that reach the observed statistic.
        peaks: how many the statistic is over; responses: how many have some.
    """

    key: Literal["entropy", "cooccurrence", "follows"]
    observed: Number
    interval: Interval
    random: Number
    lift: Number
    lift_interval: Interval
    permuted: Number
    permuted_lift: Number
    p_value: Number
    peaks: int
    responses: int

    @property
    def name(self) -> str:
        return TABLE2_NAMES[self.key]


TABLE2_NAMES = {
    "entropy": "Average entropy of the WAAD peaks",
    "cooccurrence": "FAI peaks of receiver and global heads co-occur",
    "follows": "FAI peak follows or coincides with WAAD peak",
}


@dataclass(frozen=True)
class SetSummary:
    """One of the sets of heads, over all responses.

    Attributes:
        name: local, global, receiver or receiver_sentence.
        heads: chosen by the mean span or kurtosis over the responses.
        chosen: [L][H] share of the responses whose own set has the head; NaN outside the pool.
        stability: mean share of a set that the sets of two different problems have in common.
        stability_random: the same for sets drawn at random from the pool.
        responses: how many have such a set.
    """

    name: Literal["local", "global", "receiver", "receiver_sentence"]
    heads: tuple[Head, ...]
    chosen: HeadMap
    stability: Number
    stability_random: Number
    responses: int


@dataclass(frozen=True)
class Overlap:
    """How much of a response's receiver set is in its global set, mean over the responses.

    random: expected of a random set of the pool; pooled: that of the sets chosen by the means.
    """

    name: Literal["receiver", "receiver_sentence"]
    share: Number
    interval: Interval
    random: Number
    pooled: Number


@dataclass(frozen=True)
class Heads:
    """Every head of the model, over all responses.

    Attributes:
        layers, heads: L and H; pool_layers: those whose heads form the pool.
        span, kurtosis, kurtosis_sentence: [L][H] means over the responses where defined.
        sets: local, global, receiver, receiver_sentence.
        overlaps: receiver and receiver_sentence with global.
    """

    layers: int
    heads: int
    pool_layers: tuple[int, ...]
    span: HeadMap
    kurtosis: HeadMap
    kurtosis_sentence: HeadMap
    sets: tuple[SetSummary, ...]
    overlaps: tuple[Overlap, ...]

    def set(self, name: str) -> SetSummary:
        """The set of that name."""
        return next(each for each in self.sets if each.name == name)


@dataclass(frozen=True)
class Analysis:
    """Everything of a run but its responses, which stay on disk and are read one at a time.

    Attributes:
        model: its directory or name; problems: the file, or "" for a list.
        settings: AnalysisConfig as JSON.
        names: of the responses, in the order of the file.
        failures: messages of rows that could not be analysed.
        table1: None without counterfactuals.
        table2: entropy, cooccurrence, follows.
        directory: where it all is; not part of the JSON.
    """

    model: str
    problems: str
    settings: dict[str, Any]
    names: tuple[str, ...]
    failures: tuple[str, ...]
    heads: Heads
    table1: Table1 | None
    table2: tuple[Table2Row, ...]
    directory: Path = Path()

    @property
    def p_floor(self) -> float:
        """The least p-value that Table 2's permutations can give, the observed one being one of them; 0 if unknown."""
        table2 = self.settings.get("table2")
        return 1 / (1 + int(table2["permutations"])) if table2 else 0.0

    def response(self, name: str) -> ResponseResult:
        """Read one response back."""
        return read_json(ResponseResult, response_path(self.directory, name))

    def responses(self) -> Iterator[ResponseResult]:
        """All responses, one at a time in memory."""
        return map(self.response, self.names)


def response_path(directory: Path, name: str) -> Path:
    return directory / "responses" / f"{name}.json"


def write_json(value: Any, path: Path) -> None:
    """Write a dataclass of this module, replacing the file in one go. Raises OSError naming the file."""
    exclude = {"directory"} if isinstance(value, Analysis) else None
    replace_file(path, TypeAdapter(type(value)).dump_json(value, exclude=exclude))


def read_json(kind: type[T], path: Path) -> T:
    """Read back what `write_json` wrote. Raises ValueError naming the file where it is something else."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind.__name__} of this version: {error}") from error


def read_analysis(directory: Path) -> Analysis:
    """The analysis in a directory that rhythm-analyze wrote."""
    return replace(read_json(Analysis, directory / "results.json"), directory=directory)
