"""Writes what `rhythm.analysis.lengths` measured: lengths.json, .csv and .md, and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from rhythm.analysis.figures import COLORS, STYLE
from rhythm.analysis.lengths import LengthRow, Lengths
from rhythm.analysis.results import Analysis, read_json, write_json
from rhythm.analysis.summary import write_rows
from rhythm.reports.curves import page_svg
from rhythm.reports.format import format_number, format_p_value, format_percent, save_figure
from rhythm.system.writing import replace_file

COUPLINGS = {
    "entropy": "entropy at WAAD peaks",
    "cooccurrence": "receiver and global peaks",
    "follows": "FAI after WAAD",
}
HUES = {"entropy": "entropy", "cooccurrence": "fai_receiver", "follows": "waad"}
HEADS = (
    "length",
    "responses",
    *COUPLINGS.values(),
    "local heads shared",
    "global heads shared",
    "local heads kept",
    "global heads kept",
    "anchor reach",
    "FAI of anchors",
    "of all tokens",
)
_INK = "#010101"  # the page's own variables replace these colors
_PAGE = {_INK: "var(--muted)"} | {
    COLORS[key]: f"rgb(var(--{hue}))"
    for key, hue in {"entropy": "entropy", "fai_receiver": "receiver", "waad": "waad", "fai": "fai"}.items()
}


def write_lengths(analysis: Analysis, lengths: Lengths) -> list[Path]:
    """Into the directory of the analysis, the figure into `figures`; returns the paths.

    Raises OSError naming the file.
    """
    paths = [analysis.directory / f"lengths.{suffix}" for suffix in ("json", "csv", "md")]
    write_json(lengths, paths[0])
    write_rows(paths[1], length_rows(lengths))
    replace_file(paths[2], lengths_markdown(lengths, analysis.p_floor))
    figures = analysis.directory / "figures"
    figures.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = lengths_figure(lengths)
        return paths + [save_figure(figure, figures / f"lengths.{suffix}", dpi=200) for suffix in ("pdf", "png")]


def read_lengths(analysis: Analysis) -> Lengths | None:
    """The lengths in the directory of an analysis; None where there are none, or those of other responses."""
    path = analysis.directory / "lengths.json"
    if not path.is_file():
        return None
    lengths = read_json(Lengths, path)
    return lengths if lengths.names == analysis.names else None


def length_rows(lengths: Lengths) -> Iterator[dict[str, Any]]:
    """One dictionary per length; of each coupling both lifts, p, and one interval."""
    for row in lengths.rows:
        values: dict[str, Any] = {}
        for name, value in vars(row).items():
            if name == "table2":
                for coupling in row.table2:
                    values |= {
                        f"{coupling.key}_lift": coupling.permuted_lift,
                        f"{coupling.key}_p": coupling.p_value,
                        f"{coupling.key}_random_lift": coupling.lift,
                        f"{coupling.key}_random_lift_low": coupling.lift_interval.low,
                        f"{coupling.key}_random_lift_high": coupling.lift_interval.high,
                        f"{coupling.key}_peaks": coupling.peaks,
                    }
            elif name == "reach_interval":
                values |= {"reach_low": row.reach_interval.low, "reach_high": row.reach_interval.high}
            else:
                values[name.rstrip("_")] = value
        yield values


def lengths_markdown(lengths: Lengths, p_floor: float = 0.0) -> str:
    """The table of the page. p_floor: the smallest p-value that the permutations can give."""
    lines = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    lines += [f"| {' | '.join(cells(row, p_floor))} |" for row in lengths.rows]
    return "\n".join(lines) + "\n"


def cells(row: LengthRow, p_floor: float) -> list[str]:
    """The texts of a row, in the order of HEADS."""
    lifts = [
        f"{'+' if coupling.permuted_lift >= 0 else ''}{format_percent(coupling.permuted_lift)}, "
        f"p {format_p_value(coupling.p_value, p_floor)}"
        for coupling in row.table2
    ]
    interval = row.reach_interval
    low, high = format_number(interval.low), format_number(interval.high)
    return [
        f"{row.length:,}" if row.length else "as generated",
        str(row.responses),
        *lifts,
        *(format_percent(x) for x in (row.local, row.global_, row.local_kept, row.global_kept)),
        f"{format_number(row.reach)}{'' if math.isnan(interval.low) else f' [{low}, {high}]'}",
        format_number(row.fai_anchors),
        format_number(row.fai),
    ]


def lengths_data(lengths: Lengths, p_floor: float) -> dict[str, Any]:
    """The texts and the figure of the page's section."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "rhythm", "font.size": 7}
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context({**STYLE, **style, **ink}):
        svg = page_svg(lengths_figure(lengths), "Lifts, head groups and anchors by length of the context", _PAGE)
    table = [list(zip(HEADS, cells(row, p_floor), strict=True)) for row in lengths.rows]
    longest = lengths.rows[-1]
    return {"svg": svg, "heads": HEADS, "rows": table, "before": format_number(longest.before)}


def lengths_figure(lengths: Lengths) -> Figure:
    """Three panels over the length: lifts of Table 2, head groups, and the anchors' reach and FAI."""
    rows = [row for row in lengths.rows if row.length]
    at = [row.length for row in rows]
    figure = Figure(figsize=(7.2, 2.3), layout="constrained")
    lifts, groups, anchors = figure.subplots(1, 3)
    for i, (key, name) in enumerate(COUPLINGS.items()):
        _line(lifts, at, [row.table2[i].permuted_lift for row in rows], COLORS[HUES[key]], name)
    lifts.axhline(0, color="#8a8f96", linewidth=0.6)
    lifts.set_title("Lift over permuted peaks")
    for name, style in (("kept", "-"), ("shared", ":")):
        for group, color in (("local", COLORS["waad"]), ("global", COLORS["fai"])):
            field = {"local": "local", "global": "global_"}[group] if name == "shared" else f"{group}_kept"
            _line(groups, at, [getattr(row, field) for row in rows], color, f"{group}, {name}", style)
    groups.set_ylim(0, 1.02)
    groups.set_title("Heads kept, and shared")
    _line(anchors, at, [row.reach for row in rows], COLORS["fai"], "reach (tokens)")
    if all(math.isfinite(row.reach_interval.low) for row in rows):
        ends = [row.reach_interval.low for row in rows], [row.reach_interval.high for row in rows]
        anchors.fill_between(at, *ends, color=COLORS["fai"], alpha=0.15, linewidth=0)
    anchors.set_ylim(bottom=0)
    anchors.set_title("Reach of the anchors (tokens)")
    for axes in (lifts, groups, anchors):
        if len(at) > 1:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(at))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(length) for length in at], rotation=45)
        axes.set_xlabel("tokens of context and response")
    for axes in (lifts, groups):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=6)
    return figure


def _line(axes: Axes, at: list[int], values: list[float], color: str, label: str, style: str = "-") -> None:
    axes.plot(at, values, color=color, label=label, linestyle=style, linewidth=1.2, marker="o", markersize=2.8)
