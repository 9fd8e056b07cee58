"""A headless Chromium, driven by the WebDriver protocol over HTTP: as much of it as tests of a page need."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of an element
ENTER, TAB = "\ue007", "\ue004"


def missing() -> str | None:
    """What is not installed, as a reason to skip a test; None where all is there."""
    if shutil.which("chromedriver") is None or _chromium() is None:
        return "needs Chromium and chromedriver (Debian: apt install chromium chromium-driver)"
    return None


class Browser:
    """One window.

    Args:
        address: of a chromedriver.
        profile: an empty folder.
    """

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        options = {"binary": _chromium(), "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = _ask("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"{address}/session/{answer['sessionId']}"

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page from a file, in a window of this size."""
        likes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in likes.items()]
        self.command("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        _ask("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns; promises are waited for."""
        return _ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Click the first element that a CSS selector finds."""
        _ask("POST", f"{self._session}/element/{self._find(selector)}/click", {})

    def press(self, selector: str, keys: str) -> None:
        """Focus an element, and type."""
        _ask("POST", f"{self._session}/element/{self._find(selector)}/value", {"text": keys})

    def console(self) -> list[str]:
        """What the browser has complained about since the last call."""
        entries = _ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG file."""
        width, height = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16000), "scale": 1}
        taken = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return _ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def close(self) -> None:
        """Close the window."""
        _ask("DELETE", self._session)

    def _find(self, selector: str) -> str:
        found = _ask("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a new profile below a folder; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (folder / "chromedriver.log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(address, driver)
            opened = Browser(address, folder / "profile")
            try:
                yield opened
            finally:
                opened.close()
        finally:
            driver.terminate()
            driver.wait(timeout=30)


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _wait_for(address: str, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while driver.poll() is None and time.monotonic() < deadline:
        try:
            if _ask("GET", f"{address}/status")["ready"]:
                return
        except urllib.error.URLError:  # noqa: PERF203 - it waits
            time.sleep(0.1)
    raise RuntimeError("chromedriver did not start")


def _ask(method: str, address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {address}: {error.read().decode()}") from error
