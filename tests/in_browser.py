"""Pages in a headless Chromium: how tests start it, size it, and read what it shows.

from in_browser import PHONE, resize, texts
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selenium import webdriver

PHONE, DESKTOP = (390, 844), (1280, 900)


def start() -> webdriver.Chrome:
    """A headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program is not None, "the tests of the pages need chromium"
    assert driver is not None, "the tests of the pages need chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def resize(browser: webdriver.Chrome, size: tuple[int, int]) -> None:
    """A window of that size in CSS pixels; PHONE has a touch screen, and no mouse."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": size == PHONE})


def color_scheme(browser: webdriver.Chrome, scheme: str) -> None:
    """ "light" or "dark"."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def texts(browser: webdriver.Chrome, css: str) -> list[str]:
    """The text content of every element that matches."""
    return [element.get_property("textContent") for element in browser.find_elements("css selector", css)]


def attributes(browser: webdriver.Chrome, css: str, name: str) -> list[str]:
    """That attribute of every element that matches."""
    return [element.get_attribute(name) for element in browser.find_elements("css selector", css)]


def point_at(browser: webdriver.Chrome, css: str) -> None:
    """The mouse moves to the first element that matches."""
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(browser.find_element("css selector", css)).perform()
