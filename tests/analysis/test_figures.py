"""Figures and tables for papers: they show the analysis's numbers, and the files are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from rhythm.analysis.figures import (
    COLORS,
    LINE,
    heads_figure,
    rhythm_figure,
    shown,
    table1_latex,
    table2_latex,
    tokens_figure,
    write_figures,
)
from rhythm.analysis.response import ResponseResult
from rhythm.analysis.results import Analysis

Invented = Callable[..., Analysis]


@pytest.fixture
def response(invented: Invented) -> ResponseResult:
    return invented().response("00001-0")


def axes_of(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left").split(" (")[0]: axes for axes in figure.get_axes()}


def lines_of(axes: Axes, color: str) -> tuple[np.ndarray, np.ndarray]:
    """(y of the curve, x of the peaks) drawn in the color."""
    curve, peaks = (line for line in axes.lines if line.get_color() == color)
    return np.asarray(curve.get_ydata()), np.asarray(peaks.get_xdata())


def test_fig_2_draws_the_curves_with_their_peaks(response: ResponseResult) -> None:
    axes = axes_of(rhythm_figure(response))
    assert list(axes) == ["Local heads", "Global heads", "FAI", "WAAD", "Entropy"]
    for title, key in (("FAI", "fai"), ("FAI", "fai_receiver"), ("WAAD", "waad"), ("Entropy", "entropy")):
        y, peaks = lines_of(axes[title], COLORS[key])
        np.testing.assert_array_equal(y, getattr(response.tokens, key))
        assert peaks.tolist() == list(getattr(response.peaks, key))
        assert len(peaks) > 10
    # The first token's FAI of 0.9 would flatten the peaks of 0.1: the axis is cut, and says so.
    assert axes["FAI"].get_ylim()[1] < 0.2
    assert "cut; largest" in axes["FAI"].get_title(loc="left")
    assert "cut" not in axes["WAAD"].get_title(loc="left")
    starts = [line.get_xdata()[0] + 0.5 for line in axes["WAAD"].lines[2:]]
    assert starts == list(response.chunks[1:])


def test_fig_2_maps_are_those_of_the_response(response: ResponseResult) -> None:
    axes = axes_of(rhythm_figure(response))
    assert response.maps is not None
    for title, attention_map in (("Local heads", response.maps.local), ("Global heads", response.maps.global_)):
        (image,) = axes[title].images
        np.testing.assert_allclose(np.asarray(image.get_array()) ** 2, np.array(attention_map.weights), atol=1e-12)
        n = len(response.tokens.texts)
        assert tuple(image.get_extent()) == (-response.prompt_tokens, n, n, 0)  # the response begins at 0
    without = axes_of(rhythm_figure(replace(response, maps=None)))
    assert list(without) == ["FAI", "WAAD", "Entropy"]


def test_fig_2_labels_the_tokens_of_a_short_response(invented: Invented) -> None:
    figure = rhythm_figure(invented().response("00002-0"))
    labels = [label.get_text() for label in axes_of(figure)["Entropy"].get_xticklabels()]
    assert "".join(labels) == "40␣-␣25␣+␣10␣=␣25␣<answer>"


@pytest.mark.parametrize("key", ["fai", "waad", "gamma"])
def test_fig_8_colors_every_token(response: ResponseResult, key: str) -> None:
    (axes,) = tokens_figure(response, [key]).get_axes()
    assert "".join(text.get_text() for text in axes.texts).replace("⏎", "\n") == response.response
    values = getattr(response.tokens, key)
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    pieces = [i for i, text in enumerate(response.tokens.texts) for piece in _pieces(text) if piece]
    colored = [i for i in pieces if not math.isnan(values[i])]
    assert len(patches) == len(colored)
    alpha = {i: patch.get_facecolor()[3] for i, patch in zip(colored, patches, strict=True)}
    assert max(alpha, key=lambda i: (alpha[i], values[i])) == max(colored, key=lambda i: values[i])
    assert alpha[response.peaks.fai[0] if key != "waad" else response.peaks.waad[0]] > 0.4
    assert alpha[3] < 0.2
    assert all(patch.get_x() + patch.get_width() <= LINE for patch in patches)


def _pieces(text: str) -> list[str]:
    """A token's pieces, as many as lines it is on; the sign of a newline is one."""
    parts = text.split("\n")
    return [part + "⏎" for part in parts[:-1]] + parts[-1:]


def test_fig_8_keeps_dollars_and_wide_characters(response: ResponseResult, tmp_path: Path) -> None:
    """A pair of dollar signs is no formula, and a wide character takes two cells."""
    texts = ("$x_1$", "答", "え", "")
    nan = (0.5, 1.0, 0.0, math.nan)
    tokens = replace(response.tokens, ids=(0, 1, 2, 3), texts=texts, fai=nan)
    figure = tokens_figure(replace(response, tokens=tokens), ["fai"])
    (axes,) = figure.get_axes()
    assert [text.get_text() for text in axes.texts] == ["$x_1$", "答", "え", "·"]
    assert [text.get_position()[0] for text in axes.texts] == [0, 5, 7, 9]
    assert not any(text.get_parse_math() for text in axes.texts)


def test_the_map_of_heads_marks_the_sets(invented: Invented) -> None:
    heads = invented().heads
    axes = heads_figure(heads).get_axes()[0]
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), np.array(heads.span))
    for name, key in (("local", "waad"), ("global", "fai")):
        color = pytest.approx(np.array(_rgba(COLORS[key])))
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_edgecolor() == color]
        assert {(round(box.get_y() + 0.42), round(box.get_x() + 0.42)) for box in boxes} == set(heads.set(name).heads)
    (dots,) = (collection for collection in axes.collections if isinstance(collection, PathCollection))
    assert {(int(y), int(x)) for x, y in dots.get_offsets()} == set(heads.set("receiver").heads)


def _rgba(color: str) -> tuple[float, ...]:
    return (*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


def test_heads_that_were_not_read_are_drawn(invented: Invented) -> None:
    heads = invented().heads
    nan = tuple((math.nan,) * heads.heads for _ in range(heads.layers))
    heads_figure(replace(heads, span=nan)).canvas.draw()
    heads_figure(replace(heads, span=(*nan[1:], heads.span[0]))).canvas.draw()


def test_files_are_written(invented: Invented, tmp_path: Path) -> None:
    analysis = invented()
    paths = write_figures(analysis, tmp_path / "figures")
    stems = {"heads", "rhythm", "tokens"}
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("pdf", "png")}
    expected |= {f"table{i}.{suffix}" for i in (1, 2) for suffix in ("csv", "tex")}
    assert {path.name for path in paths} == expected
    for path in paths:
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF")
        if path.suffix == ".png":
            assert np.asarray(Image.open(path).convert("L")).std() > 5
    frame = pd.read_csv(tmp_path / "figures" / "table2.csv")
    assert frame.observed.tolist() == [row.observed for row in analysis.table2]
    again = write_figures(analysis, tmp_path / "again")
    for one, other in zip(paths, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), f"{one.name} differs from run to run"


def test_the_response_drawn_is_the_shortest_with_maps(invented: Invented, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def record(response: ResponseResult) -> Figure:
        drawn.append(response.name)
        return rhythm_figure(response)

    monkeypatch.setattr("rhythm.analysis.figures.rhythm_figure", record)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # it takes seconds, and is not what is tested here
    analysis = invented()
    write_figures(analysis)  # the second one is the shortest
    write_figures(analysis, name="00003-0")
    without_maps = replace(analysis.response("00002-0"), maps=None)
    write_figures(invented([without_maps, analysis.response("00001-0"), analysis.response("00003-0")]))
    assert drawn == ["00002-0", "00003-0", "00001-0"]
    right = replace(analysis.response("00003-0"), response="\\boxed{75}")
    wrong = [replace(analysis.response(name), response="\\boxed{7}") for name in ("00001-0", "00002-0")]
    asked = {"settings": {"figure": "shortest_correct"}}
    write_figures(invented([*wrong, right], **asked))  # the longest, and without maps
    write_figures(invented(wrong, **asked))  # of which the shorter has no maps
    assert drawn[3:] == ["00003-0", "00001-0"]
    with pytest.raises(ValueError, match=r"name is '9'; the analysis has 00002-0, 00001-0"):
        write_figures(analysis_with_names(analysis), name="9")
    assert {path.stem for path in write_figures(invented([], table1=None))} == {"heads", "table2"}


def analysis_with_names(analysis: Analysis) -> Analysis:
    return replace(analysis, names=("00002-0", "00001-0"))


def test_latex_tables_hold_the_papers_numbers(invented: Invented) -> None:
    analysis = invented()
    assert analysis.table1 is not None
    first = table1_latex(analysis.table1)
    assert r"Mean Jaccard similarity & 0.534 & 0.631 \\" in first
    assert r"Pr(Top $<$ Bottom) & 87.1\% &  \\" in first
    controlled = table1_latex(replace(analysis.table1, matched=0.583, top_below_matched=0.6, matched_trials=9))
    assert r"Mean Jaccard similarity & 0.534 & 0.631 & 0.583 \\" in controlled
    assert r"Pr(Top $<$ Bottom) & 87.1\% &  & 60.0\% \\" in controlled
    second = table2_latex(analysis.table2, analysis.p_floor)
    assert r"\toprule" in second
    row = r"FAI peak follows or coincides with WAAD peak & 36.9\% & 38.0\% & 52.5\% & +42.5\% & $-$10.0\% to 60.0\% & "
    assert row + r"+38.2\% & 0.034 \\" in second
    assert r"+49.6\% & $\le$ 0.001 \\" in second  # the floor of 999 permutations
    assert "−" not in first + second


def test_unknown_keys_are_named(response: ResponseResult) -> None:
    with pytest.raises(ValueError, match="keys holds 'span'; allowed are waad"):
        tokens_figure(response, ["span"])


def test_blanks_are_shown() -> None:
    assert [shown(text) for text in (" a", "\n\n", "\t", "")] == ["␣a", "⏎⏎", "⇥", "·"]
