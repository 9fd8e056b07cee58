"""The page as a reader meets it, in a real Chromium; and as text, where none is installed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from browser_pages import opened, serious
from result_folders import SKILLS, put_examples, rewrite, write_evaluation, write_grid, write_roar, write_training

from lightning_xai.report.build import build_sections, write_report
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.results.examples import read_examples, write_examples
from lightning_xai.results.runs import load_runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<script>document.title = 'broken into'</script><img src=x onerror=alert(1)>"
LONG = "word" * 60


def put_hostile_text(folder: Path) -> None:
    """Put hostile text wherever an evaluation's files have text."""
    names = {"circle": HOSTILE, "star": "a & b | c % $x$"}
    rewrite(
        folder,
        lambda values, targets: (values, targets.assign(label=targets["label"].replace(names), caption=HOSTILE)),
        data={"name": HOSTILE, "fingerprint": "1"},
        model={"name": HOSTILE},
        settings={HOSTILE: HOSTILE},
    )
    for path in folder.glob("*/examples.json"):
        found = [
            msgspec.structs.replace(each, caption=HOSTILE, label=names.get(each.label, each.label))
            for each in read_examples(path.parent)
        ]
        write_examples(path.parent, found)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it, and hostile text wherever files have text."""
    folder = tmp_path_factory.mktemp("runs")
    for name, gain in (("before", 0.0), ("after", 0.3)):
        write_evaluation(folder / name, {label: skill + gain for label, skill in SKILLS.items()}, seeds=2)
        put_examples(folder / name, SKILLS)
        put_hostile_text(folder / name)
    losses = {("m2ib", "image"): (2.5,), ("rise", "image"): (2.4,), ("random", "image"): (2.0,)}
    write_roar(folder / "roar", losses, missing=(f"{HOSTILE}/image/0",))
    write_grid(folder / "grid")
    write_training(folder / "training", [0.1, 0.5])
    runs = load_runs([folder / name for name in ("before", "after", "roar", "grid", "training")])
    sections, _ = build_sections(runs, OrderTest(bootstrap_samples=20))
    return write_report(folder / "out", f"Title {HOSTILE} {LONG}", f"{HOSTILE} {LONG}", sections, f"{HOSTILE} {LONG}")


class Outline(HTMLParser):
    """Tags with their attributes, in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_holds_everything_in_itself_and_names_nothing_outside(path: Path) -> None:
    outline = Outline(path.read_text(encoding="utf-8"))
    images = outline.all("img")
    assert images
    assert all(str(i["src"]).startswith(("data:image/svg+xml;base64,", "data:image/webp;base64,")) for i in images)
    assert all(image["alt"] for image in images)
    links = [str(link["href"]) for tag in ("a", "link") for link in outline.all(tag)]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not {"iframe", "object", "embed", "form", "base"} & {tag for tag, _ in outline.tags}
    policy = next(str(meta["content"]) for meta in outline.all("meta") if meta.get("http-equiv"))
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[A-Za-z0-9+/=]{44}'; "
        r"base-uri 'none'; form-action 'none'",
        policy,
    )


def test_text_of_files_makes_no_tags(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert text.count("<script") == 1
    outline = Outline(text)
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert not any(attributes.get("src") == "x" for attributes in outline.all("img"))


def test_headings_are_in_order_ids_are_unique_and_links_lead_somewhere(path: Path) -> None:
    outline = Outline(path.read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    ids = [str(attributes["id"]) for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {str(link["href"])[1:] for link in outline.all("a")}
    targets |= {str(box["aria-labelledby"]) for _, box in outline.tags if "aria-labelledby" in box}
    assert targets <= set(ids)
    assert {"overview", "metric-grounding", "training", "metric-roar", "significance", "gaps", "heat-maps"} <= targets


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_every_picture_loads_without_complaint_and_the_page_never_scrolls_sideways(
    browser: Browser, path: Path, width: int, dark: bool
) -> None:
    page, complaints = opened(browser, path, width=width, dark=dark)
    assert page.title().startswith("Title <script>")
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    decoded = page.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 10, () => false)))"
    )
    assert decoded
    assert all(decoded)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert not serious(complaints)


def rows_of(page: Page, table: str) -> list[list[Any]]:
    """The table's rows: numbers of cells that have them, None of empty ones, else text; baselines are marked."""
    return page.evaluate(  # type: ignore[no-any-return]
        """table => [...document.querySelectorAll(`#table-${table} tbody tr`)].map(row =>
             [row.querySelector('.baseline') !== null, ...[...row.cells].map(cell => {
               const data = cell.querySelector('data');
               return data === null ? cell.textContent : data.value === '' ? null : Number(data.value);
             })])""",
        table,
    )


@pytest.mark.slow
def test_a_table_is_sorted_by_click_and_key_with_baselines_aside_and_empty_cells_last(
    browser: Browser, path: Path, tmp_path: Path
) -> None:
    write_evaluation(tmp_path / "a", {"feature_pair": 0.4, "m2ib": 0.6, "rise": 0.5, "random": 0.1}, examples=False)
    rewrite(tmp_path / "a", lambda v, t: (v[(v["method"] != "rise") | (v["metric"] != "gamma")], t))
    sections, _ = build_sections(load_runs([tmp_path / "a"]), OrderTest(bootstrap_samples=20))
    page, _ = opened(browser, write_report(tmp_path / "out", "t", "", sections, ""))
    before = rows_of(page, "grounding")
    headings = page.locator("#table-grounding thead button")
    place = 3
    for press, order in (("", "descending"), ("Enter", "ascending"), ("Space", "descending")):
        heading = headings.nth(place - 1)
        if press:
            heading.press(press)
        else:
            heading.click()
        rows = rows_of(page, "grounding")
        assert sorted(map(str, rows)) == sorted(map(str, before)), "rows stay whole"
        assert [row[0] for row in rows] == [False, False, False, True]
        numbers = [row[place] for row in rows[:3]]
        assert numbers[:2] == sorted(numbers[:2], reverse=order == "descending")
        assert numbers[2] is None
        marks = page.eval_on_selector_all("#table-grounding th", "all => all.map(h => h.getAttribute('aria-sort'))")
        assert marks == ["none" if i != place - 1 else order for i in range(len(marks))]
    headings.nth(1).click()
    assert [row[2] for row in rows_of(page, "grounding")] == ["feature_pair", "m2ib", "rise", "random"]


def test_everything_is_reached_by_keyboard_and_the_first_stop_skips_to_the_results(
    browser: Browser, path: Path
) -> None:
    page, _ = opened(browser, path)
    page.keyboard.press("Tab")
    skip = page.evaluate("[document.activeElement.className, document.activeElement.getBoundingClientRect().left]")
    assert skip == ["skip", 0]
    boxes = page.eval_on_selector_all(".scroll", "all => all.map(b => [b.tabIndex, b.getAttribute('role')])")
    assert boxes
    assert all(box == [0, "region"] for box in boxes)


def test_charts_follow_the_readers_dark_mode(browser: Browser, path: Path) -> None:
    corner = """async () => {
      const image = document.querySelector('figure.chart img'), canvas = document.createElement('canvas');
      await image.decode();
      canvas.width = canvas.height = 4;
      const pen = canvas.getContext('2d');
      pen.drawImage(image, 0, 0, 4, 4, 0, 0, 4, 4);
      return [...pen.getImageData(1, 1, 1, 1).data];
    }"""
    found = [opened(browser, path, dark=dark)[0].evaluate(corner) for dark in (False, True)]
    assert found == [[255, 255, 255, 255], [20, 23, 27, 255]]
