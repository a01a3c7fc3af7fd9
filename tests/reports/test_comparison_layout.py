"""The pages of a comparison and of an evaluation in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from in_browser import DESKTOP, resize, texts
from selenium import webdriver

from rhythm.evaluation.config import EvaluationConfig
from rhythm.evaluation.page import write_page
from rhythm.evaluation.responses import ResponseRow
from rhythm.evaluation.scores import score
from rhythm.reports.comparison_page import compare, write_comparison
from rhythm.tasks.prompts import PromptLimit

NARROW = (360, 800)
HOSTILE = "<script>alert('x')</script>" + "long" * 300


@pytest.mark.parametrize("size", [DESKTOP, NARROW])
def test_a_comparison_fits_and_shows_its_tables(
    browser: webdriver.Chrome, tmp_path: Path, write_run: Callable[..., Path], size: tuple[int, int]
) -> None:
    runs = [
        write_run(tmp_path, f"{s}-{seed}", [0.2, 0.3 + gain + seed / 100], strategy=s, seed=seed, select=select)
        for s, select, gain in (("none", "top", 0), ("coupled", "top", 0.1), ("coupled", "bottom", -0.1))
        for seed in (0, 1)
        if not (s == "coupled" and select == "bottom")
    ]
    runs.append(write_run(tmp_path, "bottom", [0.2, 0.1], strategy="coupled", select="bottom"))
    resize(browser, size)
    browser.get(write_comparison(compare(runs), tmp_path / "out")[0].as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    cells = [" ".join(text.split()) for text in texts(browser, "#methods ~ .card td")]
    assert cells[:6] == [
        "GRPO",
        "2",
        "30.5 24.1 to 36.9",
        "+ coupled rhythm credit",
        "2",
        "40.5 +10.0 [10.0, 10.0] 34.1 to 46.9",
    ]
    assert texts(browser, "h2") == ["Methods", "Ablations", "Commands"]
    assert "Coupled (Bottom-40%)" in cells
    assert len(browser.find_elements("css selector", "figure svg")) == 2
    colors = {
        element.value_of_css_property("stroke") for element in browser.find_elements("css selector", "figure svg path")
    }
    assert {"rgb(91, 97, 105)", "rgb(40, 96, 196)"} <= colors  # --m0 and --m1


@pytest.mark.parametrize("size", [DESKTOP, NARROW])
def test_an_evaluation_fits_and_escapes_responses(
    browser: webdriver.Chrome, tmp_path: Path, size: tuple[int, int]
) -> None:
    rows = [
        ResponseRow(problem=p, sample=s, seed=1, prompt=f"p{p} {HOSTILE}", response=HOSTILE, tokens=3, finished=s == 0,
                    score=float(p == 0), correct=p == 0 and s == 0, format_ok=True, fault="late" if s else None)
        for p in range(3)
        for s in range(2)
    ]  # fmt: skip
    scores = score("countdown", [row.scored for row in rows], 2, [1, 2])
    config = EvaluationConfig.model_validate({"model": "some/model", "tasks": ["countdown"], "samples": 2})
    write_page(tmp_path / "page.html", config, [scores], {"countdown": rows}, PromptLimit(63, "the context is 64"))
    resize(browser, size)
    browser.get((tmp_path / "page.html").as_uri())
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert texts(browser, ".task tr td b")[:3] == ["16.7%", "", "33.3%"]
    assert texts(browser, ".text")[1] == HOSTILE
    assert "not scored: late" in texts(browser, ".outcome.wrong")[0]
    shares = [element.get_attribute("title") for element in browser.find_elements("css selector", ".solved i")]
    assert shares == ["problem 0: 1 of 2 right", "problem 1: 0 of 2 right", "problem 2: 0 of 2 right"]
    bar, mark = (browser.find_element("css selector", f".bar {tag}").rect for tag in ("i", "b"))
    assert bar["x"] <= mark["x"] <= bar["x"] + bar["width"]
