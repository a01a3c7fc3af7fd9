"""Formatting shared by both pages: numbers, percents, p-values, and the strength of a token's color."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import jinja2
import pytest
from matplotlib.figure import Figure

import rhythm
from rhythm.reports.format import (
    csv_text,
    format_number,
    format_p_value,
    format_percent,
    not_run,
    save_figure,
    template_environment,
    token_scale,
    token_strengths,
)

NUMBERS = [
    (0.0, "0"), (-0.0, "0"), (12.0, "12"), (1234.0, "1,234"), (1234.4, "1,234"), (12.34, "12.3"), (0.36081, "0.361"),
    (0.012345, "0.0123"), (0.001, "0.00100"), (-0.5, "−0.500"), (9.996, "10.0"), (0.09996, "0.100"),
    (999999.6, "1.00e+06"), (0.0009999, "0.00100"), (1.23e-6, "1.23e-06"), (-1.23e-6, "−1.23e-06"),
    (1234567.0, "1.23e+06"), (2.5e7, "2.50e+07"), (-123456.7, "−123,457"), (math.nan, "–"), (math.inf, "∞"),
    (-math.inf, "−∞"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_percents() -> None:
    values = (0.1234, -0.031, 1.0, math.nan, math.inf, -math.inf)
    assert [format_percent(value) for value in values] == ["12.3%", "−3.1%", "100.0%", "–", "–", "–"]


def test_p_values() -> None:
    values = (1e-5, 0.001, 0.034, 0.5, math.nan)
    assert [format_p_value(p) for p in values] == ["< 0.0001", "0.001", "0.034", "0.50", "–"]


def test_a_p_value_at_the_floor_may_be_smaller() -> None:
    floor = 1 / (1 + 999)
    assert format_p_value(0.001, floor) == "≤ 0.001"
    assert format_p_value(0.002, floor) == "0.002"
    assert format_p_value(math.nan, floor) == "–"
    assert format_p_value(1 / 100000, 1 / 100000) == "≤ 1e-05"


def test_the_scale_is_the_range_unless_a_few_values_stretch_it() -> None:
    values = [float(i) for i in range(40)]
    assert token_scale([*values, math.nan]) == (0.0, 39.0)
    assert token_scale([*values[:-1], 1000.0]) == (0.0, 37.0)  # of 40 values the 95th percentile is the 38th
    assert token_scale([1.0, 2.0, 100.0]) == (1.0, 2.0)  # it is below the largest, however few there are
    assert token_scale([0.0] * 39 + [0.1]) == (0.0, 0.1)
    assert token_scale([2.0, 2.0]) == (2.0, 3.0)
    assert token_scale([1.25, 1.5], low=1.0) == (1.0, 1.5)
    assert token_scale([math.nan]) is None
    assert token_scale([]) is None


def test_strengths_are_shares_of_the_scale() -> None:
    drawn = token_strengths([0.0, 1.0, math.nan, 2.0, 100.0])
    assert math.isnan(drawn[2])
    assert [drawn[i] for i in (0, 1, 3, 4)] == [0.0, 0.5, 1.0, 1.0]
    assert token_strengths([1.0, 1.0, 1.5, 0.5], low=1.0) == [0.0, 0.0, 1.0, 0.0]
    assert [math.isnan(value) for value in token_strengths([math.nan, math.nan])] == [True, True]


def test_templates_escape_and_know_their_names(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("{{ text }}{{ missing }}")
    with pytest.raises(jinja2.UndefinedError, match="missing"):
        template_environment(tmp_path).get_template("page").render(text="")
    (tmp_path / "page").write_text("{{ text }}")
    assert template_environment(tmp_path).get_template("page").render(text="<b>") == "&lt;b&gt;"


def test_no_other_module_formats_numbers_for_a_page() -> None:
    """One spelling for both pages."""
    package = Path(rhythm.__file__).parent
    names = ("def format_number", "def format_percent", "def format_p_value", "jinja2.Environment(")
    for name in names:
        assert [p.name for p in package.rglob("*.py") if name in p.read_text(encoding="utf-8")] == ["format.py"]


def test_csv_holds_numbers_as_numbers_and_text_that_no_spreadsheet_runs() -> None:
    rows = [("=1+2", "@SUM(1)", "\t=1", "\r=1", "+a", "-a", "a=b"), (-0.25, -3, 1 / 3, math.nan, None, True, "")]
    first, second = csv.reader(io.StringIO(csv_text(rows), newline=""))
    assert first == ["'=1+2", "'@SUM(1)", "'\t=1", "'\r=1", "'+a", "'-a", "a=b"]
    assert second == ["-0.25", "-3", "0.333333", "nan", "", "True", ""]
    assert not_run("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0"
    assert [not_run(cell) for cell in (-1.5, None, True)] == [-1.5, None, True]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_a_figure_that_does_not_fit_on_the_disk_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"curves.{suffix}"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        save_figure(Figure(figsize=(1, 1)), path, dpi=50)
    assert caught.value.filename == str(path)
