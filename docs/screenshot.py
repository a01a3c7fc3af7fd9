"""python docs/screenshot.py PAGE.html PICTURE.png [--width 900] [--height 700]: the top of a page, by Chromium."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path


def screenshot(page: Path, picture: Path, width: int, height: int) -> None:
    """Needs chromium and chromedriver on PATH."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise SystemExit("screenshot.py needs chromium and chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.resolve().as_uri())
        picture.parent.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(picture))
    finally:
        browser.quit()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python docs/screenshot.py", description=__doc__)
    parser.add_argument("page", type=Path, metavar="PAGE.html")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    parser.add_argument("--width", type=int, default=900, help="CSS pixels")
    parser.add_argument("--height", type=int, default=700, help="CSS pixels")
    options = parser.parse_args(arguments)
    screenshot(options.page, options.picture, options.width, options.height)
    print(options.picture)


if __name__ == "__main__":
    main()
