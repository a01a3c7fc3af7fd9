"""Writes what `rhythm.analysis.sensitivity` measured: sensitivity.json, .csv and .md, and a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rhythm.analysis.figures import COLORS, STYLE, ramp
from rhythm.analysis.results import Analysis, read_json, write_json
from rhythm.analysis.sensitivity import Sensitivity, SettingResult
from rhythm.analysis.summary import write_rows
from rhythm.reports.format import format_number, format_percent, save_figure
from rhythm.system.writing import replace_file

HEADS = ("shared", "moved", "chosen", "γ − 1", "place", "first third", "middle", "last")


def write_sensitivity(analysis: Analysis, sensitivity: Sensitivity) -> list[Path]:
    """Into the directory of the analysis, the heat map into `figures`; returns the paths.

    Raises OSError naming the file.
    """
    paths = [analysis.directory / f"sensitivity.{suffix}" for suffix in ("json", "csv", "md")]
    write_json(sensitivity, paths[0])
    write_rows(paths[1], sensitivity_rows(sensitivity))
    replace_file(paths[2], sensitivity_markdown(sensitivity))
    figures = analysis.directory / "figures"
    figures.mkdir(exist_ok=True)
    figure = sensitivity_figure(sensitivity)
    with matplotlib.rc_context(STYLE):
        return paths + [save_figure(figure, figures / f"sensitivity.{suffix}", dpi=200) for suffix in ("pdf", "png")]


def read_sensitivity(analysis: Analysis) -> Sensitivity | None:
    """The sensitivity in the directory of an analysis; None where there is none, or one of other responses."""
    path = analysis.directory / "sensitivity.json"
    if not path.is_file():
        return None
    sensitivity = read_json(Sensitivity, path)
    return sensitivity if sensitivity.names == analysis.names else None


def sensitivity_rows(sensitivity: Sensitivity) -> Iterator[dict[str, Any]]:
    """One dictionary per setting: the number of changes, the value of every key, the measures."""
    for setting in sensitivity.settings:
        measures = asdict(setting)
        del measures["changed"]
        yield {"changes": len(setting.changed), **sensitivity.own, **setting.changed, **measures}


def sensitivity_markdown(sensitivity: Sensitivity) -> str:
    """A table of the settings with one change at most, and a line about all of them."""
    lines = [f"| setting | {' | '.join(HEADS)} |", f"|---|{'---|' * len(HEADS)}"]
    for setting in sensitivity.settings:
        if len(setting.changed) <= 1:
            name = ", ".join(f"`{key}` {value}" for key, value in setting.changed.items()) or "the analysis' own"
            lines.append(f"| {name} | {' | '.join(measures(setting))} |")
    return "\n".join([*lines, "", f"{overview(sensitivity)}\n"])


def measures(setting: SettingResult) -> list[str]:
    """The measures of a setting as text, in the order of HEADS."""
    return [
        format_percent(setting.jaccard),
        format_percent(setting.moved),
        format_percent(setting.chosen),
        format_number(setting.mass),
        *(format_percent(x) for x in (setting.position, setting.first, setting.middle, setting.last)),
    ]


def overview(sensitivity: Sensitivity) -> str:
    """How much the chosen tokens have in common with the analysis' own, over all settings."""
    shared = np.array([setting.jaccard for setting in sensitivity.settings if setting.changed])
    low, middle, high = (format_percent(x) for x in np.nanquantile(shared, (0.05, 0.5, 0.95))) if len(shared) else "–––"
    most = max(len(setting.changed) for setting in sensitivity.settings)
    return (
        f"{len(shared):,} settings with up to {most} change{'' if most == 1 else 's'}, {len(sensitivity.names):,} "
        f"responses: the chosen tokens share {middle} with the analysis' own in the median, at most {low} in 5% of the "
        f"settings and at most {high} in 95%."
    )


def pairs(sensitivity: Sensitivity) -> tuple[list[tuple[str, str]], list[list[float]]]:
    """((key, value) of every single change, [change][change] Jaccard index with both made; NaN for two values of a key,
    or where two changes at a time were not tried). The diagonal has the single changes.
    """
    changes = [(key, value) for key, values in sensitivity.values.items() for value in values]
    of_pair = {frozenset(s.changed.items()): s.jaccard for s in sensitivity.settings}
    return changes, [[of_pair.get(frozenset((one, other)), math.nan) for other in changes] for one in changes]


def sensitivity_data(sensitivity: Sensitivity) -> dict[str, Any]:
    """The texts of the page's section: a row per single change, and the cells of the heat map."""
    changes, shared = pairs(sensitivity)
    names = [f"{key} {value}" for key, value in changes]
    heat = [
        (
            name,
            [
                (None, "")
                if math.isnan(share)
                else (round(share, 3), f"{' and '.join(dict.fromkeys((name, other)))}: {format_percent(share)} shared")
                for other, share in zip(names, row, strict=True)
            ],
        )
        for name, row in zip(names, shared, strict=True)
    ]
    singles = [
        (
            ", ".join(f"{key} {value}" for key, value in setting.changed.items()) or "the analysis' own",
            list(zip(HEADS, measures(setting), strict=True)),
        )
        for setting in sensitivity.settings
        if len(setting.changed) <= 1
    ]
    return {"overview": overview(sensitivity), "names": names, "heat": heat, "heads": HEADS, "singles": singles}


def sensitivity_figure(sensitivity: Sensitivity) -> Figure:
    """The Jaccard index of every two changes, the single ones on the diagonal."""
    changes, shared = pairs(sensitivity)
    names = [f"{key} {value}" for key, value in changes]
    with matplotlib.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        size = 1.9 + 0.14 * max(len(names), 12)
        figure = Figure(figsize=(size + 0.6, size), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(np.array(shared).reshape(len(names), -1), cmap=ramp(COLORS["gamma"]), vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=5.5)
        axes.set_yticks(range(len(names)), names, fontsize=5.5)
        axes.tick_params(length=0)
        ends = np.cumsum([len(values) for values in sensitivity.values.values()])[:-1] - 0.5
        for end in ends:
            axes.axvline(end, color="white", linewidth=1.2)
            axes.axhline(end, color="white", linewidth=1.2)
        axes.set_title("Tokens chosen: shared with the analysis' own settings")
        bar = figure.colorbar(image, ax=axes, label="Jaccard index", shrink=0.6)
        bar.outline.set_visible(False)
    return figure
