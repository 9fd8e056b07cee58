"""The page as a reader meets it, in a browser; and as text, where no browser is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import web_driver
from lightning_xai.report.comparison import OrderTest
from lightning_xai.report.composition import Composer, Options
from lightning_xai.report.report_files import write_report
from lightning_xai.results.run_folders import load_runs
from result_folders import write_evaluation, write_grid, write_roar, write_training
from web_driver import ENTER, Browser, browser

from lightning_xai.report.tables import per_pair_csv, read_csv

HOSTILE = "<script>document.title = 'broken into'</script><img src=x onerror=alert(1)>"
LONG = "word" * 60
SKILLS = {"feature_pair": 0.4, "m2ib": 0.5, "random": 0.1}
OPTIONS = Options(OrderTest(bootstrap_samples=20))

needs_browser = pytest.mark.skipif(web_driver.missing() is not None, reason=str(web_driver.missing()))


def put_hostile_text(folder: Path) -> None:
    """Hostile text wherever an evaluation's files have text."""
    for path in folder.glob("*/grounding.csv"):
        rows = read_csv(path)
        names = {"circle": HOSTILE, "star": "a & b | c % $x$"}
        changed = [row | {"label": names.get(row["label"], row["label"]), "caption": HOSTILE} for row in rows]
        per_pair_csv(path, changed, tuple(rows[0]))
    for path in folder.glob("*/examples.json"):
        record = json.loads(path.read_text())
        for example in record["examples"]:
            example |= {"caption": HOSTILE, "label": example["label"].replace("circle", HOSTILE)}
        path.write_text(json.dumps(record))
    record = json.loads((folder / "result.json").read_text())
    record["data"]["name"] = record["model"]["name"] = record["settings"][HOSTILE] = HOSTILE
    (folder / "result.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it, and hostile text wherever files have text."""
    folder = tmp_path_factory.mktemp("runs")
    for name, gain in (("before", 0.0), ("after", 0.3)):
        write_evaluation(folder / name, {label: skill + gain for label, skill in SKILLS.items()}, images=60)
        put_hostile_text(folder / name)
    write_roar(folder / "roar", SKILLS, missing=(f"{HOSTILE}/image/0",))
    write_grid(folder / "grid")
    write_training(folder / "training", [0.1, 0.5], images=60)
    runs = load_runs([folder / name for name in ("before", "after", "roar", "grid", "training")])
    composed = Composer(runs, OPTIONS).sections()
    return write_report(folder / "out", f"Title {HOSTILE} {LONG}", f"{HOSTILE} {LONG}", composed, f"{HOSTILE} {LONG}")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


class Outline(HTMLParser):
    """Tags with their attributes, and the levels of headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_holds_all_in_itself_and_names_nothing_outside(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    images = [str(image["src"]) for image in outline.all("img")]
    assert images
    assert all(source.startswith(("data:image/svg+xml;base64,", "data:image/webp;base64,")) for source in images)
    assert all(image["alt"] for image in outline.all("img"))
    links = [str(link["href"]) for tag in ("a", "link") for link in outline.all(tag)]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not {"iframe", "object", "embed", "form", "base"} & {tag for tag, _ in outline.tags}
    policy = next(str(meta["content"]) for meta in outline.all("meta") if meta.get("http-equiv"))
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[A-Za-z0-9+/=]{44}'; "
        r"base-uri 'none'; form-action 'none'",
        policy,
    )


def test_text_of_files_makes_no_tags(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert text.count("<script") == 1
    outline = Outline(text)
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert not any(attributes.get("src") == "x" for attributes in outline.all("img"))


def test_headings_are_in_order_ids_are_unique_and_links_lead_somewhere(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    ids = [str(attributes["id"]) for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [str(link["href"])[1:] for link in outline.all("a")]
    targets += [str(box["aria-labelledby"]) for _, box in outline.tags if "aria-labelledby" in box]
    assert set(targets) <= set(ids)
    assert {"overview", "grounding", "training", "signs", "degradation", "significance", "gaps", "heat-maps"} <= set(
        targets
    )


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    write_training(tmp_path / "training", [0.1, 0.5])
    pages = []
    for name in ("one", "two"):
        sections = Composer(load_runs([tmp_path / "training"]), OPTIONS).sections()
        pages.append(write_report(tmp_path / name, "t", "", sections, "").read_bytes())
    assert pages[0] == pages[1]


def test_the_files_of_an_earlier_report_go_and_no_others(tmp_path: Path) -> None:
    write_training(tmp_path / "training", [0.1, 0.5])
    write_roar(tmp_path / "roar", SKILLS)
    out = tmp_path / "out"
    for name in ("training", "roar"):
        write_report(out, "t", "", Composer(load_runs([tmp_path / name]), OPTIONS).sections(), "")
        (out / "tables" / "mine.csv").write_text("kept")
    assert not (out / "tables" / "grounding.csv").exists()
    assert not list((out / "figures").glob("gamma*"))
    assert (out / "tables" / "mine.csv").read_text() == "kept"
    listed = json.loads((out / "report.json").read_text())["files"]
    found = {str(path.relative_to(out)) for path in out.glob("*/*")} - {"tables/mine.csv"}
    assert sorted(found) == sorted(listed)
    (tmp_path / "precious.csv").write_text("kept")
    (out / "report.json").write_text(
        json.dumps({"files": ["tables/../../precious.csv", str(tmp_path / "precious.csv"), 3]})
    )
    write_report(out, "t", "", Composer(load_runs([tmp_path / "roar"]), OPTIONS).sections(), "")
    assert (tmp_path / "precious.csv").read_text() == "kept"


@needs_browser
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_every_picture_loads_nothing_is_complained_about_and_the_page_never_scrolls_sideways(
    window: Browser, page: Path, width: int, dark: bool
) -> None:
    window.console()
    window.open(page, width=width, dark=dark)
    assert window.console() == []
    assert str(window.run("return document.title")).startswith("Title <script>")
    window.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    decoded = window.run(
        "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 10, () => false)))"
    )
    assert decoded
    assert all(decoded)
    assert window.run("return document.documentElement.scrollWidth") <= width
    ground = window.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


ROWS = """
const table = document.querySelector('#table-grounding table');
return [...table.tBodies].map(body => [...body.rows].filter(row => !row.classList.contains('group')).map(row =>
  [...row.children].map(cell => cell.dataset.value === undefined ? cell.textContent
    : cell.dataset.value === '' ? null : Number(cell.dataset.value))));
"""
SORTED = "return [...document.querySelectorAll('#table-grounding th[aria-sort]')].map(h => h.getAttribute('aria-sort'))"


@needs_browser
def test_a_table_is_sorted_by_click_and_by_keyboard_within_its_groups(window: Browser, page: Path) -> None:
    window.open(page)
    before = window.run(ROWS)
    assert len(before) == 2
    assert len(before[0]) > 2
    button = "#table-grounding th:nth-child(4) button"
    for key, order in (("", "descending"), (ENTER, "ascending"), (" ", "descending")):
        if key:
            window.press(button, key)
        else:
            window.click(button)
        rows = window.run(ROWS)
        for body, old in zip(rows, before, strict=True):
            numbers = sorted((row[3] for row in old if row[3] is not None), reverse=order == "descending")
            assert [row[3] for row in body] == numbers + [None] * (len(old) - len(numbers))
            assert sorted(map(str, body)) == sorted(map(str, old)), "rows stay whole, and in their group"
        marks = window.run(SORTED)
        assert marks[3] == order
        assert set(marks[:3] + marks[4:]) == {"none"}
    window.click("#table-grounding th:nth-child(3) button")
    assert window.run(SORTED)[2:4] == ["ascending", "none"]
    names = [row[2] for row in window.run(ROWS)[0]]
    assert names == sorted(names)


@needs_browser
def test_numbers_are_sorted_as_numbers_and_what_has_none_stays_last(window: Browser, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"feature_pair": 0.4, "m2ib": 0.6}, examples=False)
    write_evaluation(tmp_path / "b", {"feature_pair": 0.9}, images=1200, fingerprint="2", weights="b", examples=False)
    write_evaluation(tmp_path / "c", {"feature_pair": 0.9}, images=99, fingerprint="3", weights="c", examples=False)
    runs = load_runs([tmp_path / name for name in "abc"])
    window.open(write_report(tmp_path / "out", "t", "", Composer(runs, OPTIONS).sections(), ""))
    column = "return [...document.querySelectorAll('#table-left_out tbody tr')].map(r => r.children[3].textContent)"
    window.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    window.click("#table-left_out th:nth-child(4) button")
    shown = [int(text.replace(",", "")) for text in window.run(column)]
    assert shown == sorted(shown, reverse=True)
    assert max(shown) > 1000 > 200 > min(shown)
    values = "return [...document.querySelectorAll('#table-left_out tbody tr')].map(r => r.children[4].dataset.value)"
    for _ in range(2):
        window.click("#table-left_out th:nth-child(5) button")
        found = [value != "" for value in window.run(values)]
        assert found == sorted(found, reverse=True)


@needs_browser
def test_all_can_be_reached_by_keyboard_and_the_first_stop_skips_to_the_results(window: Browser, page: Path) -> None:
    window.open(page)
    window.press("body", web_driver.TAB)
    assert window.run("return document.activeElement.className") == "skip"
    assert window.run("return document.activeElement.getBoundingClientRect().left") == 0
    boxes = window.run(
        "return [...document.querySelectorAll('.scroll')].map(b => [b.tabIndex, b.getAttribute('role')])"
    )
    assert boxes
    assert all(box == [0, "region"] for box in boxes)


@needs_browser
def test_charts_follow_the_readers_dark_mode(window: Browser, page: Path) -> None:
    corner = """
    const image = document.querySelector('#figure-roar-roar img'), canvas = document.createElement('canvas');
    return image.decode().then(() => {
      canvas.width = canvas.height = 4;
      const pen = canvas.getContext('2d');
      pen.drawImage(image, 0, 0, 4, 4, 0, 0, 4, 4);
      return [...pen.getImageData(1, 1, 1, 1).data];
    });
    """
    found = []
    for dark in (False, True):
        window.open(page, dark=dark)
        found.append(window.run(corner))
    assert found == [[255, 255, 255, 255], [20, 23, 27, 255]]
