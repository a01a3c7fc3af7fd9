"""What the curves of a comparison show: read off matplotlib's axes before they are saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rhythm.reports import comparison_figures
from rhythm.reports.comparison_figures import PALETTE, draw_svg, write_figure
from rhythm.reports.comparison_page import compare
from rhythm.reports.intervals import over_seeds

WriteRun = Callable[..., Path]
MEASURED = {("none", 0): [0.2, 0.4, 0.3], ("coupled", 0): [0.1, 0.5, 0.7], ("coupled", 1): [0.11, 0.5, 0.69]}
# With α = 0.5, by hand: 0.2 → ½·0.4 + ½·0.2 → unmoved by 0.3, which is no new peak (½·0.3 + ½·0.3).
PEAKS = {("none", 0): [0.2, 0.3, 0.3], ("coupled", 0): [0.1, 0.3, 0.5], ("coupled", 1): [0.11, 0.305, 0.4975]}


@pytest.mark.parametrize("drawn_by", ["page", "file"])
def test_bold_is_the_running_peak_and_thin_what_was_measured(
    tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch, drawn_by: str
) -> None:
    runs = [
        write_run(tmp_path, f"{strategy}-{seed}", values, strategy=strategy, seed=seed)
        for (strategy, seed), values in MEASURED.items()
    ]
    (section,) = compare(runs).sections
    (panel,) = section.panels
    figures = _caught(monkeypatch)
    if drawn_by == "page":
        draw_svg(panel, dict(section.palette), 0.5)
    else:
        write_figure([panel], dict(section.palette), 0.5, tmp_path / "curves")
    (axes,) = figures[0].axes
    bold = [line for line in axes.lines if line.get_linewidth() > 1]
    thin = [line for line in axes.lines if line.get_linewidth() < 1]
    assert [line.get_label() for line in bold] == ["GRPO", "+ coupled rhythm credit"]
    assert [_points(line) for line in thin] == [[(0, a), (10, b), (20, c)] for a, b, c in MEASURED.values()]
    means = [PEAKS["none", 0], np.mean([PEAKS["coupled", 0], PEAKS["coupled", 1]], axis=0).tolist()]
    for line, expected in zip(bold, means, strict=True):
        steps, values = zip(*_points(line), strict=True)
        assert steps == (0, 10, 20)
        assert values == pytest.approx(expected)
    assert [to_hex(line.get_color()) for line in bold] == list(PALETTE[:2])
    assert [to_hex(line.get_color()) for line in thin] == [PALETTE[0], PALETTE[1], PALETTE[1]]

    (band,) = axes.collections  # of the method with two seeds
    outline = np.asarray(band.get_paths()[0].vertices, dtype=float)
    for place, step in enumerate((0, 10, 20)):
        low, high = over_seeds([PEAKS["coupled", seed][place] for seed in (0, 1)])
        at = outline[outline[:, 0] == step][:, 1]
        assert (at.min(), at.max()) == pytest.approx((low, high))


def test_each_task_and_block_has_a_panel_of_its_own(
    tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        write_run(tmp_path, f"{lr}", [0.1, value], strategy="none", config={"optimizer": {"lr": lr}},
                  further={"aime/avg@16": value / 2})
        for lr, value in ((1e-6, 0.2), (1e-5, 0.6))
    ]  # fmt: skip
    (section,) = compare(runs).sections
    figures = _caught(monkeypatch)
    write_figure(section.panels, dict(section.palette), 0.5, tmp_path / "curves")
    last = {
        axes.get_title(loc="left"): next(_points(line)[-1] for line in axes.lines if line.get_linewidth() < 1)
        for axes in figures[0].axes
    }
    assert last == {
        "countdown (accuracy), optimizer.lr=1e-05": (10, 0.6),
        "aime (avg@16), optimizer.lr=1e-05": (10, 0.3),
        "countdown (accuracy), optimizer.lr=1e-06": (10, 0.2),
        "aime (avg@16), optimizer.lr=1e-06": (10, 0.1),
    }


def _caught(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved."""
    figures: list[Figure] = []

    def caught(figure: Figure, *_: Any, **__: Any) -> str:
        figures.append(figure)
        return ""

    monkeypatch.setattr(comparison_figures, "save_figure", caught)
    monkeypatch.setattr(comparison_figures, "page_svg", caught)
    return figures


def _points(line: Any) -> list[tuple[float, float]]:
    return list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
