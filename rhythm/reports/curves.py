"""Draws the curves of a run's report: takes the metrics of all steps, returns inline SVG in the page's colors."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from rhythm.reports.format import format_number, format_percent
from rhythm.reports.intervals import wilson

Record = Mapping[str, float]
Floats = NDArray[np.float64]

# matplotlib needs real colors. They are replaced by the page's CSS variables, which follow light and dark mode.
_INK, _GRID, _SERIES = "#010101", "#020202", "#030303"
_ROLLOUT, _ATTENTION, _TRAINING, _OTHER = "#040404", "#050505", "#060606", "#070707"
_PAGE_COLORS = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    _SERIES: "var(--series)",
    _ROLLOUT: "var(--rollout)",
    _ATTENTION: "var(--attention)",
    _TRAINING: "var(--training)",
    _OTHER: "var(--other)",
}
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "rhythm", "font.size": 9, "text.color": _INK}
_WIDTH_IN, _HEIGHT_IN = 3.3, 1.9  # four fit side by side with readable text


@dataclass(frozen=True)
class CurveSpec:
    """One metric and how to draw it. `percent`: the metric is a fraction from 0 to 1. `peak`: also draw the
    running-peak average, as a thin line.
    """

    key: str
    title: str
    unit: str = ""
    percent: bool = False
    peak: bool = False


@dataclass(frozen=True)
class Curve:
    """One drawn curve. `legend`: (CSS class, label) per series; empty for a single series."""

    key: str
    title: str
    unit: str
    last: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


MAIN_CURVES = (
    CurveSpec("accuracy", "Held-out accuracy", percent=True, peak=True),
    CurveSpec("reward", "Mean reward", peak=True),
    CurveSpec("loss", "Policy loss"),
    CurveSpec("clip_share", "Clipped tokens", percent=True),
    CurveSpec("entropy", "Entropy", "nats per token"),
    CurveSpec("response_length", "Response length", "tokens"),
    CurveSpec("gamma_share", "Share of γ", percent=True),
)
FURTHER_CURVES = (
    CurveSpec("zero_variance_share", "Groups whose rewards tie", percent=True),
    CurveSpec("finished_share", "Finished responses", percent=True),
    CurveSpec("attention_share", "Attention's share of the step", percent=True),
    CurveSpec("gamma_mean", "Mean γ"),
    CurveSpec("amplified_fraction", "Amplified tokens", percent=True),
    CurveSpec("waad_mean", "Mean WAAD", "tokens"),
    CurveSpec("fai_mean", "Mean FAI"),
    CurveSpec("approx_kl", "Approximate KL to the old policy", "nats"),
    CurveSpec("grad_norm", "Gradient norm"),
    CurveSpec("lr", "Learning rate"),
    CurveSpec("tokens_per_second", "Throughput", "tokens per second"),
)
_AVERAGE = re.compile(r"(?P<task>.+)/avg@(?P<samples>\d+)")
_PHASES = (("rollout", _ROLLOUT), ("attention", _ATTENTION), ("training", _TRAINING))


def running_peak_average(values: Iterable[float], alpha: float) -> list[float]:
    """The paper's smoothing of its curves: EMA_t = α·max(x_t, EMA_{t−1}) + (1 − α)·EMA_{t−1}, EMA_0 = x_0.

    It never falls: it moves towards new peaks and ignores lower values. An undefined value (NaN) is NaN in the result
    and doesn't change the average.

    Raises:
        ValueError: alpha outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it has to be in (0, 1]")
    averages: list[float] = []
    average = math.nan
    for value in values:
        if math.isnan(value):
            averages.append(math.nan)
            continue
        average = value if math.isnan(average) else alpha * max(value, average) + (1 - alpha) * average
        averages.append(average)
    return averages


def task_metrics(records: Iterable[Record]) -> dict[str, str]:
    """Task → metric, of the further tasks in the records: avg@n with several responses per problem, else pass@1.

    The records have them as `<task>/<metric>`.
    """
    samples: dict[str, int] = {}
    for record in records:
        for key in record:
            if match := _AVERAGE.fullmatch(key):
                samples[match["task"]] = max(samples.get(match["task"], 1), int(match["samples"]))
    return {task: f"avg@{n}" if n > 1 else "pass@1" for task, n in samples.items()}


def draw_curves(records: Sequence[Record], specs: Iterable[CurveSpec], peak_alpha: float) -> list[Curve]:
    """The curves of those specs that have a defined value in the records (one record per step, in order)."""
    curves = (_draw_curve(records, spec, peak_alpha) for spec in specs)
    return [curve for curve in curves if curve is not None]


def draw_seconds(records: Sequence[Record]) -> Curve | None:
    """Seconds per step, stacked by phase; the part of `seconds_total` outside these phases is "other"."""
    timed = [record for record in records if any(f"seconds_{phase}" in record for phase, _ in _PHASES)]
    if not timed:
        return None
    steps = np.array([record["step"] for record in timed])
    layers = [
        (phase, color, np.nan_to_num([record.get(f"seconds_{phase}", 0.0) for record in timed]))
        for phase, color in _PHASES
    ]
    in_phases = np.sum([seconds for _, _, seconds in layers], axis=0)
    total = np.array([record.get("seconds_total", math.nan) for record in timed])
    other = np.nan_to_num(np.maximum(total - in_phases, 0.0))
    if other.sum() > 0.01 * in_phases.sum():
        layers.append(("other", _OTHER, other))

    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        edges = np.stack([steps - 0.5, steps + 0.5], axis=1).ravel()  # one bar per step, drawn as one path
        axes.stackplot(
            edges,
            [np.repeat(seconds, 2) for _, _, seconds in layers],
            colors=[color for _, color, _ in layers],
            linewidth=0,
        )
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        svg = page_svg(figure, "Seconds of every step by phase")
    legend = tuple((name, name) for name, _, _ in layers)
    last = f"{format_number(float(sum(seconds[-1] for _, _, seconds in layers)))} s"
    return Curve("seconds", "Seconds per step", "", last, svg, legend)


def _draw_curve(records: Sequence[Record], spec: CurveSpec, peak_alpha: float) -> Curve | None:
    steps, values = _series(records, spec.key)
    defined = np.isfinite(values)
    if not defined.any():
        return None
    if spec.key == "accuracy":  # undefined between evaluations: the line joins the evaluated steps
        steps, values = steps[defined], values[defined]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        marker = "o" if len(values) <= 40 else ""
        axes.plot(
            steps,
            values,
            color=_SERIES,
            linewidth=2.0 if spec.peak else 1.5,
            marker=marker,
            markersize=3,
            markeredgewidth=0,
        )
        if spec.peak:
            axes.plot(steps, running_peak_average(values, peak_alpha), color=_SERIES, linewidth=0.8, alpha=0.7)
        if interval := _interval(records, spec.key, steps, values):
            axes.fill_between(steps, *interval, color=_SERIES, alpha=0.16, linewidth=0)
        if spec.percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{_tick(100 * value)}%"))
            _stay_within_shares(axes, values[np.isfinite(values)])
        svg = page_svg(figure, f"{spec.title} by step")
    last = float(values[np.isfinite(values)][-1])
    label = "each evaluation" if spec.key == "accuracy" or "/" in spec.key else "each step"
    legend: tuple[tuple[str, str], ...] = (("values", label), ("peak", "running peak")) if spec.peak else ()
    if interval:
        legend += (("interval", "95% interval"),)
    text = format_percent(last) if spec.percent else format_number(last)
    return Curve(spec.key, spec.title, spec.unit, text, svg, legend)


def _interval(records: Sequence[Record], key: str, steps: Floats, values: Floats) -> tuple[Floats, Floats] | None:
    """Wilson's interval at every step; None if the records don't give the number of instances."""
    counts = {record["step"]: record.get(f"{key}_instances", math.nan) for record in records}
    bounds = np.array([wilson(value, counts[step]) for step, value in zip(steps, values, strict=True)])
    return (bounds[:, 0], bounds[:, 1]) if np.isfinite(bounds).any() else None


def _series(records: Sequence[Record], key: str) -> tuple[Floats, Floats]:
    """(steps, values) of the records that have the key; infinite values count as undefined."""
    pairs = [(record["step"], record[key]) for record in records if key in record]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_xlabel("step", color=_INK)
    return figure, axes


def _stay_within_shares(axes: Axes, shares: Floats) -> None:
    """Limit the axis to 0–100 %, which matplotlib's margins would exceed; values outside are still shown."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, min(0.0, shares.min())), min(high, max(1.0, shares.max())))
    for line in axes.lines:
        line.set_clip_on(False)  # else a line along 0 % or 100 % would lose half its width


def _tick(value: float) -> str:
    return f"−{-value:.6g}" if value < 0 else f"{value:.6g}"


def page_svg(figure: Figure, label: str, colors: Mapping[str, str] | None = None) -> str:
    """The figure as an <svg> that fits its box, uses the page's colors and font, and refers to no URL.

    colors: in place of this module's, color in the figure → CSS color.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # matplotlib's ids repeat in every figure
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = re.sub(
        r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg
    )  # the form of newer matplotlib versions
    view_box = re.search(r'viewBox="[^"]*"', svg)
    if view_box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box.group()} role="img" aria-label="{label}">', svg, count=1)
    for color, variable in (_PAGE_COLORS if colors is None else colors).items():
        svg = svg.replace(color, variable)
    return svg.strip()
