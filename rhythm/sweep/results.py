"""Results of a sweep as CSV: a row per run, and a row per evaluation of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from rhythm.reports.format import csv_text, mean
from rhythm.reports.run import load_run
from rhythm.sweep.config import PlannedRun
from rhythm.system.writing import replace_file

RUNS, CURVES = "runs.csv", "curves.csv"
FINAL_EVALUATIONS = 3


@dataclass(frozen=True)
class RunRow:
    """A finished run. start, best: accuracy before training, and the highest; final: mean of the last three
    evaluations. tokens: of all responses trained on. seconds: wall time, without the warm start. bonus_mass: mean γ − 1
    over the run's steps, NaN where no step has γ. commit: of the code; settings: `rhythm.sweep.config.fingerprint`.
    """

    method: str
    seed: int
    start: float
    best: float
    final: float
    steps: int
    tokens: int
    seconds: float
    bonus_mass: float
    commit: str
    settings: str


@dataclass(frozen=True)
class CurveRow:
    """An evaluation of a run. reward, entropy (nats per token), response_length (tokens): means over the training steps
    since the evaluation before; NaN before training.
    """

    method: str
    seed: int
    step: int
    accuracy: float
    reward: float
    entropy: float
    response_length: float


@dataclass(frozen=True)
class Results:
    """All that a sweep has measured so far, in the order in which its runs ended."""

    runs: tuple[RunRow, ...] = ()
    curves: tuple[CurveRow, ...] = ()

    def with_run(self, row: RunRow, curve: Sequence[CurveRow]) -> Results:
        """These results with one more run."""
        return Results((*self.runs, row), (*self.curves, *curve))

    def row(self, method: str, seed: int) -> RunRow | None:
        """The row of a run; None if it is not done."""
        return next((row for row in self.runs if (row.method, row.seed) == (method, seed)), None)


def measure(run: PlannedRun, commit: str) -> tuple[RunRow, list[CurveRow]]:
    """Reads a finished run's rows from its metrics.jsonl.

    Raises ValueError where it holds no evaluation or ends before the configured step.
    """
    records = load_run(run.config.run_dir).records
    evaluated = [record for record in records if math.isfinite(record.get("accuracy", math.nan))]
    last = int(records[-1]["step"])
    if not evaluated or last < run.config.steps:
        raise ValueError(f"{run.config.run_dir} ends at step {last} of {run.config.steps}: it is not finished")
    accuracies = [record["accuracy"] for record in evaluated]
    finals = [record["accuracy"] for record in evaluated if record["step"] > 0][-FINAL_EVALUATIONS:]
    row = RunRow(
        method=run.method,
        seed=run.seed,
        start=accuracies[0],
        best=max(accuracies),
        final=mean(finals),
        steps=last,
        tokens=round(math.fsum(_values(records, "response_tokens"))),
        seconds=math.fsum(_values(records, "seconds_total")),
        bonus_mass=mean(_values(records, "bonus_mass")),
        commit=commit,
        settings=run.settings,
    )
    curve, before = [], -1.0
    for record in evaluated:
        since = [other for other in records if before < other["step"] <= record["step"]]
        before = record["step"]
        means = {key: mean(_values(since, key)) for key in ("reward", "entropy", "response_length")}
        curve.append(CurveRow(run.method, run.seed, int(record["step"]), record["accuracy"], **means))
    return row, curve


def read_results(directory: Path) -> Results:
    """Reads the results in the directory; empty if it has no runs.csv.

    Raises ValueError for a file that write_results did not write, naming file, line and column.
    """
    if not (directory / RUNS).is_file():
        return Results()
    runs, curves = _read(directory / RUNS, RunRow), _read(directory / CURVES, CurveRow)
    done = {(row.method, row.seed) for row in runs}
    if len(done) < len(runs):
        raise ValueError(f"{directory / RUNS} has a method and seed twice: delete one of the rows")
    # curves.csv is written first: a sweep that died between the two runs that one again.
    return Results(tuple(runs), tuple(row for row in curves if (row.method, row.seed) in done))


def write_results(results: Results, directory: Path) -> None:
    """Writes both files, replacing old ones atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / CURVES, _csv(CurveRow, results.curves))
    replace_file(directory / RUNS, _csv(RunRow, results.runs))


def _values(records: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [record[key] for record in records if math.isfinite(record.get(key, math.nan))]


def _csv(kind: type[Any], rows: Sequence[Any]) -> str:
    names = [field.name for field in fields(kind)]
    return csv_text([names, *([getattr(row, name) for name in names] for row in rows)])


def _read(path: Path, kind: type[Any]) -> list[Any]:
    types = get_type_hints(kind)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if list(reader.fieldnames or []) != list(types):
                raise ValueError(f"{path} has the columns {reader.fieldnames}: must be {', '.join(types)}")
            rows = []
            for values in reader:
                row = {}
                for name, type_ in types.items():
                    try:
                        row[name] = type_(values[name])
                    except (TypeError, ValueError) as error:
                        raise ValueError(
                            f"{path}, line {reader.line_num}: {name} is {values[name]!r}, must be {type_.__name__}"
                        ) from error
                rows.append(kind(**row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as CSV: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing beside {RUNS}: restore it, or delete {RUNS} to run all again") from error
    return rows
