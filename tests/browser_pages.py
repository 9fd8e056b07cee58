"""Pages in a real Chromium: what they show, and what the browser complains of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def opened(
    browser: Browser, path: Path, *, width: int = 1280, dark: bool = False, **options: Any
) -> tuple[Page, list[str]]:
    """The page in its own window, and what the browser complains of.

    Args:
        browser: the Chromium.
        path: of the page.
        width: of the window in pixels.
        dark: whether the reader prefers dark colours.
        options: of Playwright's `new_page`.
    """
    scheme: Any = "dark" if dark else "light"
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    complaints: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: complaints.append(f"asks for {request.url[:50]}"))
    shown.goto(path.as_uri())
    return shown, complaints


def serious(complaints: list[str]) -> list[str]:
    """Complaints other than that the page and its own pictures are asked for, or that a test reads many pixels."""
    harmless = ("asks for data:", "asks for file:", "Canvas2D: Multiple readback")
    return [each for each in complaints if not each.startswith(harmless)]
