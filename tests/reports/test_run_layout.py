"""The report of a run in a real browser: its grid, the tokens' colors, and collapsed parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from in_browser import DESKTOP, PHONE, resize, texts
from selenium import webdriver
from selenium.webdriver.common.by import By

from rhythm.reports.run import write_report

METRICS = ("reward", "loss", "clip_share", "entropy", "response_length", "gamma_share", "seconds_rollout")
"""With the accuracy, and seconds_rollout drawn as seconds per step: the eight curves of a run with γ."""
LINES = "\n".join(f"line {i}" for i in range(12))


def open_report(browser: webdriver.Chrome, folder: Path, curves: int = 8, **sample: Any) -> None:
    (folder / "samples").mkdir(parents=True)
    names = ("accuracy", *METRICS)[:curves]
    rows = [{"step": step, **{name: 0.1 * step for name in names}, "waad_mean": 1.0 + step} for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("name: first\n")
    row = {"step": 2, "tokens": ["a", "b", "c"], "waad": [3.0, 5.0, None], "fai": [0.1, None, None], **sample}
    for step in (0, 2):
        line = json.dumps({**row, "step": step})
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text(line + "\n")
    browser.get(write_report(folder).as_uri())


@pytest.mark.parametrize("curves", [5, 7, 8])
@pytest.mark.parametrize("width", [390, 800, 1000, 1280])
def test_no_cell_of_the_grid_is_empty(browser: webdriver.Chrome, tmp_path: Path, width: int, curves: int) -> None:
    """Every row of cards ends where the grid ends."""
    resize(browser, (width, 844))
    open_report(browser, tmp_path / "run", curves)
    for css in (".headlines", ".curves"):
        grid, cards = browser.execute_script(
            "const box = x => [x.getBoundingClientRect().top, x.getBoundingClientRect().right];"
            "const grid = document.querySelector(arguments[0]); return [box(grid), [...grid.children].map(box)]",
            css,
        )
        assert len(cards) == (6 if css == ".headlines" else curves)
        for row in {round(top) for top, _ in cards}:
            assert max(right for top, right in cards if round(top) == row) == pytest.approx(grid[1], abs=1)


def test_undefined_tokens_are_hatched_and_the_least_value_is_not(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_report(browser, tmp_path / "run")
    hatched = (
        "return [...document.querySelectorAll('details[open] .samples i, .samples details[open] i')]"
        ".map(x => getComputedStyle(x).backgroundImage.startsWith('repeating-linear-gradient'))"
    )
    assert browser.execute_script(hatched) == [False, False, True]
    for name, expected in (("fai", [False, True, True]), ("entropy", [True, True, True])):
        browser.find_element(By.CSS_SELECTOR, f"label[for=pick-{name}]").click()
        assert browser.execute_script(hatched) == expected
    assert "palest color is the response's smallest value" in texts(browser, ".meanings")[0]


def test_a_long_prompt_fades_after_four_lines_and_opens(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_report(browser, tmp_path / "run", prompt=LINES)
    for size in (DESKTOP, PHONE):
        resize(browser, size)
        closed, opened = browser.find_elements(By.CSS_SELECTOR, ".response .prompt")
        button = browser.find_elements(By.CSS_SELECTOR, ".show-all")[1]
        line = float(opened.value_of_css_property("line-height").removesuffix("px"))
        assert opened.size["height"] == pytest.approx(4 * line, abs=1)
        assert "linear-gradient" in opened.value_of_css_property("mask-image")
        button.click()
        assert opened.size["height"] == pytest.approx(12 * line, abs=1)
        assert opened.value_of_css_property("mask-image") == "none"
        assert button.text == "show less"
        button.click()
    # A step that was folded away is measured when it opens.
    browser.find_element(By.CSS_SELECTOR, ".samples summary").click()
    assert closed.value_of_css_property("mask-image") != "none"


def test_a_short_prompt_has_no_button(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_report(browser, tmp_path / "run", prompt="6,10,5>21:")
    assert not any(button.is_displayed() for button in browser.find_elements(By.CSS_SELECTOR, ".show-all"))
    (prompt,) = (x for x in browser.find_elements(By.CSS_SELECTOR, ".response .prompt") if x.is_displayed())
    assert prompt.value_of_css_property("mask-image") == "none"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_folded_sections_open_within_the_page(browser: webdriver.Chrome, tmp_path: Path, size: tuple[int, int]) -> None:
    resize(browser, size)
    open_report(browser, tmp_path / "run")
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.find_element(By.ID, "curve-waad_mean").is_displayed()
    assert browser.find_element(By.TAG_NAME, "pre").text == "name: first"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    widths = [x.size["width"] for x in browser.find_elements(By.CSS_SELECTOR, "svg")]
    assert all(math.isfinite(width) and width > 200 for width in widths)
