"""Converts an analysis to rows: dictionaries for its CSV files, and pandas frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rhythm.analysis.response import Numbers, ResponseResult
from rhythm.analysis.results import Analysis, Heads, Table1, Table2Row

if TYPE_CHECKING:
    import pandas as pd


def table1_frame(analysis: Analysis) -> pd.DataFrame:
    """Table 1 as one row; empty without counterfactuals."""
    return _frame([] if analysis.table1 is None else [table1_row(analysis.table1)])


def table2_frame(analysis: Analysis) -> pd.DataFrame:
    """One row per coupling."""
    return _frame(table2_rows(analysis.table2))


def heads_frame(analysis: Analysis) -> pd.DataFrame:
    """One row per head: layer, head, span, kurtoses, membership in each set, fraction of responses that chose it."""
    return _frame(head_rows(analysis.heads))


def tokens_frame(analysis: Analysis) -> pd.DataFrame:
    """One row per token of all responses; see `token_rows`."""
    return _frame(row for response in analysis.responses() for row in token_rows(response))


def trials_frame(analysis: Analysis) -> pd.DataFrame:
    """One row per counterfactual of all responses."""
    return _frame(row for response in analysis.responses() for row in trial_rows(response))


def responses_frame(analysis: Analysis) -> pd.DataFrame:
    """One row per response: its sizes, peak counts and means."""
    return _frame(response_row(response) for response in analysis.responses())


def table1_row(table: Table1) -> dict[str, Any]:
    """Table 1 as a row; an interval becomes two columns."""
    return _flat(table)


def table2_rows(rows: Iterable[Table2Row]) -> Iterator[dict[str, Any]]:
    """One dictionary per coupling."""
    return ({"name": row.name, **_flat(row)} for row in rows)


def token_rows(response: ResponseResult) -> Iterator[dict[str, Any]]:
    """One dictionary per token: response, row, sample, token, id, text, signals, and whether it is a peak or onset."""
    tokens, peaks = response.tokens, response.peaks
    marks = {f"{name}_peak": set(indices) for name, indices in vars(peaks).items()} | {"chunk": set(response.chunks)}
    signals = ("waad", "fai", "fai_receiver", "entropy", "logprob", "gamma")
    for i, (token_id, text) in enumerate(zip(tokens.ids, tokens.texts, strict=True)):
        yield {
            "response": response.name,
            "row": response.row,
            "sample": response.sample,
            "token": i,
            "id": token_id,
            "text": text,
            **{name: getattr(tokens, name)[i] for name in signals},
            **{name: i in indices for name, indices in marks.items()},
        }


def trial_rows(response: ResponseResult) -> Iterator[dict[str, Any]]:
    """One dictionary per counterfactual, with the original text after the position; none as long as they are not
    done.
    """
    for trial in response.trials or ():
        yield {
            "response": response.name,
            "row": response.row,
            "sample": response.sample,
            **asdict(trial),
            "original": response.after(trial.position),
        }


def head_rows(heads: Heads) -> Iterator[dict[str, Any]]:
    """One dictionary per head of the model."""
    members = {summary.name: set(summary.heads) for summary in heads.sets}
    more = {"entropy": heads.entropy, "sink_mass": heads.sink_mass, "prompt_mass": heads.prompt_mass}
    more = {name: of_heads for name, of_heads in more.items() if of_heads}
    for layer in range(heads.layers):
        for head in range(heads.heads):
            yield {
                "layer": layer,
                "head": head,
                "pool": layer in heads.pool_layers,
                "span": heads.span[layer][head],
                "kurtosis": heads.kurtosis[layer][head],
                "kurtosis_sentence": heads.kurtosis_sentence[layer][head],
                **{name: of_heads[layer][head] for name, of_heads in more.items()},
                **{name: (layer, head) in those for name, those in members.items()},
                **{f"{summary.name}_chosen": summary.chosen[layer][head] for summary in heads.sets},
            }


def response_row(response: ResponseResult) -> dict[str, Any]:
    """Sizes, counts of peaks, and means of a response."""
    tokens = response.tokens
    return {
        "response": response.name,
        "row": response.row,
        "sample": response.sample,
        "source": response.source,
        "finished": response.finished,
        "prompt_tokens": response.prompt_tokens,
        "tokens": len(tokens.ids),
        "sentences": response.heads.sentences,
        "chunks": len(response.chunks),
        **{f"{name}_peaks": len(indices) for name, indices in vars(response.peaks).items()},
        **{f"{name}_mean": _mean(getattr(tokens, name)) for name in ("waad", "fai", "entropy", "gamma")},
    }


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows))


def _mean(values: Numbers) -> float:
    """Mean of the defined values; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _flat(table: Table1 | Table2Row) -> dict[str, Any]:
    """The fields of a dataclass; an interval becomes two entries."""
    flat: dict[str, Any] = {}
    for name, field in vars(table).items():
        if is_dataclass(field):
            flat |= {f"{name}_{part}": value for part, value in vars(field).items()}
        else:
            flat[name] = field
    return flat
