"""Writes an evaluation's report.html, one file that needs no network, and the table that the command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from rhythm.evaluation.config import EvaluationConfig, settings
from rhythm.evaluation.estimators import INTERVAL, Estimate
from rhythm.evaluation.responses import ResponseRow
from rhythm.evaluation.scores import TaskScores
from rhythm.reports.format import format_number, format_percent, template_environment
from rhythm.reports.run import TEMPLATES
from rhythm.system.writing import replace_file
from rhythm.tasks.prompts import PromptLimit

MAX_CELLS, MAX_PROBLEMS, MAX_RESPONSES, MAX_CHARACTERS = 600, 12, 4, 4000


def write_page(
    path: Path,
    config: EvaluationConfig,
    scores: Sequence[TaskScores],
    rows: Mapping[str, Sequence[ResponseRow]],
    limit: PromptLimit,
) -> None:
    """Write the page of a finished evaluation; `rows`: the responses of every task; `limit`: how long prompts were
    allowed to be.
    """
    sampling = config.sampling
    drawn = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    page = (
        template_environment(TEMPLATES)
        .get_template("evaluation.html.j2")
        .render(
            model=str(config.model),
            facts=[f"{len(scores)} task{'s' * (len(scores) != 1)}", drawn, f"seed {config.seed}", config.engine],
            interval=INTERVAL,
            tasks=[_task(task, rows[task.task], limit) for task in scores],
            settings=yaml.safe_dump(settings(config), sort_keys=False, allow_unicode=True),
        )
    )
    replace_file(path, page.encode("utf-8", "replace"))


def table(scores: Sequence[TaskScores]) -> Table:
    """A row per metric, its value and interval in percent."""
    rows = Table(box=None, pad_edge=False, header_style="")
    for name, justify in (
        ("task", "left"),
        ("problems", "right"),
        ("metric", "left"),
        ("value", "right"),
        ("95% interval", "left"),
    ):
        rows.add_column(name, justify=justify, overflow="fold", no_wrap=True)  # type: ignore[arg-type]
    for task in scores:
        for place, estimate in enumerate(task.estimates):
            first = (task.task, f"{task.problems:,}") if place == 0 else ("", "")
            rows.add_row(*first, estimate.name, format_percent(estimate.value), _interval(estimate))
    return rows


def _interval(estimate: Estimate) -> str:
    return f"{format_percent(estimate.low)} to {format_percent(estimate.high)}"


def _task(scores: TaskScores, rows: Sequence[ResponseRow], limit: PromptLimit) -> dict[str, Any]:
    by_problem: dict[int, list[ResponseRow]] = {}
    for row in rows:
        by_problem.setdefault(row.problem, []).append(row)
    shown = sorted(by_problem)
    facts = [
        f"{scores.problems:,} problems × {scores.samples} response{'s' * (scores.samples != 1)}",
        f"{format_number(scores.mean_tokens)} tokens on average",
        f"{format_percent(scores.finished_share)} ended by themselves",
        f"{format_percent(scores.format_share)} could be read",
    ]
    facts += [f"{scores.faults} not scored (late, or the reward failed)"] if scores.faults else []
    if scores.left_out:
        facts.append(
            f"{scores.left_out} problems left out: the prompt has more than {limit.longest:,} tokens ({limit.why})"
        )
    return {
        "scores": scores,
        "facts": facts,
        "rows": [
            {
                "name": estimate.name,
                "value": format_percent(estimate.value),
                "interval": _interval(estimate),
                "left": f"{100 * estimate.low:.2f}",
                "width": f"{100 * (estimate.high - estimate.low):.2f}",
                "at": f"{min(100 * estimate.value, 98.5):.2f}",
            }
            for estimate in scores.estimates
        ],
        "cells": [
            {"share": f"{count / scores.samples:.3f}", "title": f"problem {problem}: {count} of {scores.samples} right"}
            for problem, count in list(zip(shown, scores.correct, strict=True))[:MAX_CELLS]
        ],
        "hidden_cells": max(0, len(shown) - MAX_CELLS),
        "problems": [_problem(problem, by_problem[problem]) for problem in shown[:MAX_PROBLEMS]],
    }


def _problem(index: int, rows: Sequence[ResponseRow]) -> dict[str, Any]:
    ordered = sorted(rows, key=lambda row: row.sample)
    return {
        "index": index,
        "prompt": _cut(ordered[0].prompt),
        "right": sum(row.correct for row in ordered),
        "responses": [
            {
                "text": _cut(row.response),
                "correct": row.correct,
                "outcome": " · ".join(
                    [
                        "correct" if row.correct else "wrong",
                        f"score {format_number(row.score)}",
                        f"{row.tokens:,} token{'s' * (row.tokens != 1)}",
                        *([] if row.finished else ["cut off"]),
                        *([f"not scored: {row.fault}"] if row.fault else []),
                    ]
                ),
            }
            for row in ordered[:MAX_RESPONSES]
        ],
        "hidden": max(0, len(ordered) - MAX_RESPONSES),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
