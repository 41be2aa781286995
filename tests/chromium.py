"""Headless Chromium for tests, which are skipped where there is none."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver


@contextlib.contextmanager
def chromium(width: int, height: int) -> Iterator[webdriver.Chrome]:
    """A browser with a window of that size, in pixels, while the block runs."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(
            "Chromium or its driver is not installed "
            "(Debian: apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in (
        "headless=new",
        f"window-size={width},{height}",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-proxy-server",
    ):
        options.add_argument(f"--{word}")
    for word in (
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
    ):
        options.add_argument(f"--{word}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # Selenium would download a driver that it misses
        started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()
