"""Several runs or evaluations → report.html, report.md, CSV tables, PNG and PDF figures, and the commands of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rhythm.reports.comparison import (
    At,
    Block,
    Cell,
    Column,
    baseline_of,
    blocks,
    columns,
    command_lines,
    first_configured,
    series,
    value_of,
)
from rhythm.reports.comparison_figures import PALETTE, Panel, draw_svg, panels, peak_curves, write_figure
from rhythm.reports.format import csv_text, template_environment
from rhythm.reports.methods import MethodRun, load_runs
from rhythm.reports.run import TEMPLATES
from rhythm.system.writing import replace_file

_METHODS = "As the paper's Tables 3 and 4, Figs. 4 and 5."
_ABLATIONS = "As the paper's Table 5, Figs. 6 and 7: which tokens are selected, and how many."
AT = {
    "final": "of the last evaluation",
    "best": "of each run's best evaluation",
    "peak": "at the end of the running-peak average",
}


@dataclass(frozen=True)
class Section:
    """A table as the paper has it, its blocks, and the curves that belong to it."""

    stem: str
    title: str
    note: str
    blocks: tuple[Block, ...]
    panels: tuple[Panel, ...]
    palette: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. `commands`: (run, command line), from config.yaml beside the report."""

    runs: tuple[MethodRun, ...]
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    commands: tuple[tuple[str, str], ...]
    baseline: str
    at: At
    peak_alpha: float


def compare(
    directories: Sequence[Path],
    *,
    labels: Mapping[str, str] | None = None,
    baseline: str | None = None,
    at: At = "final",
    peak_alpha: float = 0.3,
) -> Comparison:
    """Read the runs and lay out what is to be written.

    Raises ValueError: fewer than two runs, no evaluation in any run, and what `load_runs` and `baseline_of` refuse.
    """
    if len(directories) < 2:
        raise ValueError(f"runs: a comparison needs at least two, got {len(directories)}")
    runs = load_runs(directories, labels or {})
    wanted = columns(runs)
    if not wanted:
        raise ValueError("runs: none of them holds an evaluation (accuracy in metrics.jsonl, or results.json)")
    name = baseline_of(runs, baseline)
    usual = [run for run in runs if run.usual]
    sections = [_section("methods", "Methods", _METHODS, usual, wanted, name, at, peak_alpha)]
    if len(usual) < len(runs):
        base = next((run.ablation for run in runs if run.method == name), name)
        sections.append(
            _section("ablations", "Ablations", _ABLATIONS, runs, wanted, base, at, peak_alpha, ablation=True)
        )
    return Comparison(
        tuple(runs), tuple(wanted), tuple(sections), tuple(command_lines(runs, "config.yaml")), name, at, peak_alpha
    )


def _section(
    stem: str,
    title: str,
    note: str,
    runs: Sequence[MethodRun],
    wanted: Sequence[Column],
    baseline: str,
    at: At,
    peak_alpha: float,
    *,
    ablation: bool = False,
) -> Section:
    def label(run: MethodRun) -> str:
        return run.ablation if ablation else run.method

    names = list(dict.fromkeys(map(label, runs)))
    return Section(
        stem,
        title,
        note,
        tuple(blocks(runs, wanted, at=at, peak_alpha=peak_alpha, baseline=baseline, ablation=ablation)),
        tuple(panels(runs, wanted, label)),
        {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)},
    )


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write all files into `out`, which is made if missing; returns their paths, the page first.

    Raises OSError naming the file that can't be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = {"report.html": _html(comparison), "report.md": markdown(comparison), "runs.csv": _runs_csv(comparison),
             "curves.csv": _curves_csv(comparison), "commands.sh": _commands(comparison)}  # fmt: skip
    texts |= {f"table_{section.stem}.csv": _table_csv(section) for section in comparison.sections}
    first = first_configured(comparison.runs)
    if first is not None and first.run.config is not None:
        texts["config.yaml"] = first.run.config
    for name, text in texts.items():
        replace_file(out / name, text)
    paths = [out / name for name in texts]
    for section in comparison.sections:
        paths += write_figure(
            section.panels, dict(section.palette), comparison.peak_alpha, out / f"curves_{section.stem}"
        )
    return paths


def _html(comparison: Comparison) -> str:
    environment = template_environment(TEMPLATES)
    environment.filters |= {"points": points, "gain": gain}
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        at=AT[comparison.at],
        seeds=_seeds(comparison.runs),
        sections=[
            {
                "it": section,
                "hues": {name: f"var(--m{PALETTE.index(color)})" for name, color in section.palette.items()},
                "figures": [
                    (panel.title, draw_svg(panel, dict(section.palette), comparison.peak_alpha))
                    for panel in section.panels
                ],
            }
            for section in comparison.sections
        ],
    )


def markdown(comparison: Comparison) -> str:
    """report.md: the tables, the figures and the commands."""
    lines = ["# Comparison of runs", "",
             f"Accuracies in percent, {AT[comparison.at]}; means over seeds with 95 % intervals (t).",
             f"Gains are over {comparison.baseline}, paired by seed.", ""]  # fmt: skip
    for section in comparison.sections:
        lines += [f"## {section.title}", "", section.note, ""]
        for block in section.blocks:
            if block.title:
                lines += [f"### {block.title}", ""]
            lines += ["| method | seeds | " + " | ".join(map(_cell_text, block.columns)) + " |"]
            lines += ["|---|---|" + "---|" * len(block.columns)]
            for place, row in enumerate(block.rows):
                cells = [_markdown_cell(cell, block.best[i] == place) for i, cell in enumerate(row.cells)]
                lines.append(f"| {_cell_text(row.method)} | {len(row.seeds)} | " + " | ".join(cells) + " |")
            lines.append("")
        lines += [f"![curves](curves_{section.stem}.png)", ""]
    return "\n".join([*lines, "## Commands", "", "```", *(line for _, line in comparison.commands), "```", ""])


def _markdown_cell(cell: Cell, best: bool) -> str:
    value = f"**{points(cell.value)}**" if best else points(cell.value)
    return " ".join(part for part in (value, spread(cell.low, cell.high), gain(cell)) if part)


def _cell_text(text: str) -> str:
    return text.replace("|", r"\|")


def points(share: float) -> str:
    """A share in percent without the sign, as papers write: 63.1."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}".replace("-", "−")


def spread(low: float, high: float) -> str:
    """An interval of shares: [60.2, 66.0]; empty where undefined."""
    return "" if math.isnan(low) else f"[{points(low)}, {points(high)}]"


def gain(cell: Cell) -> str:
    """+2.3 [0.4, 4.2] over the paired seeds; without interval for a single pair; empty for the baseline."""
    if math.isnan(cell.gain):
        return ""
    return " ".join(
        [f"{100 * cell.gain:+.1f}".replace("-", "−"), *filter(None, [spread(cell.gain_low, cell.gain_high)])]
    )


def _seeds(runs: Iterable[MethodRun]) -> str:
    counts = {sum(run.method == other.method and run.block == other.block for other in runs) for run in runs}
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _table_csv(section: Section) -> str:
    head = ("block", "method", "seeds", "task", "value", "low", "high", "gain", "gain_low", "gain_high", "pairs")
    rows = [
        (block.title, row.method, len(row.seeds), task, _number(cell.value), _number(cell.low), _number(cell.high),
         _number(cell.gain), _number(cell.gain_low), _number(cell.gain_high), cell.pairs)
        for block in section.blocks
        for row in block.rows
        for task, cell in zip(block.columns, row.cells, strict=True)
    ]  # fmt: skip
    return csv_text([head, *rows])


def _runs_csv(comparison: Comparison) -> str:
    rows = [
        (str(run.directory), run.block, run.method, "" if run.seed is None else run.seed, column.task, column.metric,
         *(_number(value_of(run, column.key, at, comparison.peak_alpha)) for at in AT))  # type: ignore[arg-type]
        for run in comparison.runs
        for column in comparison.columns
    ]  # fmt: skip
    return csv_text([("run", "block", "method", "seed", "task", "metric", *AT), *rows])


def _curves_csv(comparison: Comparison) -> str:
    rows = []
    for run in comparison.runs:
        for column in comparison.columns:
            if pairs := series(run, column.key):
                _, (averages,) = peak_curves([run], column.key, comparison.peak_alpha)
                rows += [
                    (
                        run.run.name,
                        run.method,
                        run.seed,
                        column.task,
                        column.metric,
                        int(step),
                        _number(value),
                        _number(peak),
                    )
                    for (step, value), peak in zip(pairs, averages, strict=True)
                ]
    return csv_text([("run", "method", "seed", "task", "metric", "step", "value", "running_peak"), *rows])


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _commands(comparison: Comparison) -> str:
    head = (
        "# Each line makes a run again, from config.yaml beside this file: the first run's, as it was recorded; "
        "or an evaluation.\n"
    )
    return head + "".join(f"{line}\n" for _, line in comparison.commands)
