"""The explorer as a reader meets it, in a real Chromium: pointer, drag, box, keys, touch, and the drawn pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser_pages import opened, serious
from numpy.typing import NDArray

from lightning_xai.report.explanation import Token
from lightning_xai.report.explorer import (
    ExplorerCaption,
    ExplorerItem,
    ExplorerReading,
    Mode,
    explorer_frame,
    explorer_page,
)
from lightning_xai.report.explorer.page import quantised
from lightning_xai.report.plots import COLOURS, Scale, scaled

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ROWS, COLUMNS = 3, 4
SCALES: tuple[Scale, ...] = ("positive", "range")
WORDS = ("two", "dogs", "on", "a", "skate", "board")
HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=document.title='broken'>",
    "<b>bold</b>",
    "${document.title='broken'}",
    "{{ 7*7 }}",
    "&quot;&lt;",
    "line\u2028separator\u2029",
    "half \ud83d of a character",
    "]]><!--",
)
Values = NDArray[np.floating]
Show = Callable[..., "Page"]


def tokens(marked: Sequence[int] = (), words: Sequence[str] = WORDS) -> list[Token]:
    return [Token(word, word == "board", place in marked) for place, word in enumerate(words)]


def pairs(seed: int = 0, count: int = len(WORDS)) -> Values:
    return np.random.default_rng(seed).normal(size=(count, ROWS, COLUMNS))


def reading(values: Values, method: str = "pairwise", **options: Any) -> ExplorerReading:
    given: dict[str, Any] = {"completeness_error": 1.5e-3, "similarity": 0.25, "where": "inputs"} | options
    return ExplorerReading(
        method, tokens_by_patches=values, image=values.sum(axis=0) + 0.1, text=values.sum(axis=(1, 2)) - 0.1, **given
    )


def apart(image: Values, method: str = "separate", scale: Scale = "positive") -> ExplorerReading:
    text = np.linspace(0, 1, len(WORDS))
    return ExplorerReading(method, "", None, image, text, 0.25, scale=scale)


def item(
    readings: Sequence[ExplorerReading] | None = None,
    key: str = "dogs.png",
    *,
    caption: str = "two dogs on a skateboard",
    marked: Sequence[int] = (),
    against: Sequence[ExplorerCaption] = (),
    **options: Any,
) -> ExplorerItem:
    photo = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    own = ExplorerCaption(caption, tokens(marked), readings or [reading(pairs())])
    return ExplorerItem(key, photo, [own, *against], **options)


@pytest.fixture
def shown(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Show items in a page of a browser, which has to end without complaint."""
    pages: list[tuple[Page, list[str]]] = []

    def show(*items: ExplorerItem, mode: Mode | None = None, title: str = "t", **options: Any) -> Page:
        path = tmp_path / "page.html"
        path.write_text(explorer_page(items, title=title, mode=mode), encoding="utf-8")
        pages.append(opened(browser, path, **options))
        return pages[-1][0]

    yield show
    for page, complaints in pages:
        page.close()
        assert not serious(complaints)


def value_of(page: Page, name: str) -> Any:
    """A value of the page's explorer, arrays as lists."""
    return page.evaluate(
        f"(v => v?.length === undefined ? v : [...v])(document.querySelector('.explorer').explorer.{name})"
    )


def canvas(page: Page, rows: int = ROWS, columns: int = COLUMNS) -> NDArray[np.uint8]:
    """The drawn pixels at the centres of all patches, [rows, columns, 4]."""
    flat = page.evaluate(
        """([rows, columns]) => {
          const canvas = document.querySelector('.stage canvas'), pen = canvas.getContext('2d'), found = [];
          for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
            const x = Math.floor((c + .5) * canvas.width / columns), y = Math.floor((r + .5) * canvas.height / rows);
            found.push(...pen.getImageData(x, y, 1, 1).data);
          }
          return found;
        }""",
        [rows, columns],
    )
    return np.array(flat, dtype=np.uint8).reshape(rows, columns, 4)


def assert_drawn(page: Page, values: Values, scale: Scale = "signed", low: float = -1, high: float = 1) -> None:
    """The canvas has the colours of the pictures: as opaque, and as blue and red as the opacity lets 8 bits tell."""
    expected = 255 * COLOURS(np.clip(scaled(values, scale), low, high) / 2 + 0.5)
    found = canvas(page, *values.shape).astype(float)
    np.testing.assert_allclose(found[..., 3], expected[..., 3], atol=2)
    share = expected[..., 3:] / 255
    np.testing.assert_allclose(found[..., :3] * share, expected[..., :3] * share, atol=2)


def chip(page: Page, place: int) -> Locator:
    return page.locator(".words .word").nth(place)


def patch_at(page: Page, row: float, column: float) -> tuple[float, float]:
    """A point of the window: the centre of a patch of what the model sees."""
    box = page.locator(".frame").bounding_box()
    assert box is not None
    return box["x"] + (column + 0.5) * box["width"] / COLUMNS, box["y"] + (row + 0.5) * box["height"] / ROWS


def opacities(page: Page) -> Values:
    colours = page.eval_on_selector_all(".words .word", "all => all.map(w => getComputedStyle(w).backgroundColor)")
    return np.array([float(found[1]) if (found := re.search(r", ([0-9.]+)\)", each)) else 1.0 for each in colours])


def assert_words(page: Page, values: Values, scale: Scale = "signed") -> None:
    np.testing.assert_allclose(value_of(page, "values"), values, atol=1e-3)
    np.testing.assert_allclose(opacities(page), COLOURS(scaled(values, scale) / 2 + 0.5)[:, 3], atol=0.01)


def test_the_whole_map_is_drawn_in_the_colours_of_the_pictures_and_a_word_has_its_own(shown: Show) -> None:
    page, values = shown(item()), pairs()
    assert_drawn(page, values.sum(axis=0) + 0.1)
    assert_words(page, values.sum(axis=(1, 2)) - 0.1)
    chip(page, 1).hover()
    assert_drawn(page, values[1])
    assert f"“dogs”, sum {values[1].sum():+.3g}".replace("-", "\u2212")[:18] in page.locator(".about.map").inner_text()
    page.mouse.move(5, 5)
    assert_drawn(page, values.sum(axis=0) + 0.1)


def test_between_patches_a_map_is_linear_and_no_value_is_beyond_those_of_the_patches(shown: Show) -> None:
    page = shown(item([apart(np.array([[0.0, 1.0]]))]))
    alphas = page.evaluate(
        """() => { const canvas = document.querySelector('.stage canvas');
          const {data, width} = canvas.getContext('2d').getImageData(0, 0, canvas.width, 1);
          return Array.from({length: width}, (_, x) => data[4 * x + 3]); }"""
    )
    place = (np.arange(len(alphas)) + 0.5) / len(alphas) * 2 - 0.5
    expected = 255 * COLOURS(np.clip(place, 0, 1) / 2 + 0.5)[:, 3]
    np.testing.assert_allclose(alphas, expected, atol=1.5)


def test_a_drag_across_words_chooses_the_phrase_that_stays_until_escape(shown: Show) -> None:
    page, values = shown(item()), pairs()
    chip(page, 3).hover()
    page.mouse.down()
    chip(page, 2).hover()
    chip(page, 1).hover()
    page.mouse.up()
    page.mouse.move(5, 5)
    assert value_of(page, "state.words") == [1, 2, 3]
    assert_drawn(page, values[1:4].sum(axis=0))
    assert "Map of “dogs on a”" in page.locator(".about.map").inner_text()
    page.keyboard.press("Escape")
    assert_drawn(page, values.sum(axis=0) + 0.1)
    chip(page, 5).click()
    assert value_of(page, "state.words") == [5]
    chip(page, 5).click()
    assert value_of(page, "state.words") == []


def test_pointing_at_a_patch_lights_its_words_and_a_click_keeps_them(shown: Show) -> None:
    # The model sees the middle of the photo: 160 of 200 pixels across.
    page, values = shown(item(frame=(20.0, 0.0, 180.0, 150.0))), pairs()
    page.mouse.move(*patch_at(page, 2, 3))
    assert_words(page, values[:, 2, 3])
    assert "row 3, column 4" in page.locator(".about.text").inner_text()
    page.mouse.move(*patch_at(page, 1, -1))  # hidden by the crop
    assert_words(page, values.sum(axis=(1, 2)) - 0.1)
    page.mouse.click(*patch_at(page, 0, 1))
    page.mouse.move(5, 5)
    assert_words(page, values[:, 0, 1])
    page.mouse.click(*patch_at(page, 0, 1))
    page.mouse.move(5, 5)
    assert_words(page, values.sum(axis=(1, 2)) - 0.1)


def test_a_drawn_box_lights_the_words_of_the_patches_that_it_covers(shown: Show) -> None:
    page, values = shown(item()), pairs()
    page.mouse.move(*patch_at(page, 2.3, 2.3))
    page.mouse.down()
    page.mouse.move(*patch_at(page, 0.7, 0.2), steps=3)
    page.mouse.up()
    page.mouse.move(5, 5)
    # From 0.7 to 2.8 patches across and from 1.2 to 2.8 down: to the nearest edges, as boxes are everywhere.
    assert_words(page, values[:, 1:3, 1:3].sum(axis=(1, 2)))
    assert "4 of 12 patches" in page.locator(".about.text").inner_text()
    assert page.locator(".region").is_visible()


def test_a_box_where_the_model_sees_nothing_lights_no_words(shown: Show) -> None:
    page, values = shown(item(frame=(40.0, 0.0, 160.0, 150.0))), pairs()
    page.mouse.move(*patch_at(page, 0, -0.7))
    page.mouse.down()
    page.mouse.move(*patch_at(page, 2, -1.2), steps=3)
    page.mouse.up()
    assert page.locator(".region").is_hidden()
    assert_words(page, values.sum(axis=(1, 2)) - 0.1)


@pytest.mark.parametrize("edge", [75.0 - 1e-5, 75.0 + 1e-5])
def test_an_edge_in_the_middle_of_a_patch_moves_up_however_it_is_rounded(shown: Show, edge: float) -> None:
    page = shown(item(box=(edge, 0.0, 200.0, 150.0), asks_box=True))
    assert_words(page, pairs()[:, :, 2:].sum(axis=(1, 2)))


def test_the_only_word_has_no_colour_where_words_are_compared_with_each_other(shown: Show) -> None:
    image = np.arange(12.0).reshape(ROWS, COLUMNS)
    readings = [ExplorerReading(scale, "", None, image, np.array([0.3]), 0.2, scale=scale) for scale in SCALES]
    photo = np.zeros((150, 200, 3), dtype=np.uint8)
    page = shown(ExplorerItem("k", photo, [ExplorerCaption("dog", tokens(words=["dog"]), readings)]))
    assert_words(page, np.array([0.3]))
    page.select_option("select.method", label="range")
    np.testing.assert_array_equal(opacities(page), [0.0])


def test_keys_go_through_words_and_patches_and_shift_extends(shown: Show) -> None:
    page, values = shown(item()), pairs()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.classList.contains('stage')")
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    assert_words(page, values[:, 1:3, 0:2].sum(axis=(1, 2)))
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    assert value_of(page, "state.words") == [2, 3]
    assert_drawn(page, values[2:4].sum(axis=0))
    page.keyboard.press("End")
    assert value_of(page, "state.words") == [5]
    page.keyboard.press("Alt+ArrowLeft")  # the browser's
    assert value_of(page, "state.words") == [5]
    page.keyboard.press("Escape")
    assert value_of(page, "state.words") == []


def test_a_screen_reader_hears_the_strongest_patches_and_words(shown: Show) -> None:
    page, values = shown(item()), pairs()
    chip(page, 1).click()
    page.locator(".live", has_text="Map of “dogs”").wait_for(state="attached")
    row, column = np.unravel_index(np.abs(values[1]).argmax(), (ROWS, COLUMNS))
    said = page.locator(".live").text_content() or ""
    assert f"strongest patches row {row + 1} column {column + 1} " in said
    strongest = WORDS[int(np.abs(values.sum(axis=(1, 2)) - 0.1).argmax())]
    assert f"Strongest words: {strongest} " in said
    assert page.locator(".live").get_attribute("aria-live") == "polite"


def test_a_finger_taps_a_word_and_a_patch(shown: Show) -> None:
    page, values = shown(item(), has_touch=True, width=360), pairs()
    chip(page, 4).tap()
    assert_drawn(page, values[4])
    page.touchscreen.tap(*patch_at(page, 1, 2))
    assert_words(page, values[:, 1, 2])


def drag_finger(page: Page, *points: tuple[float, float]) -> None:
    """Put a finger on the first point and drag it through the others, as a screen reports it to the browser."""
    session = page.context.new_cdp_session(page)
    kinds = ["touchStart"] + ["touchMove"] * (len(points) - 1)
    for kind, (x, y) in zip(kinds, points, strict=True):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    session.detach()


def middle(element: Locator) -> tuple[float, float]:
    box = element.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_finger_drags_across_words_and_draws_a_box(shown: Show) -> None:
    page, values = shown(item(), has_touch=True, is_mobile=True, width=360), pairs()
    drag_finger(page, *(middle(chip(page, place)) for place in (1, 2, 3)))
    assert value_of(page, "state.words") == [1, 2, 3]
    assert_drawn(page, values[1:4].sum(axis=0))
    # Upwards, which elsewhere scrolls the page.
    before = page.evaluate("scrollY")
    drag_finger(page, *(patch_at(page, *point) for point in ((2.3, 2.3), (1.5, 1.2), (0.7, 0.2))))
    assert page.evaluate("scrollY") == before
    assert_words(page, values[:, 1:3, 1:3].sum(axis=(1, 2)))
    assert page.locator(".region").is_visible()


def test_signs_and_opacity_are_chosen(shown: Show) -> None:
    page, whole = shown(item()), pairs().sum(axis=0) + 0.1
    page.select_option("select.sign", "positive")
    assert_drawn(page, whole, low=0)
    page.select_option("select.sign", "negative")
    assert_drawn(page, whole, high=0)
    page.locator("input.opacity").fill("40")
    assert page.locator(".frame").evaluate("e => e.style.opacity") == "0.4"


def test_methods_and_captions_are_switched_with_their_numbers(shown: Show) -> None:
    other = reading(pairs(1), similarity=0.125)
    against = ExplorerCaption("six cats in a skateboard", tokens(words=("six", "cats", *WORDS[2:])), [other])
    image = np.arange(12.0).reshape(ROWS, COLUMNS)
    page = shown(item([reading(pairs()), apart(image)], against=[against]))
    assert "cosine similarity 0.250 · completeness error +0.00150" in page.locator(".numbers").inner_text()
    page.select_option("select.method", label="separate")
    assert_drawn(page, image, "positive")
    assert "rates words and patches separately" in page.locator(".panel .hint").inner_text()
    chip(page, 2).hover()
    assert_drawn(page, image, "positive")
    page.get_by_label("six cats in a skateboard").check()
    page.mouse.move(5, 5)
    assert page.locator(".words").inner_text() == "six cats on a skateboard"
    assert_drawn(page, pairs(1).sum(axis=0) + 0.1)
    assert "cosine similarity 0.125" in page.locator(".numbers").inner_text()


def test_what_was_asked_is_chosen_at_first(shown: Show) -> None:
    page, values = shown(item(marked=[1, 4])), pairs()
    assert_drawn(page, values[1] + values[4])
    box = (50.0, 50.0, 150.0, 150.0)
    assert_words(shown(item(box=box, asks_box=True)), values[:, 1:3, 1:3].sum(axis=(1, 2)))
    assert_words(shown(item(box=box)), values.sum(axis=(1, 2)) - 0.1)


@pytest.mark.parametrize(("value", "words"), [(0.5, "constant map"), (np.nan, "map not finite")])
def test_a_map_that_says_nothing_is_named_and_has_no_colour(shown: Show, value: float, words: str) -> None:
    page = shown(item([reading(np.full((len(WORDS), ROWS, COLUMNS), value))]))
    assert page.locator(".fault").inner_text() == words
    assert "NaN" not in page.locator(".panel").inner_text()
    assert not canvas(page).any()
    assert not opacities(page).any()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True), (360, False), (1280, True)])
def test_the_page_fits_and_follows_the_readers_theme(shown: Show, width: int, dark: bool) -> None:
    long = ExplorerCaption("w" * 300, tokens(words=["w" * 300] * 6), [reading(pairs(), "m" * 90)])
    page = shown(item(against=[long]), item(key="k" * 200), width=width, dark=dark, title="t" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (ground, ink) == (
        ("rgb(20, 23, 27)", "rgb(230, 233, 237)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    )
    assert_drawn(page, pairs().sum(axis=0) + 0.1)  # of one look in both


@pytest.mark.parametrize("scripts", [True, False])
def test_hostile_text_stays_text(shown: Show, scripts: bool) -> None:
    text = " ".join(HOSTILE)
    caption = ExplorerCaption(text, tokens(words=HOSTILE), [reading(pairs(count=len(HOSTILE)), text, note=text)])
    photo = np.zeros((20, 20, 3), dtype=np.uint8)
    hostile = [ExplorerItem(text, photo, [caption, caption], label=text, group=f"{text}{i}") for i in range(2)]
    page = shown(*hostile, title=text, mode="time", java_script_enabled=scripts)
    assert page.title().startswith("</script><script>document.title='broken'")
    words = page.locator(".words .word" if scripts else ".stills li:first-child .word").all_inner_texts()
    assert words[:7] == [*HOSTILE[:6], "line\u2028separator\u2029"]
    assert page.locator("img[src=x]").count() == page.locator("b").count() == 0
    assert page.locator("script").count() == 2


def test_without_javascript_the_still_picture_is_shown(shown: Show) -> None:
    page = shown(item(marked=[1]), java_script_enabled=False)
    assert page.locator(".still .photo").is_visible()
    assert page.locator(".still .heat").is_visible()
    assert "still picture" in page.locator("noscript").inner_text()
    assert not page.locator(".view").is_visible()


def test_a_strip_is_filtered_and_walked_through(shown: Show) -> None:
    items = [
        item([reading(pairs(seed))], f"{name}.png", caption=name) for seed, name in enumerate(("dog", "cat", "cow"))
    ]
    page = shown(*items)
    page.locator(".stills li").nth(2).click()
    assert_drawn(page, pairs(2).sum(axis=0) + 0.1)
    page.locator(".filter input").fill("CAT")
    assert page.locator(".stills li:visible").count() == 1
    assert page.locator(".filter output").inner_text() == "1 of 3"
    assert_drawn(page, pairs(1).sum(axis=0) + 0.1)
    page.locator(".filter input").fill("")
    page.locator(".stills li").nth(1).focus()
    page.keyboard.press("ArrowLeft")
    assert_drawn(page, pairs(0).sum(axis=0) + 0.1)
    assert page.locator(".stills li[aria-selected=true] .name").inner_text() == "dog.png"


def test_a_slider_goes_through_time_and_keeps_the_phrase(shown: Show) -> None:
    items = [
        item([reading(pairs(10 * group + epoch))], f"{group}.png", label=f"epoch {epoch}")
        for group in range(2)
        for epoch in range(3)
    ]
    page = shown(*items, mode="time")
    assert page.locator(".stills li").count() == 2
    chip(page, 1).click()
    page.locator(".time input").fill("0")
    page.mouse.move(5, 5)
    assert page.locator(".time output").inner_text() == "epoch 0"
    assert_drawn(page, pairs(0)[1])
    page.locator(".stills li").nth(1).click()
    assert page.locator(".time output").inner_text() == "epoch 0"
    assert_drawn(page, pairs(10).sum(axis=0) + 0.1)


def test_a_notebooks_frame_works_within_another_page(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<p>{explorer_frame([item()], title='<b>')}</p>", encoding="utf-8")
    page, complaints = opened(browser, path)
    frame = page.frame_locator("iframe")
    frame.locator(".words .word").nth(1).click()
    assert "“dogs”" in frame.locator(".about.map").inner_text()
    assert not [each for each in serious(complaints) if "about:srcdoc" not in each]
    page.close()


def test_values_are_off_by_half_a_step_at_most() -> None:
    values = pairs()
    steps, step = quantised(values)
    assert np.abs(steps * step - values).max() <= 0.5000001 * np.abs(values).max() / 32767


def test_a_page_of_the_largest_models_is_small() -> None:
    values = np.random.default_rng(0).normal(size=(40, 24, 24))  # ViT-L/14 at 336 pixels
    photo = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)  # noise, the largest of photos
    own = ExplorerCaption("w " * 40, tokens(words=["w"] * 40), [reading(values), reading(values)])
    size = len(explorer_page([ExplorerItem("k", photo, [own])], title="t").encode())
    assert size < 3_000_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ExplorerReading("m", "", pairs(), pairs()[0, :2], None, 0.1), "as text and"),
        (lambda: ExplorerCaption("a", tokens(), []), "at least one"),
        (lambda: ExplorerCaption("a", tokens()[:2], [reading(pairs())]), "each of 2 tokens"),
        (lambda: ExplorerItem("k", np.zeros((2, 2), dtype=np.uint8), []), "expected \\[height, width, 3\\]"),
        (lambda: item(asks_box=True), "no box to ask about"),
        (lambda: explorer_page([], title="t"), "cannot show 0 items"),
        (lambda: explorer_page([item(), item()], title="t", mode="single"), "cannot show 2 items"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
