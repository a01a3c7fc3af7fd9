"""Several runs side by side: every method on every task, gains over GRPO, and their intervals over seeds."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import yaml

from rhythm.reports.curves import running_peak_average, task_metrics
from rhythm.reports.format import mean
from rhythm.reports.intervals import over_seeds
from rhythm.reports.methods import BASELINE, MethodRun, flat

At = Literal["final", "best", "peak"]
AVERAGE = "Avg."


@dataclass(frozen=True)
class Column:
    """A task of the tables: its name, the metric's name for a reader, and the key in metrics.jsonl."""

    task: str
    metric: str
    key: str


@dataclass(frozen=True)
class Cell:
    """A method on a task. value: the mean over seeds; low, high: its 95 % interval over seeds (t), NaN with one seed.

    gain: the mean difference to GRPO over the seeds that both have, or of the means where they share none, with the
    interval of the paired differences; NaN for GRPO itself. pairs: how many seeds both have.
    """

    value: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    pairs: int


@dataclass(frozen=True)
class Row:
    """A method: its seeds and a cell per column; the last is the average where there are several tasks."""

    method: str
    seeds: tuple[int | None, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Block:
    """Runs that differ in nothing but credit and seed, as the blocks of Table 4. title: what differs between blocks.

    best: of each column, the row of the highest value.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    best: tuple[int, ...]


def columns(runs: Sequence[MethodRun]) -> list[Column]:
    """The run's own task, then every further one: by avg@n where it has several responses per problem, else pass@1."""
    task_columns = []
    if any("accuracy" in record for run in runs for record in run.run.records):
        own = sorted({str(run.config.get("task.name", "held out")) for run in runs})
        task_columns.append(Column(" / ".join(own), "accuracy", "accuracy"))
    metrics = task_metrics([record for run in runs for record in run.run.records])
    return [*task_columns, *(Column(task, metric, f"{task}/{metric}") for task, metric in metrics.items())]


def series(run: MethodRun, key: str) -> list[tuple[float, float]]:
    """(step, value) of every evaluation that has the metric."""
    pairs = [(record["step"], record.get(key, math.nan)) for record in run.run.records]
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def value_of(run: MethodRun, key: str, at: At, peak_alpha: float) -> float:
    """The last value, the best, or the end of the running-peak average; NaN without any."""
    values = [value for _, value in series(run, key)]
    if not values:
        return math.nan
    if at == "best":
        return max(values)
    return values[-1] if at == "final" else running_peak_average(values, peak_alpha)[-1]


def blocks(
    runs: Sequence[MethodRun], wanted: Sequence[Column], *, at: At, peak_alpha: float, baseline: str, ablation: bool
) -> list[Block]:
    """The tables. `ablation`: methods by their names of Table 5; `baseline`: the method that gains are over."""
    tables = []
    for title in dict.fromkeys(run.block for run in runs):
        members = [run for run in runs if run.block == title]
        values: dict[str, dict[int | None, list[float]]] = {}
        for run in members:
            name = run.ablation if ablation else run.method
            numbers = [value_of(run, column.key, at, peak_alpha) for column in wanted]
            if len(numbers) > 1:
                numbers.append(sum(numbers) / len(numbers))
            values.setdefault(name, {})[run.seed] = numbers
        names = [column.task for column in wanted] + ([AVERAGE] if len(wanted) > 1 else [])
        rows = tuple(
            Row(
                name,
                tuple(seeds),
                tuple(
                    _cell(
                        {seed: numbers[place] for seed, numbers in seeds.items()},
                        {} if name == baseline else {s: n[place] for s, n in values.get(baseline, {}).items()},
                    )
                    for place in range(len(names))
                ),
            )
            for name, seeds in values.items()
        )
        best = [max((row.cells[place].value for row in rows), default=math.nan) for place in range(len(names))]
        where = tuple(
            next((i for i, row in enumerate(rows) if row.cells[place].value == top), -1)
            for place, top in enumerate(best)
        )
        tables.append(Block(title, tuple(names), rows, where))
    return tables


def _cell(own: Mapping[int | None, float], base: Mapping[int | None, float]) -> Cell:
    value = mean(list(own.values()))
    shared = [seed for seed in own if seed in base and seed is not None]
    differences = [own[seed] - base[seed] for seed in shared]
    gain = mean(differences) if differences else value - mean(list(base.values()))
    return Cell(value, *over_seeds(list(own.values())), gain, *over_seeds(differences), len(shared))


def baseline_of(runs: Sequence[MethodRun], asked: str | None) -> str:
    """The method that gains are over: the one asked for, or GRPO. Raises ValueError where none of the runs is it."""
    if asked is not None and asked not in {run.method for run in runs}:
        known = ", ".join(dict.fromkeys(run.method for run in runs))
        raise ValueError(f"baseline is {asked!r}: must be one of the methods {known}")
    return asked or BASELINE


def command_lines(runs: Sequence[MethodRun], config_name: str) -> list[tuple[str, str]]:
    """(run, command) that makes each again: runs from one configuration file, by `overrides` of the first's values."""
    first = first_configured(runs)
    lines = []
    for run in runs:
        if run.evaluated is not None:
            words = [f"{key}={_inline(value)}" for key, value in flat(run.evaluated)]
            lines.append((run.run.name, " ".join(["rhythm-eval", *map(shlex.quote, words)])))
            continue
        if first is None or not run.config:
            lines.append((run.run.name, "# config.yaml was not recorded"))
            continue
        changed = overrides(first.config, run.config)
        lines.append((run.run.name, " ".join(["rhythm-train", config_name, *map(shlex.quote, changed)])))
    return lines


def first_configured(runs: Sequence[MethodRun]) -> MethodRun | None:
    """The first run, not an evaluation, that recorded its configuration."""
    return next((run for run in runs if run.config and run.evaluated is None), None)


def overrides(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """`key=value` for every key that differs, values in YAML; a key that is gone is null."""
    return [
        f"{key}={_inline(after.get(key))}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key) and not (key not in after and before[key] in ({}, None))
    ]


def _inline(value: object) -> str:
    """YAML on one line: text as it stands where it is read back as the same text."""
    if isinstance(value, str):
        try:
            plain = yaml.safe_load(value) == value
        except yaml.YAMLError:
            plain = False
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)
