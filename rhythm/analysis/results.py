"""The results of an analysis as frozen dataclasses, stored as JSON (rhythm.analysis.rows converts them to frames).

Token indices count from the response's first token, 0. A head is (layer, head). Undefined numbers are NaN here, null in
JSON and empty in CSV. Shapes: n tokens of a response, L layers, H query heads per layer.
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
"""A float; NaN is null in JSON."""
Numbers = tuple[Number, ...]
Head = tuple[int, int]
HeadMap = tuple[Numbers, ...]
"""[L][H]; NaN for layers that were not read."""
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a response; every field has n entries.

    Attributes:
        ids: in the tokenizer's vocabulary.
        texts: joined, they are the response; a token that ends within a character has "".
        waad: windowed average attention distance, tokens (eq. 9), mean over the local heads.
        fai: future attention influence, mean attention received within the horizon (eq. 10), mean over the global
            heads.
        fai_receiver: FAI over the receiver heads (token level).
        entropy: of the model's distribution for the token at temperature 1, nats.
        logprob: of the token in that distribution, nats.
        gamma: factor that training would apply to the token's advantage.
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
    """Token indices of the peaks of four curves, ascending."""

    waad: tuple[int, ...]
    fai: tuple[int, ...]
    fai_receiver: tuple[int, ...]
    entropy: tuple[int, ...]


@dataclass(frozen=True)
class Attender:
    """A later token of the response that attends to an anchor. weight: mean of A[t, s] over the global heads."""

    token: int
    weight: float


@dataclass(frozen=True)
class Anchor:
    """A peak of FAI and the tokens that attend to it, the strongest first.

    reach: mean distance, in tokens, at which later tokens of the response attend to it, weighted by their attention,
    over the global heads; NaN where attenders were not asked for.
    """

    token: int
    attenders: tuple[Attender, ...]
    reach: Number = math.nan


@dataclass(frozen=True)
class ResponseHeads:
    """Statistics of all heads on one response, and the sets chosen from the pool.

    Attributes:
        span: [L][H] tokens (eq. 7).
        kurtosis: [L][H] excess kurtosis of the to-the-end column scores over the response's tokens.
        kurtosis_sentence: [L][H] excess kurtosis of scores between sentences at least the minimum gap apart; NaN with
            too few sentences.
        local, global_: heads of the pool with the smallest and the largest span.
        receiver, receiver_sentence: heads of the pool with the largest kurtosis; by default as many as global heads,
            none where it is undefined.
        sentences: number of sentences in the response.
        entropy: [L][H] entropy of a row's attention, nats; sink_mass, prompt_mass: [L][H] the share of it on the first
            four tokens and on the prompt. Means over the response's rows; empty in results of earlier versions.
    """

    span: HeadMap
    kurtosis: HeadMap
    kurtosis_sentence: HeadMap
    local: tuple[Head, ...]
    global_: tuple[Head, ...]
    receiver: tuple[Head, ...]
    receiver_sentence: tuple[Head, ...]
    sentences: int
    entropy: HeadMap = ()
    sink_mass: HeadMap = ()
    prompt_mass: HeadMap = ()


@dataclass(frozen=True)
class AttentionMap:
    """A mean attention map (eq. 8) over the rows of a response, rounded to 4 digits; see
    `rhythm.analysis.maps.MeanMap`.

    Attributes:
        weights: [R][C].
        cell: height and width of a cell in tokens.
        prompt_columns: number of columns of the prompt.
        band: [n][W], attention to the nearest W tokens; NaN before the start of the sequence.
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
        group: whether the position is among those of highest (top) or lowest (bottom) FAI, or among those of low FAI
            nearest to the highest ones (matched).
        position: index of the replaced token.
        fai: FAI of the replaced token.
        original_token, replacement_token: texts of the two tokens; `*_id`: their ids.
        candidate: rank of the replacement in the model's distribution at this position; 1 is the most likely.
        probability: probability of the replacement at this position.
        jaccard: Jaccard index of the content words after the position, of original and continuation (eq. 11); NaN if
            neither has any.
        continuation: text after the replacement.
        finished: whether the continuation ended with an end token.
    """

    group: Literal["top", "bottom", "matched"]
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
    """The results for one response.

    Attributes:
        name: row and sample, for example "00012-0".
        row: row in the file of problems, from 1; sample: index of the response, from 0.
        source: whether the response was given in the file or generated.
        finished: whether it ended with an end token, not at the limit; None if it was given.
        prompt: the text given to the model; prompt_tokens: its number of tokens.
        answer: as in the row, if it has one.
        chunks: index of the first token of each chunk: 0 and the peaks of WAAD.
        anchors: the peaks of FAI; the strongest `attended_anchors` ones have attenders.
        maps: None if they were not requested.
        trials: empty if counterfactuals were not requested.
        digest: hash of the row's prompt and given response, to detect changed rows.
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
    """A 95 % interval; NaN if there are too few responses."""

    low: Number
    high: Number


@dataclass(frozen=True)
class Table1:
    """Counterfactuals. A problem counts where both groups have a defined Jaccard index.

    Attributes:
        top, bottom: mean Jaccard index of the trials at the highest and lowest FAI.
        top_below_bottom: fraction of problems whose mean over the top is lower than that over the bottom.
        p_value: of a one-sided sign test over the problems (top lower than bottom).
        problems, top_trials, bottom_trials: numbers of them.
        matched, matched_interval, top_below_matched, matched_p_value, matched_trials: the same for tokens of low FAI
            nearest to those of the highest, a control for position; NaN and 0 without such trials.
        top_position, bottom_position, matched_position: mean index of the replaced tokens, over the trials.
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
    matched: Number = math.nan
    matched_interval: Interval = Interval(math.nan, math.nan)
    top_below_matched: Number = math.nan
    matched_p_value: Number = math.nan
    matched_trials: int = 0
    top_position: Number = math.nan
    bottom_position: Number = math.nan
    matched_position: Number = math.nan


@dataclass(frozen=True)
class Table2Row:
    """A coupling of two signals, over all responses.

    Attributes:
        key: entropy: mean entropy at peaks of WAAD, nats. cooccurrence: fraction of the receiver heads' FAI peaks that
            are also peaks of the global heads. follows: fraction of FAI peaks at a peak of WAAD or up to `follow`
            tokens after one.
        observed, interval: the statistic and its bootstrap interval over responses.
        random: the paper's closed form: mean entropy of all tokens; fraction of tokens that are global FAI peaks;
            fraction of tokens at or just after a peak of WAAD.
        lift, lift_interval: observed / random − 1.
        permuted, permuted_lift: mean over the permutations of the first signal's peaks, and the lift over it.
        p_value: fraction of the permutations, including the observed order, that reach the observed statistic.
        peaks: number of peaks in the statistic; responses: number of responses with peaks.
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
    """A set of heads over all responses.

    Attributes:
        name: local, global, receiver or receiver_sentence.
        heads: chosen by the mean span or kurtosis over the responses.
        chosen: [L][H] fraction of responses whose own set contains the head; NaN outside the pool.
        stability: mean |A∩B| / |A| over the sets A, B of different problems.
        stability_random: its expected value for sets drawn at random from the pool.
        responses: number of responses with such a set.
    """

    name: Literal["local", "global", "receiver", "receiver_sentence"]
    heads: tuple[Head, ...]
    chosen: HeadMap
    stability: Number
    stability_random: Number
    responses: int


@dataclass(frozen=True)
class Overlap:
    """Fraction of a response's receiver heads that are also global heads, averaged over the responses.

    random: expected value for a random set of the pool; pooled: the fraction for the sets chosen by the means.
    """

    name: Literal["receiver", "receiver_sentence"]
    share: Number
    interval: Interval
    random: Number
    pooled: Number


@dataclass(frozen=True)
class Heads:
    """Statistics of all heads of the model over all responses.

    Attributes:
        layers, heads: L and H; pool_layers: layers whose heads form the pool.
        span, kurtosis, kurtosis_sentence, entropy, sink_mass, prompt_mass: [L][H] means over the responses where they
            are defined; the last three may be empty.
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
    entropy: HeadMap = ()
    sink_mass: HeadMap = ()
    prompt_mass: HeadMap = ()

    def set(self, name: str) -> SetSummary:
        """The set with this name."""
        return next(summary for summary in self.sets if summary.name == name)


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis. Its responses stay on disk and are read one at a time.

    Attributes:
        model: directory or name of the model; problems: the file, or "" for a list.
        settings: AnalysisConfig as JSON.
        names: names of the responses, in the order of the file.
        failures: error messages of rows that could not be analyzed.
        table1: None without counterfactuals.
        table2: rows entropy, cooccurrence, follows.
        directory: directory of the analysis; not part of the JSON.
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
        """The smallest p-value that Table 2's permutations, including the observed order, can give; 0 if unknown."""
        table2 = self.settings.get("table2")
        return 1 / (1 + int(table2["permutations"])) if table2 else 0.0

    def response(self, name: str) -> ResponseResult:
        """Read one response from disk."""
        return read_json(ResponseResult, response_path(self.directory, name))

    def responses(self) -> Iterator[ResponseResult]:
        """All responses, one at a time in memory."""
        return map(self.response, self.names)


def response_path(directory: Path, name: str) -> Path:
    return directory / "responses" / f"{name}.json"


def write_json(value: Any, path: Path) -> None:
    """Write a dataclass of this module, replacing the file atomically. Raises OSError naming the file."""
    exclude = {"directory"} if isinstance(value, Analysis) else None
    replace_file(path, TypeAdapter(type(value)).dump_json(value, exclude=exclude))


def read_json(kind: type[T], path: Path) -> T:
    """Read what `write_json` wrote. Raises ValueError naming the file if it contains anything else."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind.__name__} of this version: {error}") from error


def read_analysis(directory: Path) -> Analysis:
    """The analysis in a directory that rhythm-analyze wrote."""
    return replace(read_json(Analysis, directory / "results.json"), directory=directory)
