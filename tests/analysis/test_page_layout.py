"""report.html of an analysis in a real browser, on a desktop and on a phone: texts and layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from in_browser import DESKTOP, PHONE, attributes, resize, texts
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from rhythm.analysis.page import write_page
from rhythm.analysis.page_data import SIGNALS
from rhythm.analysis.results import Analysis
from rhythm.reports.format import format_number, token_strengths

Invented = Callable[..., Analysis]


def open_page(browser: webdriver.Chrome, analysis: Analysis) -> Path:
    path = write_page(analysis)
    browser.get(path.as_uri())
    return path


def test_the_script_writes_numbers_as_python_does(browser: webdriver.Chrome, invented: Invented) -> None:
    open_page(browser, invented())
    values = [0.0, 12.0, -3.0, 1234.0, 1234.4, -123456.7, 12.34, 0.36081, 0.012345, 0.001, -0.5, 9.996, 0.09996]
    values += [999999.6, 0.0009999, 1.23e-6, -1.23e-6, 1.2e-12, 1234567.0, -2.5e7]
    written = browser.execute_script("return arguments[0].map(number)", values)
    assert written == [format_number(value) for value in values]
    assert browser.execute_script("return number(null)") == "–"


def test_cards_say_what_their_number_does_not_show(browser: webdriver.Chrome, invented: Invented) -> None:
    """docs/analysis.md's caveats, under the card they belong to; the lift is that over permutations."""
    open_page(browser, invented())
    cards = [text.replace("\u00a0", " ") for text in texts(browser, ".headlines .card")]
    assert len(cards) == 4
    assert cards[1].startswith("Receiver and global FAI peaks together, over permuted ones+164.5%")
    assert "60.8% against 23.0% permuted; p ≤ 0.001" in cards[1]
    assert "Part of the lift comes from the method" in cards[1]
    assert "share heads by chance (25.0%; here 66.0%)" in cards[1]
    assert "random weights shows +50%" in cards[1]
    assert "p = 0.034" in cards[2]
    assert "an effect of position" in cards[3]
    assert texts(browser, ".headlines .caveat")[0] == texts(browser, ".headlines .caveat")[2] == ""


def test_a_long_prompt_fades_after_six_lines_and_opens(browser: webdriver.Chrome, invented: Invented) -> None:
    first, *others = invented().responses()
    lines = "\n".join(f"<|im_start|> line {i}" for i in range(20))
    open_page(browser, invented([replace(first, prompt=lines), replace(others[0], prompt="short")]))
    prompt, button = (browser.find_element(By.ID, name) for name in ("prompt", "show-prompt"))
    for size in (DESKTOP, PHONE):
        resize(browser, size)
        height, line = browser.execute_script(
            "const x = arguments[0]; return [x.clientHeight, parseFloat(getComputedStyle(x).lineHeight)]", prompt
        )
        assert height == pytest.approx(6 * line, abs=1)  # whole lines
        assert "linear-gradient" in prompt.value_of_css_property("mask-image")
        assert button.text == "show all"
        button.click()
        assert browser.execute_script("return arguments[0].clientHeight", prompt) == pytest.approx(20 * line, abs=1)
        assert prompt.value_of_css_property("mask-image") == "none"
        assert button.text == "show less"
        button.click()
    browser.execute_script("showResponse(1)")
    assert not button.is_displayed()
    assert prompt.value_of_css_property("mask-image") == "none"


def test_undefined_tokens_are_hatched_and_the_least_value_is_not(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    browser.find_element(By.CSS_SELECTOR, "#signal-picks [data-signal=fai]").click()
    images = browser.execute_script(
        "return [...document.querySelectorAll('#tokens i')].map(x => getComputedStyle(x).backgroundImage)"
    )
    fai = analysis.response("00001-0").tokens.fai
    assert ["repeating-linear-gradient" in image for image in images] == [math.isnan(value) for value in fai]
    assert "undefined" in texts(browser, ".scale")[0]


def test_the_scale_says_where_a_color_begins_and_ends(browser: webdriver.Chrome, invented: Invented) -> None:
    open_page(browser, invented())
    said = {}
    for key in ("waad", "fai", "gamma"):
        browser.find_element(By.CSS_SELECTOR, f"#signal-picks [data-signal={key}]").click()
        said[key] = texts(browser, "#meaning")[0]
    assert said["waad"].endswith("The color scale goes from the response's smallest value to its largest.")
    assert said["fai"].endswith("The color scale goes from the response's smallest value to its 95th percentile.")
    assert said["gamma"].endswith("The color scale goes from 1 to its largest.")


def test_the_page_colors_tokens_by_the_shared_scale(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    for signal in SIGNALS:
        browser.find_element(By.CSS_SELECTOR, f"#signal-picks [data-signal={signal.key}]").click()
        drawn = [
            style and float(style.split(":")[1].strip(" ;")) for style in attributes(browser, "#tokens i", "style")
        ]
        values = getattr(analysis.response("00001-0").tokens, signal.key)
        strengths = token_strengths(values, signal.low)
        assert [x for x in drawn if x is not None and x != ""] == pytest.approx(
            [x for x in strengths if not math.isnan(x)], abs=2e-3
        )


def test_a_column_of_lines_has_a_title(browser: webdriver.Chrome, invented: Invented) -> None:
    open_page(browser, invented())
    assert texts(browser, "#table-2 th")[3:6] == ["lift", "no lift = line", "permuted"]
    # A phone shows no head of the table, but each cell's own.
    assert attributes(browser, "#table-2 td:has(.lift)", "data-of") == ["no lift = line"] * 3


def test_buttons_on_a_phone_fade_where_there_are_more(browser: webdriver.Chrome, invented: Invented) -> None:
    resize(browser, PHONE)
    open_page(browser, invented())
    picks = browser.find_element(By.ID, "signal-picks")
    assert "more-right" in picks.get_attribute("class")
    assert "more-left" not in picks.get_attribute("class")
    assert picks.value_of_css_property("mask-image").endswith("rgba(0, 0, 0, 0))")
    browser.execute_script("arguments[0].scrollLeft = 9999", picks)
    wait(browser, lambda: "more-right" not in picks.get_attribute("class"))
    assert "more-left" in picks.get_attribute("class")
    resize(browser, DESKTOP)
    wait(browser, lambda: "more" not in picks.get_attribute("class"))
    assert picks.value_of_css_property("mask-image") == "none"


def test_the_hint_on_a_phone_covers_nothing_and_knows_no_keys(browser: webdriver.Chrome, invented: Invented) -> None:
    resize(browser, PHONE)
    open_page(browser, invented())
    inspector = browser.find_element(By.ID, "inspector")
    assert inspector.text == "Tap a token or the curves for the numbers; tap it again to put them away."
    assert inspector.value_of_css_property("position") == "static"
    # Tapped, a token has its numbers at the bottom of the window, and isn't under them.
    browser.execute_script("scrollTo(0, document.getElementById('tokens').getBoundingClientRect().top - 500)")
    token = browser.find_element(By.CSS_SELECTOR, "#tokens i[data-i='3']")
    token.click()
    assert "token 3 of" in inspector.text
    assert "held" not in inspector.text
    assert inspector.value_of_css_property("position") == "sticky"
    token_bottom, top, bottom = browser.execute_script(
        "const [i, x] = arguments; return [i.getBoundingClientRect().bottom, x.getBoundingClientRect().top, x.getBoundingClientRect().bottom]",  # noqa: E501
        token,
        inspector,
    )
    assert token_bottom <= top
    assert bottom <= PHONE[1]
    token.click()
    assert inspector.value_of_css_property("position") == "static"
    resize(browser, DESKTOP)
    open_page(browser, invented())
    assert "Arrow keys step" in browser.find_element(By.ID, "inspector").text


def wait(browser: webdriver.Chrome, until: Callable[[], bool]) -> None:
    WebDriverWait(browser, 5).until(lambda _: until())
