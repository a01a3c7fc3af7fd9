"""Learning curves of several runs, as the paper's Figs. 4 to 7: for the page in its colors, and as PNG and PDF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rhythm.reports.comparison import Column, series
from rhythm.reports.curves import page_svg, running_peak_average
from rhythm.reports.format import save_figure
from rhythm.reports.intervals import over_seeds
from rhythm.reports.methods import MethodRun

PALETTE = ("#5b6169", "#2860c4", "#d9641e", "#2c8f74", "#9a4fc4", "#b8860b", "#c2386f", "#3a8fb0")
"""Of methods, in the order of the tables; --m0 … --m7 on the page."""
_INK, _GRID = "#010101", "#020202"  # the page's own variables replace them
_PAGE = {_INK: "var(--muted)", _GRID: "var(--line)"} | {color: f"var(--m{i})" for i, color in enumerate(PALETTE)}
_FILE = {"ink": "#62676e", "grid": "#e3e4e1"}
_FILE_STYLE = {"font.size": 8, "pdf.fonttype": 42, "axes.titlelocation": "left", "axes.titlesize": 8,
               "legend.frameon": False}  # fmt: skip
_SIZE_IN = (3.6, 2.5)


@dataclass(frozen=True)
class Panel:
    """One panel: a task in a block, and the runs by the label that their curve has, in order of the legend."""

    title: str
    key: str
    runs: tuple[tuple[str, tuple[MethodRun, ...]], ...]


def panels(runs: Sequence[MethodRun], columns: Sequence[Column], label: Callable[[MethodRun], str]) -> list[Panel]:
    """A panel for every block and task that some run was evaluated on."""
    drawn_panels = []
    for block in dict.fromkeys(run.block for run in runs):
        members = [run for run in runs if run.block == block]
        for column in columns:
            drawn = [run for run in members if series(run, column.key)]
            if drawn:
                by_label = {name: tuple(r for r in drawn if label(r) == name) for name in map(label, drawn)}
                title = ", ".join(part for part in (f"{column.task} ({column.metric})", block) if part)
                drawn_panels.append(Panel(title, column.key, tuple(by_label.items())))
    return drawn_panels


def draw_svg(panel: Panel, palette: dict[str, str], peak_alpha: float) -> str:
    """For the page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rhythm", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        _draw(figure.subplots(), panel, palette, peak_alpha, _INK, _GRID)
        return page_svg(figure, panel.title, _PAGE)


def write_figure(figure_panels: Sequence[Panel], palette: dict[str, str], peak_alpha: float, stem: Path) -> list[Path]:
    """All panels side by side as stem.png and stem.pdf."""
    columns = min(3, len(figure_panels))
    rows = -(-len(figure_panels) // columns)
    style = {
        "font.size": 8,
        "pdf.fonttype": 42,
        "axes.titlelocation": "left",
        "axes.titlesize": 8,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_SIZE_IN[0] * columns, _SIZE_IN[1] * rows + 0.5), layout="constrained")
        grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes in grid[len(figure_panels) :]:
            axes.remove()
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid, figure_panels, strict=False):
            _draw(axes, panel, palette, peak_alpha, _FILE["ink"], _FILE["grid"])
            axes.set_title(panel.title, fontweight="bold")
            handles |= {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
        return [save_figure(figure, stem.with_suffix(suffix), dpi=160) for suffix in (".png", ".pdf")]


def peak_curves(runs: Sequence[MethodRun], key: str, peak_alpha: float) -> tuple[list[float], list[list[float]]]:
    """(steps that all runs were evaluated at, of each run the running-peak average there)."""
    drawn = []
    for run in runs:
        pairs = series(run, key)
        averages = running_peak_average([value for _, value in pairs], peak_alpha)
        drawn.append({step: average for (step, _), average in zip(pairs, averages, strict=True)})
    steps = sorted(set.intersection(*map(set, drawn)))
    return steps, [[curve[step] for step in steps] for curve in drawn]


def _draw(axes: Axes, panel: Panel, palette: dict[str, str], peak_alpha: float, ink: str, grid: str) -> None:
    """Thin: what each run measured. Bold: the running-peak average, mean over seeds; shaded: its 95 % interval."""
    for label, runs in panel.runs:
        color = palette[label]
        for run in runs:
            axes.plot(*zip(*series(run, panel.key), strict=True), color=color, linewidth=0.7, alpha=0.35)
        steps, averages = peak_curves(runs, panel.key, peak_alpha)
        if not steps:
            continue
        columns = list(zip(*averages, strict=True))
        means = [sum(column) / len(column) for column in columns]
        axes.plot(steps, means, color=color, linewidth=1.9, label=label, marker="o" if len(steps) == 1 else "")
        if len(runs) > 1:
            lows, highs = zip(*(over_seeds(column) for column in columns), strict=True)
            axes.fill_between(steps, np.maximum(lows, 0), np.minimum(highs, 1), color=color, alpha=0.12, linewidth=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(grid)
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=ink)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    axes.set_xlabel("step", color=ink)
    # By the lines alone: two seeds have intervals far wider than any curve.
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    margin = 0.06 * (values.max() - values.min()) or 0.01
    axes.set_ylim(max(0.0, values.min() - margin), values.max() + margin)
