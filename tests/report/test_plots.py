from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report.plots import (
    Example,
    GradedMap,
    curves,
    heat_fault,
    panel,
    progress_sheet,
    rasterize,
    save_figure,
)
from lightning_xai.report.sheet import Sheet
from lightning_xai.results.record import Score

SCORES = tuple(
    Score(name=name, value="gamma", heading=heading, percent=True)
    for name, heading in (("gamma_above_50", "γ > 0.5"), ("rho", "ρ"))
)
YELLOW = np.array([255, 214, 10])
HIGHLIGHT = np.array([0xFF, 0xE6, 0x80])
GREY = np.full((64, 64, 3), 0.5)


def example(caption: str = "a red ring and a blue star", phrase: str = "a blue star", size: int = 64) -> Example:
    image = np.random.default_rng(0).random((size, size, 3))
    start = caption.index(phrase)
    box = (0.25 * size, 0.25 * size, 0.75 * size, 0.5 * size)
    return Example(image, phrase, caption, ((start, start + len(phrase)),), box, "key")


def heat(seed: int = 0) -> NDArray[np.floating]:
    return np.random.default_rng(seed).normal(size=(8, 8))


MAP = GradedMap(heat(), 0.5, True)


def overlay(image: Any, values: Any, box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    """A heat map as sheets show it, in the size of the image."""
    sheet = Sheet(image.shape[1], "")
    return rasterize(sheet.close(panel(sheet, Example(image, "", "", (), box), (0, 0), max(image.shape), values)))


def redness(picture: NDArray[np.uint8]) -> NDArray[np.int64]:
    return picture[..., 0].astype(np.int64) - picture[..., 2]


def sheet_of(examples: list[Example], maps: list[GradedMap], title: str = "t") -> Figure:
    return progress_sheet(examples, [maps], ["after"], title)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def highlights(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_positive_is_red_negative_is_blue_and_zero_leaves_grey() -> None:
    one = np.zeros((4, 4))
    one[0, 0], one[3, 3] = 2.0, -1.0
    difference = redness(overlay(GREY, one))
    assert difference[8, 8] > 100
    assert difference[56, 56] < -50
    assert difference[8, 56] == difference[56, 8] == 0
    # Half the magnitude is half the strength, up to the two colours' own difference.
    assert abs(difference[56, 56]) < 0.7 * difference[8, 8]


def test_the_map_is_laid_over_the_patches_it_belongs_to_also_where_the_picture_is_not_square() -> None:
    single = np.zeros((2, 4))
    single[1, 2] = 1.0
    picture = overlay(np.full((40, 120, 3), 0.5), single)
    assert picture.shape == (40, 120, 3)
    row, column = np.unravel_index(int(redness(picture).argmax()), (40, 120))
    assert 20 <= row < 40
    assert 60 <= column < 90


def test_a_red_object_does_not_pass_for_attribution() -> None:
    image = GREY.copy()
    image[:32] = (1.0, 0.0, 0.0)
    only_below = np.zeros((2, 2))
    only_below[1, 0] = 1.0
    difference = redness(overlay(image, only_below))
    assert difference[56, 8] > 4 * difference[4, 60]


def test_the_strongest_colour_is_that_of_the_largest_magnitude() -> None:
    ramp = np.array([[0.0, 1.0]])
    assert np.array_equal(overlay(GREY, ramp), overlay(GREY, 1e-6 * ramp))
    assert redness(overlay(GREY, ramp + np.array([[-10.0, 0.0]]))).max() < redness(overlay(GREY, ramp)).max() / 5


def test_the_box_is_outlined_and_its_inside_is_not_painted_over() -> None:
    plain, boxed = overlay(GREY, heat()), overlay(GREY, heat(), box=(10, 20, 30, 40))
    yellow = (boxed == YELLOW).all(-1)
    for side in (yellow[18:22, 14:27], yellow[38:42, 14:27], yellow[24:37, 8:12].T, yellow[24:37, 28:32].T):
        assert side.any(axis=0).all()
    assert not yellow[23:37, 13:27].any()
    assert np.array_equal(plain[23:37, 13:27], boxed[23:37, 13:27])
    assert (overlay(GREY, heat(), box=(-50, -50, 200, 200)) == YELLOW).all(-1).any(), "a box may leave the image"


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan])
def test_a_map_that_says_nothing_leaves_the_image_with_its_box_and_is_named(value: float) -> None:
    image = np.random.default_rng(1).random((64, 64, 3))
    sheet = Sheet(64, "")
    panel(sheet, Example(image, "", "", (), (10, 10, 30, 30)), (0, 0), 64, np.full((4, 4), value))
    (shown,) = sheet.figure.axes[0].images
    assert np.array_equal(np.asarray(shown.get_array()), image.astype(np.float32))
    assert len(highlights(sheet.figure)) == 1
    assert heat_fault(np.full((4, 4), value)) in texts(sheet.figure)


@pytest.mark.parametrize("image", [np.zeros((3, 8, 8)), np.zeros((8, 8))])
def test_wrong_shapes_are_refused(image: Any) -> None:
    with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
        sheet_of([Example(image, "", "", ())], [MAP])


def test_the_sheet_shows_the_caption_gamma_and_hit_of_each_example() -> None:
    graded = [GradedMap(heat(), gamma, gamma == 0.83) for gamma in (0.83, math.nan, 0.1)]
    flat = GradedMap(np.zeros((8, 8)), math.nan, False)
    sheet = sheet_of([example()] * 4, [*graded, flat], "Title")
    shown = texts(sheet)
    assert {"constant map", "no γ"} <= set(shown)
    assert shown.count("a red ring and a blue star") == 4
    assert any("0.83" in text and "hit" in text for text in shown)
    assert any("nothing positive" in text and "miss" in text for text in shown)
    assert {"Title", "image", "after"} <= set(shown)


def test_the_highlight_lies_under_the_phrase_and_nowhere_else() -> None:
    def columns_of(caption: str, spans: tuple[tuple[int, int], ...]) -> tuple[list[int], list[int]]:
        sheet = rasterize(sheet_of([Example(GREY, "", caption, spans)], [MAP]))
        line = sheet[69:86]  # below the title and the columns' names
        ink = np.flatnonzero((line < 120).all(-1).any(0))
        return ink.tolist(), np.flatnonzero((line == HIGHLIGHT).all(-1).any(0)).tolist()

    before, upto = columns_of("iiiiiii", ())[0], columns_of("iiiiiii WWWW", ())[0]
    ink, yellow = columns_of("iiiiiii WWWW iiiiiii", ((8, 12),))
    phrase = [column for column in upto if column > before[-1]]
    behind = [column for column in ink if column > upto[-1]]
    assert before[-1] < yellow[0] <= phrase[0]
    assert phrase[-1] <= yellow[-1] < behind[0]


def test_a_long_caption_is_wrapped_and_no_character_or_highlight_is_lost() -> None:
    phrase = "a very long winded phrase that certainly will not fit on a single line of the narrow panel"
    caption = f"there is {phrase} and {'x' * 120} after it"
    sheet = sheet_of([example(caption, phrase)], [MAP])
    lines = [text for text in texts(sheet) if text in caption and text not in ("", "t", "after")]
    assert "".join(lines).replace(" ", "") == caption.replace(" ", "")
    assert len(highlights(sheet)) >= 2
    for text in sheet.axes[0].texts:
        extent = text.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= sheet.bbox.width + 1


@pytest.mark.parametrize(
    "caption", ["costs $5 or $6_x^2", "two\nlines\tand a tab", r"\frac{a}{b} {", "a \ud800 b", " "]
)
def test_no_caption_breaks_the_sheet(caption: str) -> None:
    odd = Example(GREY, "", caption, ((0, 1), (5, 500), (3, 3)), None)
    assert rasterize(sheet_of([odd], [MAP], caption)).std() > 0


def test_small_images_are_enlarged_to_sharp_squares() -> None:
    checkers = np.indices((16, 16)).sum(0) % 2
    image = np.repeat(checkers[..., None], 3, axis=2).astype(float)
    sheet = rasterize(progress_sheet([Example(image, "", "", ())], [[MAP]], ["before"], side=320))
    top, left = 88, 16  # the title, the columns' names and the caption are above
    panel = sheet[top : top + 320, left : left + 320]
    assert set(np.unique(panel)) == {0, 255}
    assert np.array_equal(panel, np.kron(image, np.ones((20, 20, 1))).astype(np.uint8) * 255)


def test_the_progress_sheet_keeps_the_first_and_the_last_epoch() -> None:
    names = ["before", *(f"epoch {number}" for number in range(1, 12))]
    maps = [[GradedMap(heat(epoch), gamma, True) for gamma in (epoch / 100, 0.5)] for epoch in range(12)]
    sheet = progress_sheet([example(), example()], maps, names, columns=4)
    shown = texts(sheet)
    assert [text for text in shown if text in names] == ["before", "epoch 6", "epoch 11"]
    assert [text for text in shown if text.startswith("γ")] == [
        f"γ = {gamma}   ✓ hit" for gamma in ("0.00", "0.06", "0.11", "0.50", "0.50", "0.50")
    ]
    assert len(sheet.axes[0].images) == 2 * (1 + 2 * 3)


def test_lengths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        sheet_of([], [])
    with pytest.raises(ValueError, match="maps: expected 2 entries, got 1"):
        progress_sheet([example()], [[MAP]], ["before", "epoch 1"])
    with pytest.raises(ValueError, match="maps of before: expected 1 entries, got 0"):
        progress_sheet([example()], [[]], ["before"])
    with pytest.raises(ValueError, match="columns"):
        progress_sheet([example()], [[MAP]], ["before"], columns=1)


def test_curves_draw_percent_over_finished_epochs_with_gaps_for_nan() -> None:
    rows = [
        {"epoch": epoch, "gamma_mean": 0.2, "gamma_above_50": share, "examples": {"keys": ["a"]}, "rho": 0.9}
        for epoch, share in ((0, 0.05), (2, math.nan), (4, 0.46))
    ]
    (axes,) = curves(rows, scores=SCORES).axes
    above_50 = next(line for line in axes.lines if "0.5" in str(line.get_label()))
    assert np.array_equal(np.asarray(above_50.get_xdata()), [0, 2, 4])
    assert np.allclose(np.asarray(above_50.get_ydata(), dtype=float), [5, math.nan, 46], equal_nan=True)
    assert "5.0 → 46.0 %" in str(above_50.get_label())
    assert axes.get_ylim()[1] >= 90
    assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "2", "4"]


def test_curves_accept_nothing_but_nan_and_refuse_rows_without_epoch() -> None:
    assert not curves([{"epoch": 0, "rho": math.nan}], scores=SCORES).axes[0].lines
    for rows in ([], [{"rho": 0.5}]):
        with pytest.raises(ValueError, match="epoch"):
            curves(rows, scores=SCORES)


def test_figures_are_written_whole_in_the_size_they_were_laid_out(tmp_path: Path) -> None:
    sheet = sheet_of([example()], [MAP])
    save_figure(sheet, tmp_path / "new" / "sheet.png")
    saved = np.asarray(Image.open(tmp_path / "new" / "sheet.png").convert("RGB"))
    assert np.array_equal(saved, rasterize(sheet))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="docx"):
        save_figure(sheet, tmp_path / "sheet.docx")


@pytest.mark.slow
def test_drawing_never_touches_pyplot() -> None:
    code = (
        "import sys, numpy as np\n"
        "from lightning_xai.report.plots import *\n"
        "one = Example(np.zeros((8, 8, 3)), 'a', 'a b', ((0, 1),), (1, 1, 5, 5))\n"
        "rasterize(progress_sheet([one], [[GradedMap(np.eye(2), 0.5, True)]], ['before']))\n"
        "rasterize(curves([{'epoch': 0, 'rho': 0.5}], scores=()))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
