"""A real Chromium for tests of what people look at. Skips with the reason where there is none.

FIVEFOLD_BROWSER names another than the one on PATH; FIVEFOLD_SCREENSHOTS is a folder that keeps what the tests saw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE_MS = 240_000  # of a machine whose two cores do other things, too
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = {"desktop": {"width": 1440, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, headless."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (the extra 'dev' has it)"
    )
    found = os.environ.get("FIVEFOLD_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # As root, in a container, Chromium has no sandbox and little shared memory.
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        opened = driver.chromium.launch(executable_path=found, args=options, timeout=PATIENCE_MS)
        yield opened
        opened.close()


def new_page(browser: Any, size: str = "desktop", scheme: str = "light") -> tuple[Any, list[str]]:
    """Open a page of its own; return it and the list that its errors come to."""
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page, errors


def keep(page: Any, name: str) -> None:
    """Keep a screenshot where FIVEFOLD_SCREENSHOTS says so, as PNG of few colours."""
    if folder := os.environ.get("FIVEFOLD_SCREENSHOTS"):
        from PIL import Image

        target = Path(folder) / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=target)
        with Image.open(target) as image:
            small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(target, optimize=True)
