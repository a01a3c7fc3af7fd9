"""The results of an analysis over all responses as frozen dataclasses, stored as JSON (`rhythm.analysis.rows` converts
them to frames). Those of one response are `rhythm.analysis.response`'s, which has the conventions, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from rhythm.analysis.response import Head, HeadMap, Number, ResponseResult
from rhythm.system.writing import replace_file

T = TypeVar("T")
RESULTS, PARTIAL = "results.json", "partial.json"


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
class SoFar:
    """How far an analysis is that has not finished.

    Attributes:
        responses: number of responses of the whole analysis; `Analysis.names` are those that are measured.
        counterfactuals: those whose counterfactuals are done, which Table 1 is about; None if none were requested.
    """

    responses: int
    counterfactuals: int | None


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis. Its responses stay on disk and are read one at a time.

    Attributes:
        model: directory or name of the model; problems: the file, or "" for a list.
        settings: AnalysisConfig as JSON.
        names: names of the responses, in the order of the file.
        failures: error messages of rows that could not be analyzed.
        table1: None without counterfactuals, or as long as those of no response are done.
        table2: rows entropy, cooccurrence, follows.
        so_far: how many of the responses these results are about, as long as the analysis has not finished; then None
            and not in the JSON.
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
    so_far: SoFar | None = None
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


def is_complete(path: Path) -> bool:
    """Whether the file of a response lacks nothing, judged without reading all of it as JSON."""
    return b'"trials":null' not in path.read_bytes()  # in a text the quotation marks are escaped


def write_json(value: Any, path: Path) -> None:
    """Write one of these dataclasses, replacing the file atomically. Raises OSError naming the file."""
    exclude = None
    if isinstance(value, Analysis):
        exclude = {"directory"} if value.so_far else {"directory", "so_far"}
    replace_file(path, TypeAdapter(type(value)).dump_json(value, exclude=exclude))


def read_json(kind: type[T], path: Path) -> T:
    """Read what `write_json` wrote. Raises ValueError naming the file if it contains anything else."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind.__name__} of this version: {error}") from error


def read_analysis(directory: Path, *, partial: bool = False) -> Analysis:
    """The analysis in a directory that rhythm-analyze wrote; with `partial` what is there of one that has not finished
    (`so_far` says how much).

    Raises FileNotFoundError if the directory has no such results.
    """
    return replace(read_json(Analysis, directory / (PARTIAL if partial else RESULTS)), directory=directory)
