"""Draws figures and writes tables for publication: Figs. 2 and 8, the map of heads, Tables 1 and 2 as CSV and LaTeX."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from rhythm.analysis.page_data import SIGNALS
from rhythm.analysis.problems import is_correct
from rhythm.analysis.response import AttentionMap, ResponseResult
from rhythm.analysis.results import Analysis, Heads, Interval, Table1, Table2Row
from rhythm.analysis.rows import table1_frame, table2_frame
from rhythm.reports.format import format_number, format_p_value, format_percent, save_figure, token_strengths
from rhythm.system.writing import replace_file

Floats = NDArray[np.float64]

COLORS = {"waad": "#cd6608", "fai": "#256cd6", "fai_receiver": "#be306c", "entropy": "#8a4cc8", "gamma": "#148e62"}
NAMES = {signal.key: signal.name for signal in SIGNALS}
LOWS = {signal.key: signal.low for signal in SIGNALS}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "pdf.fonttype": 42,  # embed fonts, so that text can be selected
}
LABELED_TOKENS = 80  # the tokens of a longer response don't fit below the curves
LINE, FONT_PT = 96, 7.0  # characters per line and font size of the tokens' figure
ADVANCE = 0.602  # of DejaVu Sans Mono, in units of its size


def write_figures(analysis: Analysis, directory: Path | None = None, *, name: str | None = None) -> list[Path]:
    """Writes rhythm, tokens and heads as .pdf and .png, table1 and table2 as .csv and .tex; returns their paths.

    Args:
        directory: by default `figures` in the directory of the analysis.
        name: of the response to draw; by default the one that the setting `figure` asks for.

    Raises:
        ValueError: no response has this name.
        OSError: a file can't be written; it names the file.
    """
    directory = analysis.directory / "figures" if directory is None else directory
    directory.mkdir(parents=True, exist_ok=True)
    figures = {"heads": heads_figure(analysis.heads)}
    if name is not None and name not in analysis.names:
        raise ValueError(f"name is {name!r}; the analysis has {', '.join(analysis.names) or 'no responses'}")
    if analysis.names:
        response = analysis.response(name) if name is not None else _drawn(analysis)
        figures |= {"rhythm": rhythm_figure(response), "tokens": tokens_figure(response)}
    paths = []
    for stem, figure in figures.items():
        with matplotlib.rc_context(STYLE):
            paths += [save_figure(figure, directory / f"{stem}.{suffix}", dpi=200) for suffix in ("pdf", "png")]
    tables = {"table2": (table2_frame(analysis), table2_latex(analysis.table2, analysis.p_floor))}
    if analysis.table1 is not None:
        tables["table1"] = (table1_frame(analysis), table1_latex(analysis.table1))
    for stem, (frame, latex) in tables.items():
        paths += [directory / f"{stem}.csv", directory / f"{stem}.tex"]
        replace_file(paths[-2], frame.to_csv(index=False))
        replace_file(paths[-1], latex)
    return paths


def rhythm_figure(response: ResponseResult) -> Figure:
    """Fig. 2: the mean local and global maps, if there are any, and FAI, WAAD and entropy with their peaks."""
    tokens, peaks, maps = response.tokens, response.peaks, response.maps
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0 if maps is None else 7.2, 4.0), layout="constrained")
        curves: Any = figure
        if maps is not None:
            parts: Any = figure.subfigures(1, 2, width_ratios=(1.0, 2.3))
            left, curves = parts
            upper, lower = left.subplots(2, 1)
            _draw_map(upper, maps.local, "Local heads", COLORS["waad"])
            _draw_map(lower, maps.global_, "Global heads", COLORS["fai"])
        rows: Sequence[Axes] = curves.subplots(3, 1, sharex=True)
        for key, indices in (("fai", peaks.fai), ("fai_receiver", peaks.fai_receiver)):
            label = "global heads" if key == "fai" else "receiver heads"
            _draw_curve(rows[0], getattr(tokens, key), indices, COLORS[key], label)
        rows[0].set_title("FAI" + _capped(rows[0], [*tokens.fai, *tokens.fai_receiver]))
        rows[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
        _draw_curve(rows[1], tokens.waad, peaks.waad, COLORS["waad"], "WAAD")
        rows[1].set_title("WAAD (tokens)")
        _draw_curve(rows[2], tokens.entropy, peaks.entropy, COLORS["entropy"], "entropy")
        rows[2].set_title("Entropy (nats)")
        for axes in rows:
            for start in response.chunks[1:]:
                axes.axvline(start - 0.5, color="#c9ccd0", linewidth=0.5, linestyle=(0, (3, 3)), zorder=0)
            axes.margins(x=0.01)
        if len(tokens.texts) <= LABELED_TOKENS:
            labels = [shown(text).strip("␣") or shown(text) for text in tokens.texts]
            rows[2].set_xticks(range(len(labels)), labels, rotation=90, fontsize=5.5, parse_math=False)
            for axes in rows:
                axes.tick_params(axis="x", length=0)
        else:
            rows[2].set_xlabel("token")
    return figure


def tokens_figure(response: ResponseResult, keys: Sequence[str] = ("fai", "waad")) -> Figure:
    """Fig. 8: the response's tokens, once per signal, colored by its value.

    Raises:
        ValueError: a key that is not a signal.
    """
    if unknown := [key for key in keys if key not in COLORS]:
        raise ValueError(f"keys holds {unknown[0]!r}; allowed are {', '.join(COLORS)}")
    places = list(_places(response.tokens.texts))
    lines = 1 + max((line for line, *_ in places), default=0)
    width, height = LINE * ADVANCE * FONT_PT / 72, 1.6 * FONT_PT / 72
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + 0.2, len(keys) * (lines + 2) * height))
        for row, key in enumerate(keys):
            bottom = 1 - (row + 1) / len(keys)
            share = 1 / len(keys)
            axes = figure.add_axes((0.1 / (width + 0.2), bottom, width / (width + 0.2), share * lines / (lines + 2)))
            axes.set(xlim=(0, LINE), ylim=(lines, 0))
            axes.axis("off")
            axes.set_title(NAMES[key], color=COLORS[key])
            strengths = token_strengths(getattr(response.tokens, key), LOWS[key])
            for line, column, cells, text, token in places:
                if not math.isnan(strengths[token]):
                    color = (*to_rgb(COLORS[key]), 0.04 + 0.6 * strengths[token])
                    axes.add_patch(Rectangle((column, line + 0.05), cells - 0.08, 0.9, facecolor=color, linewidth=0))
                axes.text(
                    column, line + 0.5, text, family="DejaVu Sans Mono", fontsize=FONT_PT, va="center", parse_math=False
                )
    return figure


def heads_figure(heads: Heads) -> Figure:
    """The mean span of every head, layer × head, with the local, global and receiver sets marked."""
    span: Floats = np.array(heads.span, dtype=np.float64)
    with matplotlib.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        size = (1.4 + 0.16 * heads.heads, 1.3 + 0.16 * heads.layers)
        figure = Figure(figsize=(max(3.4, size[0]), max(2.4, size[1])), layout="constrained")
        axes = figure.subplots()
        known = span[np.isfinite(span) & (span > 0)]
        norm = LogNorm(known.min(), known.max()) if known.size and known.min() < known.max() else None
        image = axes.imshow(span, origin="lower", cmap=ramp(COLORS["entropy"], "#f4eefa"), norm=norm)
        axes.set(xlabel="head", ylabel="layer")
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=axes, label="mean span (tokens)", shrink=0.8)
        if norm is not None:
            bar.set_ticks(
                ticks := np.geomspace(known.min(), known.max(), 4).tolist(), labels=[f"{tick:.3g}" for tick in ticks]
            )
        bar.minorticks_off()
        bar.outline.set_visible(False)
        for name, color in (("local", COLORS["waad"]), ("global", COLORS["fai"])):
            for layer, head in heads.set(name).heads:
                axes.add_patch(Rectangle((head - 0.42, layer - 0.42), 0.84, 0.84, fill=False, edgecolor=color))
        receivers = heads.set("receiver").heads
        dots, color = np.array(receivers, dtype=np.float64).reshape(-1, 2), COLORS["fai_receiver"]
        axes.scatter(dots[:, 1], dots[:, 0], s=9, color=color, edgecolor="white", linewidth=0.4, zorder=3)
        figure.legend(
            handles=[
                Patch(fill=False, edgecolor=COLORS["waad"], label="local"),
                Patch(fill=False, edgecolor=COLORS["fai"], label="global"),
                Line2D([], [], color=color, marker="o", markersize=3, linestyle="none", label="receiver"),
            ],
            loc="outside lower center",
            ncols=3,
        )
    return figure


def table1_latex(table: Table1) -> str:
    """Table 1 with its intervals, for booktabs."""
    means, intervals, positions = (
        (table.top, table.bottom, table.matched),
        (table.top_interval, table.bottom_interval, table.matched_interval),
        (table.top_position, table.bottom_position, table.matched_position),
    )
    rows = [
        ("Mean Jaccard similarity", *map(format_number, means)),
        ("95% interval", *(_interval(interval, format_number) for interval in intervals)),
        ("Pr(Top < Bottom)", format_percent(table.top_below_bottom), "", format_percent(table.top_below_matched)),
        ("Mean position", *map(format_number, positions)),
        ("Problems", format_number(table.problems), "", ""),
    ]
    columns = ["", "Top-k", "Bottom-k", "Low, beside the top"]
    if not table.matched_trials:
        rows, columns = [row[:3] for row in rows if row[0] != "Mean position"], columns[:3]
    return _latex(rows, columns)


def table2_latex(table: Sequence[Table2Row], p_floor: float = 0.0) -> str:
    """Table 2 with both baselines, for booktabs; intervals are of the lift over the closed form.

    Args:
        p_floor: the smallest p-value that the permutations can give.
    """
    rows = []
    for row in table:
        form = format_number if row.key == "entropy" else format_percent
        lift, permuted = (("+" if x >= 0 else "") + format_percent(x) for x in (row.lift, row.permuted_lift))
        interval = _interval(row.lift_interval, format_percent)
        p = format_p_value(row.p_value, p_floor)
        rows.append((row.name, form(row.random), form(row.permuted), form(row.observed), lift, interval, permuted, p))
    heads = ["Metric correlation", "Random", "Permuted", "Observed", "Lift", "95% interval", "Lift (permuted)", "p"]
    return _latex(rows, heads)


def shown(text: str) -> str:
    """A token's text with visible white space."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "·"


def _drawn(analysis: Analysis) -> ResponseResult:
    """The shortest (correct) response, as in the paper's Fig. 2, of those with maps if there are any; holds two in
    memory. Where none is correct it is the shortest.
    """
    correct = analysis.settings.get("figure") == "shortest_correct"

    def rank(response: ResponseResult) -> tuple[bool, bool, int]:
        wrong = correct and not is_correct(response.answer, response.response)
        return wrong, response.maps is None, len(response.tokens.texts)

    return min(analysis.responses(), key=rank)


def _draw_map(axes: Axes, attention: AttentionMap, title: str, color: str) -> None:
    weights: Floats = np.array(attention.weights, dtype=np.float64)
    left = -attention.prompt_columns * attention.cell
    right, bottom = ((size * attention.cell) for size in (weights.shape[1] - attention.prompt_columns, len(weights)))
    # The square root keeps small weights visible.
    axes.imshow(np.sqrt(weights), cmap=ramp(color), extent=(left, right, bottom, 0), interpolation="nearest")
    if left:
        axes.axvline(0, color="#8a8f96", linewidth=0.6, linestyle=(0, (3, 3)))
    axes.set_title(title)
    axes.tick_params(labelsize=6, length=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _draw_curve(axes: Axes, values: Sequence[float], peaks: Sequence[int], color: str, label: str) -> None:
    axes.plot(range(len(values)), values, color=color, linewidth=1.0, label=label)
    axes.plot(peaks, [values[i] for i in peaks], color=color, marker="o", markersize=2.8, linestyle="none")


def _capped(axes: Axes, values: Sequence[float]) -> str:
    """Limit the axis where one or two tokens would flatten all others; returns a note for the title."""
    defined = np.sort([value for value in values if not math.isnan(value)])
    if len(defined) <= 4:
        return ""
    largest, usual = float(defined[-1]), float(defined[min(int(0.98 * len(defined)), len(defined) - 3)])
    if largest <= 2.5 * usual or usual <= 0:
        return ""
    axes.set_ylim(0, 1.3 * usual)
    return f" (cut; largest {format_number(largest)})"


def ramp(color: str, faint: str = "#ffffff") -> Colormap:
    ramp = LinearSegmentedColormap.from_list("rhythm", [faint, color])
    return ramp.with_extremes(bad="#d9dbde")


def _places(texts: Sequence[str]) -> Iterator[tuple[int, int, int, str, int]]:
    """(line, column, cells, text, token) per piece of a token, with line breaks at newlines and after LINE cells."""
    line = column = 0
    for token, text in enumerate(texts):
        pieces = (text or "·").replace("\t", "⇥").split("\n")
        for i, piece in enumerate(pieces):
            piece += "⏎" if i < len(pieces) - 1 else ""
            cells = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in piece)
            if column and column + cells > LINE:
                line, column = line + 1, 0
            if piece:
                yield line, column, cells, piece, token
            column += cells
            if i < len(pieces) - 1:
                line, column = line + 1, 0


def _interval(interval: Interval, form: object) -> str:
    if math.isnan(interval.low) or not callable(form):
        return "–"
    return f"{form(interval.low)} to {form(interval.high)}"


def _latex(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    frame = pd.DataFrame([list(row) for row in rows], columns=list(heads))
    text: str = frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(heads) - 1))
    return text.replace("−", "$-$").replace("–", "--").replace("<", "$<$").replace("≤", "$\\le$")
