"""Computes heads and tables from the responses on disk, with one in memory, and writes results.json and CSV files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.heads import summarize_heads
from rhythm.analysis.response import ResponseResult
from rhythm.analysis.results import PARTIAL, RESULTS, Analysis, SoFar, read_json, response_path, write_json
from rhythm.analysis.rows import head_rows, response_row, table1_row, table2_rows, token_rows, trial_rows
from rhythm.analysis.table1 import table1
from rhythm.analysis.table2 import table2
from rhythm.reports.format import not_run, write_csv
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
    of: int | None = None,
) -> Analysis:
    """The results for the responses `names`, in that order; nothing is written.

    Args:
        of: number of responses of the whole analysis if it has not finished. A statistic is then about the responses
            that have what it needs, and `so_far` says how many.

    Raises:
        ValueError: no names, or a file of another version.
    """

    def responses() -> Iterable[ResponseResult]:
        return (read_json(ResponseResult, response_path(directory, name)) for name in names)

    couplings = table2(
        ((response.tokens, response.peaks) for response in responses()),
        config.table2,
        follow=config.peaks.follow,
        seed=config.seed,
    )
    resamples = config.table2.resamples
    done = 0  # responses whose counterfactuals are done
    if config.counterfactuals is not None:
        done = len(names) if of is None else sum(response.complete for response in responses())
    return Analysis(
        model=model,
        problems=problems,
        settings=config.model_dump(mode="json"),
        names=tuple(names),
        failures=tuple(failures),
        heads=summarize_heads(
            ((response.row, response.heads) for response in responses()),
            pool_layers=tuple(pool_layers),
            resamples=resamples,
            seed=config.seed,
        ),
        table1=table1(
            (response.trials for response in responses() if response.trials is not None),
            resamples=resamples,
            seed=config.seed,
        )
        if done
        else None,
        table2=couplings,
        so_far=None if of is None else SoFar(of, None if config.counterfactuals is None else done),
        directory=directory,
    )


def write_results(analysis: Analysis) -> None:
    """Write results.json and the CSV files of a finished analysis into its directory.

    Raises OSError naming the file.
    """
    directory, responses = analysis.directory, analysis.responses
    write_json(analysis, directory / RESULTS)
    (directory / PARTIAL).unlink(missing_ok=True)
    write_rows(directory / "heads.csv", head_rows(analysis.heads))
    write_rows(directory / "table2.csv", table2_rows(analysis.table2))
    write_rows(directory / "tokens.csv", (row for response in responses() for row in token_rows(response)))
    write_rows(directory / "responses.csv", (response_row(response) for response in responses()))
    if analysis.table1 is not None:
        write_rows(directory / "table1.csv", [table1_row(analysis.table1)])
        trials = (row for response in responses() for row in trial_rows(response))
        write_rows(directory / "counterfactuals.csv", trials)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line per row, with NaN empty and text escaped by `not_run`; the first row defines the columns. Without rows
    the file is empty.
    """

    def cells() -> Iterator[Iterable[Any]]:
        for number, row in enumerate(rows):
            if number == 0:
                yield row.keys()
            yield map(_cell, row.values())

    aside = path.with_name(f".{path.name}.part")
    with naming(path), replacing(aside, path), aside.open("w", encoding="utf-8", newline="") as file:
        write_csv(file, cells())


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else not_run(value)
