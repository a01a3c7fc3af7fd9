"""From the responses on disk to heads, tables, results.json and the CSV files; one response in memory at a time."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.heads import summarize_heads
from rhythm.analysis.results import Analysis, ResponseResult, read_json, response_path, write_json
from rhythm.analysis.rows import head_rows, not_run, response_row, table1_row, table2_rows, token_rows, trial_rows
from rhythm.analysis.table1 import table1
from rhythm.analysis.table2 import table2
from rhythm.system.writing import naming, replacing


def summarize(
    directory: Path,
    *,
    model: str,
    problems: str,
    names: Sequence[str],
    failures: Sequence[str],
    config: AnalysisConfig,
    pool_layers: Sequence[int],
) -> Analysis:
    """Writes results.json and the CSV files of the responses `names`, in that order, and returns the analysis.

    Raises:
        ValueError: no names, or a response that is not what this version writes.
    """

    def responses() -> Iterable[ResponseResult]:
        return (read_json(ResponseResult, response_path(directory, name)) for name in names)

    couplings = table2(
        ((each.tokens, each.peaks) for each in responses()),
        config.table2,
        follow=config.peaks.follow,
        seed=config.seed,
    )
    resamples = config.table2.resamples
    analysis = Analysis(
        model=model,
        problems=problems,
        settings=config.model_dump(mode="json"),
        names=tuple(names),
        failures=tuple(failures),
        heads=summarize_heads(
            ((each.row, each.heads) for each in responses()),
            pool_layers=tuple(pool_layers),
            resamples=resamples,
            seed=config.seed,
        ),
        table1=None
        if config.counterfactuals is None
        else table1((each.trials for each in responses()), resamples=resamples, seed=config.seed),
        table2=couplings,
        directory=directory,
    )
    write_json(analysis, directory / "results.json")
    _write_csv(directory / "heads.csv", head_rows(analysis.heads))
    _write_csv(directory / "table2.csv", table2_rows(analysis.table2))
    _write_csv(directory / "tokens.csv", (row for each in responses() for row in token_rows(each)))
    _write_csv(directory / "responses.csv", (response_row(each) for each in responses()))
    if analysis.table1 is not None:
        _write_csv(directory / "table1.csv", [table1_row(analysis.table1)])
        _write_csv(directory / "counterfactuals.csv", (row for each in responses() for row in trial_rows(each)))
    return analysis


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line a row, NaN left empty, text as `not_run`; the first row has the columns. Without rows an empty file."""
    aside = path.with_name(f".{path.name}.part")
    with naming(path), replacing(aside, path), aside.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else not_run(value)
