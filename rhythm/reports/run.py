"""Writes runs/<name>/report.html: a single file that needs neither network nor other files.

It shows headline numbers, curves, and sampled responses whose tokens are colored by WAAD, FAI, γ or entropy. A metric
that the run did not record has no curve; a token whose signal is undefined is hatched.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from rhythm.reports.curves import (
    FURTHER_CURVES,
    MAIN_CURVES,
    CurveSpec,
    Record,
    draw_curves,
    draw_seconds,
    running_peak_average,
    task_metrics,
)
from rhythm.reports.format import format_number, format_percent, template_environment, token_strengths
from rhythm.reports.intervals import difference, wilson
from rhythm.system.writing import replace_file

__all__ = ["Run", "headlines", "load_run", "running_peak_average", "write_report"]

PEAK_ALPHA = 0.3  # weight of a new peak in the running-peak average
MAX_SAMPLE_STEPS = 6  # evenly spaced over the run, including the first and the last
MAX_SAMPLES_PER_STEP = 6
MAX_TOKENS_PER_SAMPLE = 2000
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Signal:
    """A signal of the tokens. key: in the samples; variable: the CSS variable that holds the color strength; low: where
    the color scale begins (None: at the response's smallest value).
    """

    key: str
    name: str
    variable: str
    meaning: str
    low: float | None = None


SIGNALS = (
    Signal(
        "waad",
        "WAAD",
        "--w",
        "windowed average attention distance: how far back the local heads attend, in tokens, clipped at the window",
    ),
    Signal(
        "fai",
        "FAI",
        "--f",
        "future attention influence: mean attention that later tokens pay to the token, in the global heads",
    ),
    Signal("gamma", "γ", "--g", "factor on the token's advantage; 1 is no amplification", low=1.0),
    Signal("entropy", "entropy", "--e", "entropy of the distribution the token was sampled from, in nats"),
)


@dataclass(frozen=True)
class Run:
    """A run as read from disk. `records`: one per step, in order; `samples`: step → its sampled responses."""

    name: str
    config: str | None
    records: tuple[Record, ...]
    samples: Mapping[int, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Headline:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Token:
    """A token of a response: its text, CSS variables of its defined signals, and the numbers of its tooltip."""

    text: str
    style: str
    numbers: str
    breaks: bool


@dataclass(frozen=True)
class Response:
    prompt: str
    outcome: str
    correct: bool | None
    tokens: tuple[Token, ...]
    hidden_tokens: int


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html from config.yaml, metrics.jsonl and samples/step_*.jsonl; returns its path.

    Raises:
        ValueError: run_dir has no metrics, or one of its files is not what the trainer writes.
    """
    page = render(load_run(run_dir))
    path = run_dir / "report.html"
    replace_file(path, page.encode("utf-8", "replace"))  # a sample may hold half of a surrogate pair
    return path


def load_run(run_dir: Path) -> Run:
    """Reads a run's directory; config.yaml and samples/ may be missing.

    Raises:
        ValueError: no metrics.jsonl, no step in it, or a line that is not an object with a step.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"run_dir is {run_dir}, which has no metrics.jsonl; give the directory of a run")
    # A resumed run may write a step again: use the later line.
    by_step = {int(row["step"]): _numbers(row) for row in _json_lines(metrics)}
    if not by_step:
        raise ValueError(f"run_dir is {run_dir}, whose metrics.jsonl is empty: no step has finished")
    config = run_dir / "config.yaml"
    return Run(
        name=run_dir.resolve().name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        records=tuple(by_step[step] for step in sorted(by_step)),
        samples=_load_samples(run_dir / "samples"),
    )


def render(run: Run) -> str:
    """The page of a run as HTML."""
    environment = template_environment(TEMPLATES)
    further_tasks = [
        CurveSpec(f"{task}/{metric}", f"{task}, {metric}", percent=True, peak=True)
        for task, metric in task_metrics(run.records).items()
    ]
    curves = draw_curves(run.records, [MAIN_CURVES[0], *further_tasks, *MAIN_CURVES[1:]], PEAK_ALPHA)
    seconds = draw_seconds(run.records)
    sampled = {
        step: [_response(row) for row in run.samples[step][:MAX_SAMPLES_PER_STEP]]
        for step in _evenly(sorted(run.samples), MAX_SAMPLE_STEPS)
    }
    return environment.get_template("report.html.j2").render(
        run=run,
        headlines=headlines(run.records),
        curves=[*curves, seconds] if seconds else curves,
        further_curves=draw_curves(run.records, FURTHER_CURVES, PEAK_ALPHA),
        peak_alpha=PEAK_ALPHA,
        signals=SIGNALS,
        sampled=sampled,
    )


def headlines(records: Sequence[Record]) -> list[Headline]:
    """The most important numbers of a run; "–" where the records don't have one."""
    evaluated = [row for row in records if _defined(row, "accuracy")]
    first = evaluated[0] if evaluated and evaluated[0]["step"] == 0 else {}
    last = evaluated[-1] if evaluated and evaluated[-1]["step"] > 0 else {}
    best = max(evaluated, key=lambda row: row["accuracy"], default={})
    start, final = (row.get("accuracy", math.nan) for row in (first, last))
    counts = [row.get("accuracy_instances", math.nan) for row in (first, last)]
    phases = {phase: _total(records, f"seconds_{phase}") for phase in ("rollout", "attention", "training")}
    wall = _total(records, "seconds_total")
    if math.isnan(wall):
        wall = sum(seconds for seconds in phases.values() if not math.isnan(seconds)) or math.nan
    return [
        Headline("Accuracy at the start", format_percent(start), _note("held out, step 0", first)),
        Headline(
            "Final accuracy",
            format_percent(final),
            _note(f"best {format_percent(best['accuracy'])} at step {int(best['step'])}", last) if last else "",
        ),
        Headline(
            "Lift",
            _points(final - start),
            "; ".join(["points over the start", *_interval(difference(start, final, *counts), _points)]),
        ),
        Headline("Steps", format_number(max(record["step"] for record in records))),
        Headline("Wall time", format_duration(wall), "sum over the steps"),
        Headline("Attention", format_percent(phases["attention"] / wall), "share of the wall time"),
    ]


def _note(text: str, record: Record) -> str:
    """The line below an accuracy: `text`, and the 95 % interval if the record has the number of instances."""
    count = record.get("accuracy_instances", math.nan)
    intervals = _interval(wilson(record.get("accuracy", math.nan), count), format_percent)
    return "; ".join([text, *(f"{interval} of {format_number(count)} instances" for interval in intervals)])


def _interval(interval: tuple[float, float], form: Callable[[float], str]) -> list[str]:
    """["95% interval 1 to 2"]; empty where the interval is undefined."""
    return [] if math.isnan(sum(interval)) else [f"95% interval {form(interval[0])} to {form(interval[1])}"]


def _points(share: float) -> str:
    """A difference of fractions in percentage points: +3.1, −10.0; "–" when undefined."""
    return "–" if math.isnan(share) else f"{100 * share:+.1f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Seconds as "8.2 s", "11 min 32 s" or "3 h 05 min"; "–" when undefined."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _response(row: Mapping[str, Any]) -> Response:
    texts = [str(token) for token in row["tokens"][:MAX_TOKENS_PER_SAMPLE]]
    signals = {signal: _signal_values(row, signal.key) for signal in SIGNALS}
    strengths = {signal: token_strengths(values, signal.low) for signal, values in signals.items()}
    tokens = []
    for i, text in enumerate(texts):
        style = ";".join(
            f"{signal.variable}:{strengths[signal][i]:.2f}"
            for signal in SIGNALS
            if not math.isnan(strengths[signal][i])
        )
        numbers = [f"token {i}"]
        numbers += [f"{signal.name} {_format_signal(signals[signal][i])}" for signal in SIGNALS]
        # A line break is shown as ⏎, and the line then breaks.
        tokens.append(Token(text.replace("\n", "⏎"), style, " · ".join(numbers), breaks="\n" in text))
    reward, correct = row.get("reward"), row.get("correct")
    parts = [] if correct is None else ["correct" if correct else "wrong"]
    parts += [f"reward {format_number(float(reward))}"] if _finite(reward) else []
    parts.append(f"{len(row['tokens']):,} tokens")
    return Response(
        prompt=str(row.get("prompt", "")),
        outcome=" · ".join(parts),
        correct=None if correct is None else bool(correct),
        tokens=tuple(tokens),
        hidden_tokens=len(row["tokens"]) - len(texts),
    )


def _signal_values(row: Mapping[str, Any], key: str) -> list[float]:
    """One value per token, NaN where undefined; all NaN if the run did not record the signal."""
    values = row.get(key)
    if values is None:
        return [math.nan] * len(row["tokens"])
    if len(values) != len(row["tokens"]):
        raise ValueError(f"a sample has {len(row['tokens'])} tokens but {len(values)} values of {key}")
    return [float(value) if _finite(value) else math.nan for value in values]


def _format_signal(value: float) -> str:
    return "undefined" if math.isnan(value) else format_number(value)


def _load_samples(folder: Path) -> dict[int, list[dict[str, Any]]]:
    samples: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("step_*.jsonl")):
        for row in _json_lines(path):
            if not isinstance(row.get("tokens"), list):
                raise ValueError(f"{path} has a row without a list of tokens")
            samples.setdefault(int(row["step"]), []).append(row)
    return samples


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line cut short by a killed run is left out."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict) or not _finite(row.get("step")):
                raise ValueError(f"{path}, line {number}, must be an object with a step")
            yield row


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of a metrics line; null is NaN, text is left out."""
    return {
        key: math.nan if value is None or not _finite(value) else float(value)
        for key, value in row.items()
        if value is None or isinstance(value, int | float)
    }


def _finite(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a number that a float can hold; JSON allows 1e999 and integers of any length."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _defined(record: Record, key: str) -> bool:
    return math.isfinite(record.get(key, math.nan))


def _total(records: Sequence[Record], key: str) -> float:
    """Sum of the defined values, NaN if there is none."""
    values = [record[key] for record in records if _defined(record, key)]
    return math.fsum(values) if values else math.nan


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` evenly spaced items, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
