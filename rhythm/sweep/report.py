"""A sweep's runs.csv and curves.csv → report.md, report.html, differences.csv and the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rhythm.reports.comparison_figures import PALETTE
from rhythm.reports.comparison_page import points, spread
from rhythm.reports.curves import page_svg
from rhythm.reports.format import csv_text, format_p_value, mean, save_figure, template_environment
from rhythm.reports.intervals import over_seeds
from rhythm.reports.run import TEMPLATES
from rhythm.sweep.results import RUNS, CurveRow, Results, read_results
from rhythm.sweep.statistics import Difference, area_under_curve, differences
from rhythm.system.writing import replace_file

BASELINE = "grpo"
MEASURES = {
    "final": "final accuracy (mean of the last three evaluations)",
    "area": "area under the curve (mean accuracy over all steps: speed of learning)",
    "best": "best accuracy",
}
_PANELS = {
    "accuracy": "held-out accuracy",
    "entropy": "entropy (nats per token)",
    "response_length": "tokens per response",
}
_WIDTH = 1.9
_INK = "#010101"  # replaced by the page's own
_PAGE = {_INK: "var(--muted)"} | {color: f"var(--m{index})" for index, color in enumerate(PALETTE)}
_STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left", "legend.frameon": False,
          "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "rhythm"} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
)  # fmt: skip


@dataclass(frozen=True)
class MethodRow:
    """Results of one method: means over its seeds, and the 95 % interval (t) of the final accuracy."""

    method: str
    seeds: tuple[int, ...]
    start: float
    final: float
    final_t: tuple[float, float]
    best: float
    area: float
    bonus_mass: float
    seconds: float


@dataclass(frozen=True)
class SweepReport:
    """Contents of the tables. differences: measure → all methods but the baseline. incomplete: methods that lack seeds
    that others have, and those seeds.
    """

    name: str
    baseline: str
    methods: tuple[MethodRow, ...]
    differences: Mapping[str, Sequence[Difference]]
    incomplete: tuple[tuple[str, tuple[int, ...]], ...]
    commits: tuple[str, ...]


def holds_a_sweep(directory: Path) -> bool:
    """Whether the directory contains results of rhythm-sweep."""
    return (directory / RUNS).is_file()


def summarize(directory: Path, baseline: str | None = None) -> SweepReport:
    """baseline: method that the others are compared with; None: grpo, or the first where there is none.

    Raises ValueError for files that rhythm-sweep did not write, and a baseline that no run has."""
    results = read_results(directory)
    if not results.runs:
        raise ValueError(f"{directory / RUNS} has no finished run yet")
    methods = list(dict.fromkeys(run.method for run in results.runs))
    baseline = baseline or (BASELINE if BASELINE in methods else methods[0])
    seeds = sorted({run.seed for run in results.runs})
    values: dict[str, dict[str, dict[int, float]]] = {
        measure: {method: {} for method in methods} for measure in MEASURES
    }
    for run in results.runs:
        values["final"][run.method][run.seed] = run.final
        values["best"][run.method][run.seed] = run.best
        values["area"][run.method][run.seed] = _area(_curve(results, run.method, run.seed))
    rows = []
    for method in methods:
        runs = sorted((run for run in results.runs if run.method == method), key=lambda run: run.seed)
        rows.append(
            MethodRow(
                method,
                tuple(run.seed for run in runs),
                start=mean([run.start for run in runs]),
                final=mean([run.final for run in runs]),
                final_t=over_seeds([run.final for run in runs]),
                best=mean([run.best for run in runs]),
                area=mean(list(values["area"][method].values())),
                bonus_mass=mean([run.bonus_mass for run in runs]),
                seconds=mean([run.seconds for run in runs]),
            )
        )
    incomplete = [(row.method, lacking) for row in rows if (lacking := tuple(s for s in seeds if s not in row.seeds))]
    commits = sorted({run.commit for run in results.runs})
    found = {measure: differences(by_method, baseline) for measure, by_method in values.items()}
    return SweepReport(directory.resolve().name, baseline, tuple(rows), found, tuple(incomplete), tuple(commits))


def write_sweep_report(directory: Path, baseline: str | None = None) -> list[Path]:
    """Writes the files into the directory; returns their paths, the page first.

    Raises ValueError: see `summarize`. OSError names a file that can't be written.
    """
    report = summarize(directory, baseline)
    with matplotlib.rc_context(_STYLE):
        figure = figure_of(read_results(directory))
        texts = {
            "report.html": _html(report, page_svg(figure, "curves of all methods", _PAGE)),
            "report.md": markdown(report),
            "differences.csv": _differences_csv(report),
        }
        for name, text in texts.items():
            replace_file(directory / name, text)
        figures = [save_figure(figure, directory / f"curves.{suffix}", dpi=140) for suffix in ("png", "pdf")]
    return [*(directory / name for name in texts), *figures]


def markdown(report: SweepReport) -> str:
    """report.md: the tables, the figure, and what was compared how."""
    lines = [
        f"# {report.name}",
        "",
        *_said(report),
        "",
        "## Methods",
        "",
        _table(METHOD_HEAD, method_cells(report)),
        "",
    ]
    for measure, meaning in MEASURES.items():
        lines += [f"## Difference to {report.baseline}: {meaning}", ""]
        lines += [_table(DIFFERENCE_HEAD, difference_cells(report.differences[measure])), ""]
    return "\n".join([*lines, "## Curves", "", "![curves](curves.png)", ""])


METHOD_HEAD: tuple[str, ...] = (
    "method",
    "seeds",
    "start",
    "final",
    "95 % (t)",
    "best",
    "area",
    "mean γ − 1",
    "seconds",
)
DIFFERENCE_HEAD: tuple[str, ...] = (
    "method",
    "seeds",
    "difference",
    "95 % (t)",
    "95 % (bootstrap)",
    "p",
    "p (Holm)",
    "detectable",
)


def method_cells(report: SweepReport) -> list[list[str]]:
    """Rows under METHOD_HEAD: accuracies in percent."""
    return [
        [row.method, str(len(row.seeds)), points(row.start), points(row.final), spread(*row.final_t), points(row.best),
         points(row.area), "–" if math.isnan(row.bonus_mass) else f"{row.bonus_mass:.3f}", f"{row.seconds:.0f}"]
        for row in report.methods
    ]  # fmt: skip


def difference_cells(found: Sequence[Difference]) -> list[list[str]]:
    """Rows under DIFFERENCE_HEAD: differences in percentage points."""
    return [
        [one.method, str(len(one.seeds)), signed(one.mean), spread(*one.t), spread(*one.bootstrap),
         format_p_value(one.p, one.least_p), format_p_value(one.holm), points(one.detectable)]
        for one in found
    ]  # fmt: skip


def signed(share: float) -> str:
    """+1.2 percentage points."""
    return "–" if math.isnan(share) else f"{100 * share:+.1f}".replace("-", "−")


def _said(report: SweepReport) -> list[str]:
    lines = [
        f"Accuracies in percent. Differences are to {report.baseline} of the same seed, which shares warm start, "
        "prompts and evaluation set. p: exact sign-flip permutation over seeds, two-sided; with n seeds it is at least "
        "2^(1 − n). Holm's correction is over the methods of a table. Detectable: the true difference that a paired "
        "t-test at 5 % would have found with a probability of 80 %."
    ]
    if report.incomplete:
        lacking = "; ".join(f"{method}: {', '.join(map(str, seeds))}" for method, seeds in report.incomplete)
        lines.append(f"Seeds not run yet, left out of that method's rows: {lacking}.")
    lines.append(f"Code: {', '.join(report.commits)}.")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _html(report: SweepReport, figure: str) -> str:
    tables = [("Methods", METHOD_HEAD, method_cells(report))]
    tables += [
        (f"Difference to {report.baseline}: {meaning}", DIFFERENCE_HEAD, difference_cells(report.differences[measure]))
        for measure, meaning in MEASURES.items()
    ]
    return (
        template_environment(TEMPLATES)
        .get_template("sweep.html.j2")
        .render(report=report, said=_said(report), tables=tables, figure=figure)
    )


def _differences_csv(report: SweepReport) -> str:
    names = ("method", "seeds", "mean", "t_low", "t_high", "bootstrap_low", "bootstrap_high", "p", "least_p", "holm")
    rows = [
        (measure, one.method, " ".join(map(str, one.seeds)), one.mean, *one.t, *one.bootstrap, one.p, one.least_p,
         one.holm, one.detectable)
        for measure, found in report.differences.items()
        for one in found
    ]  # fmt: skip
    return csv_text([("measure", *names, "detectable"), *rows])


def figure_of(results: Results) -> Figure:
    """A panel per measured curve. Bold: mean over seeds; shaded: its 95 % interval (t); thin: the runs."""
    methods = list(dict.fromkeys(run.method for run in results.runs))
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for index, method in enumerate(methods):
            curves = [_curve(results, run.method, run.seed) for run in results.runs if run.method == method]
            _draw_method(axes, curves, key, method, PALETTE[index % len(PALETTE)], dashed=index >= len(PALETTE))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if key == "accuracy":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


def _draw_method(
    axes: Axes, curves: Sequence[Sequence[CurveRow]], key: str, method: str, color: str, *, dashed: bool
) -> None:
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        drawn = [(row.step, getattr(row, key)) for row in curve if not math.isnan(getattr(row, key))]
        for step, value in drawn:
            by_step.setdefault(step, []).append(value)
        if len(curves) > 1 and drawn:
            axes.plot(*zip(*drawn, strict=True), color=color, linewidth=0.5, alpha=0.3)
    steps = [step for step in sorted(by_step) if len(by_step[step]) == len(curves)]
    if not steps:
        return
    means = [mean(by_step[step]) for step in steps]
    axes.plot(steps, means, color=color, linewidth=_WIDTH, linestyle="--" if dashed else "-", label=method)
    if len(curves) > 1:
        lows, highs = zip(*(over_seeds(by_step[step]) for step in steps), strict=True)
        axes.fill_between(steps, lows, highs, color=color, alpha=0.08, linewidth=0)


def _curve(results: Results, method: str, seed: int) -> list[CurveRow]:
    return sorted((row for row in results.curves if (row.method, row.seed) == (method, seed)), key=lambda row: row.step)


def _area(curve: Sequence[CurveRow]) -> float:
    return area_under_curve([row.step for row in curve], [row.accuracy for row in curve])
