"""Measures the explorer: how large its pages are, how long they take to write and to open, and how long a hover takes.

    python benchmarks/explorer.py

Needs an installed Chromium and Playwright (extra `[test]`). Photos are smooth noise of 1024 x 768 pixels, which JPEG
takes as hard as photos; interactions are random. A hover is all the script's work from the pointer's event to the
layout of the page, over each word and each patch. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kept_table import keep
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from lightning_xai.report.explanation import Token
from lightning_xai.report.explorer import ExplorerCaption, ExplorerItem, ExplorerReading, explorer_page

PAGES = (  # name, pairs, patches along a side, tokens, readings
    ("ViT-B/16 at 224, 12 tokens", 1, 14, 12, 2),
    ("ViT-L/14 at 336, 40 tokens", 1, 24, 40, 2),
    ("1,024 patches, 40 tokens", 1, 32, 40, 2),
    ("100 pairs, ViT-B/16 at 224, 12 tokens", 100, 14, 12, 2),
)
HOVER = """() => {
  const explorer = document.querySelector('.explorer').explorer, times = [];
  const { rows, columns } = explorer.reading, words = explorer.chips.length;
  for (let i = 0; i < 400; i++) {
    explorer.overWord = i % 2 ? (i * 7) % words : null;
    const patch = [(i * 5) % rows, (i * 3) % columns];
    explorer.overRegion = i % 2 ? null : explorer.patchRegion(patch, patch);
    const start = performance.now();
    explorer.render();
    document.body.getBoundingClientRect();
    times.push(performance.now() - start);
  }
  return times;
}"""
OPENED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"


def photo(seed: int) -> NDArray[np.uint8]:
    """Smooth noise with some grain, [768, 1024, 3]."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((1024, 768))
    grain = random.normal(0, 6, (768, 1024, 1))
    return np.asarray(np.clip(np.asarray(coarse) + grain, 0, 255), dtype=np.uint8)


def items(pairs: int, side: int, tokens: int, readings: int) -> list[ExplorerItem]:
    words = [Token(f"word{place}") for place in range(tokens)]
    found = []
    for seed in range(pairs):
        values = np.random.default_rng(seed).normal(size=(tokens, side, side)).astype(np.float32)
        one = ExplorerReading("feature_pair", "", values, values.sum(axis=0), values.sum(axis=(1, 2)), 0.3, 1e-3)
        caption = ExplorerCaption(" ".join(word.text for word in words), words, [one] * readings)
        found.append(ExplorerItem(f"{seed}.jpg", photo(seed), [caption]))
    return found


def opening(browser: Browser, path: Path) -> tuple[float, list[float]]:
    """Seconds until a page is drawn, and sorted milliseconds of 400 hovers on it."""
    page = browser.new_page()
    page.goto(path.as_uri())
    opened = page.evaluate(OPENED)
    page.evaluate(HOVER)  # warm
    times = sorted(page.evaluate(HOVER))
    page.close()
    return opened / 1000, times


def rows(browser: Browser, folder: Path, tries: int) -> Iterator[str]:
    """Lines of the table."""
    for name, *shape in PAGES:
        shown, path, written = items(*shape), folder / "page.html", []
        for _ in range(tries):
            start = time.perf_counter()
            path.write_text(explorer_page(shown, title=name), encoding="utf-8")
            written.append(time.perf_counter() - start)
        found = [opening(browser, path) for _ in range(tries)]
        times = min((each for _, each in found), key=statistics.median)
        hover = f"{statistics.median(times):.1f} | {times[int(0.99 * len(times))]:.1f}"
        opened = min(each for each, _ in found)
        yield f"| {name} | {path.stat().st_size / 1e6:.2f} | {min(written):.2f} | {opened:.2f} | {hover} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3)
    tries = parser.parse_args().tries
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("install Chromium, so that `chromium` is on the PATH")
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found = list(rows(browser, Path(folder), tries))
        version = browser.version
        browser.close()
    measured = [
        f"Photos of 1024 x 768 pixels, Chromium {version}; the best of {tries} tries. On a page of many, photos are "
        "reduced. Hover: milliseconds of 400 hovers over words and patches, from the event to the layout.",
        "",
        "| page | MB | written, s | opened, s | hover, median ms | hover, 99th percentile ms |",
        "|---|---|---|---|---|---|",
        *found,
    ]
    keep("explorer", "The explorer", "cpu", "\n".join(measured))


if __name__ == "__main__":
    main()
