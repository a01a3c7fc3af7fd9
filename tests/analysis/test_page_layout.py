"""report.html of an analysis in a real browser, on a desktop and on a phone: what is said, and what covers what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selenium import webdriver

from rhythm.analysis.page import write_page
from rhythm.analysis.results import Analysis
from rhythm.reports.format import format_number

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
