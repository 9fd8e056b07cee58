"""Pictures of attributions: what is red, what is blue, what is said; and that nothing overlaps or leaves the sheet."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lightning_xai.report.explanation import (
    OtherText,
    Saliency,
    Token,
    comparison_sheet,
    explanation_sheet,
    image_pair_sheet,
    text_pair_sheet,
)
from lightning_xai.report.plots import Example, Scale, rasterize, scaled

CAPTION = "a red ring and a skateboard"
TOKENS = (
    Token("a"),
    Token("red", marked=True),
    Token("ring", marked=True),
    Token("and"),
    Token("a"),
    Token("skate"),
    Token("board", joined=True),
)
HEAT = np.array([[1.0, -2.0], [0.5, 0.0]])
TEXT = np.array([0.0, 4.0, -4.0, 0.0, 1.0, -1.0, 0.5])


def example(height: int = 32, width: int = 32, box: tuple[float, float, float, float] | None = None) -> Example:
    return Example(np.full((height, width, 3), 0.5), "red ring", CAPTION, ((2, 10),), box)


def saliency(
    name: str = "a_method", image: NDArray[Any] = HEAT, text: NDArray[Any] = TEXT, scale: Scale = "signed"
) -> Saliency:
    return Saliency(name, image, text, 0.25, scale, 1.5e-3)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def pictures(figure: Figure) -> list[NDArray[np.uint8]]:
    """What is drawn where the images are; heat maps lie over theirs."""
    drawn, axes = rasterize(figure), figure.axes[0]
    places = dict.fromkeys(tuple(map(round, image.get_extent())) for image in axes.images)
    return [drawn[top:bottom, left:right] for left, right, bottom, top in places]


def grounds(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def ground(figure: Figure, token: str) -> NDArray[Any]:
    """The colour that a token stands on."""
    (text,) = (each for each in figure.axes[0].texts if each.get_text() == token)
    x, y = text.get_position()
    (patch,) = (
        patch
        for patch in grounds(figure)
        if patch.get_x() <= x <= patch.get_x() + patch.get_width()
        and patch.get_y() + 1e-9 < y - 0.002 < patch.get_y() + patch.get_height()
    )
    *colour, alpha = to_rgba(patch.get_facecolor())
    return alpha * np.array(colour) + 1 - alpha


def assert_tidy(figure: Figure) -> None:
    """No text leaves the sheet or covers another one."""
    canvas: Any = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    width, height = figure.get_size_inches() * figure.dpi
    shown = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = np.array([text.get_window_extent(renderer).extents for text in shown])
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
    shared = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    covers = (shared >= 2).all(axis=-1) & ~np.eye(len(boxes), dtype=bool)
    assert not covers.any(), [shown[i].get_text() for i in np.unique(covers.nonzero()[0])]


@pytest.mark.parametrize("values", [np.full(4, 3.0), np.zeros((2, 2)), np.array([1.0, np.nan]), np.array([])])
@pytest.mark.parametrize("scale", ["signed", "positive", "range"])
def test_values_that_say_nothing_have_no_colour(values: NDArray[Any], scale: Scale) -> None:
    strengths = scaled(values, scale)
    assert strengths.shape == values.shape
    assert not strengths.any()


def test_patches_and_tokens_are_red_where_positive_and_blue_where_negative() -> None:
    figure = explanation_sheet(example(), TOKENS, [saliency()])
    _, heat = pictures(figure)
    red, blue = heat[0, 0].astype(int), heat[0, -1].astype(int)
    assert red[0] > red[2] + 40
    assert blue[2] > blue[0] + 40
    assert ground(figure, "red")[0] > ground(figure, "red")[2] + 0.4
    assert ground(figure, "ring")[2] > ground(figure, "ring")[0] + 0.4
    np.testing.assert_allclose(ground(figure, "and"), 1.0)


def test_the_title_says_the_method_the_similarity_and_the_completeness_error() -> None:
    figure = explanation_sheet(example(), TOKENS, [saliency()], asked="where it is", notes=["a note"])
    assert "a_method: where it is" in texts(figure)
    assert {"cosine similarity 0.250", "completeness error +1.5e-03"} <= set(texts(figure))
    assert "a note" in texts(figure)
    without = explanation_sheet(example(), TOKENS, [Saliency("m", HEAT, TEXT, 0.25)])
    assert "cosine similarity 0.250" in texts(without)


@pytest.mark.parametrize(
    ("shift", "scale", "numbers", "words"),
    [
        (0, "signed", {"-2", "2", "-4", "4", "0"}, "patches (blue against, red for)"),
        (6, "positive", {"0", "7", "10"}, "patches (no sign: white 0, red most)"),
        (0, "range", {"-2", "1", "-4", "4"}, "patches (white least, red most)"),
    ],
)
def test_the_colour_bars_state_their_numbers_and_what_they_mean(
    shift: float, scale: Scale, numbers: set[str], words: str
) -> None:
    figure = explanation_sheet(example(), TOKENS, [saliency(image=HEAT + shift, text=TEXT + shift, scale=scale)])
    labels = {label.get_text() for axes in figure.axes for label in axes.get_xticklabels()}
    assert numbers <= labels
    assert words in texts(figure)


@pytest.mark.parametrize(("value", "words"), [(0.5, "constant map"), (np.nan, "map not finite")])
def test_a_map_that_says_nothing_is_named_on_the_picture(value: float, words: str) -> None:
    figure = explanation_sheet(example(), TOKENS, [saliency(image=np.full((2, 2), value), text=np.full(7, value))])
    assert words in texts(figure)
    assert f"patches: {words}" in texts(figure)
    assert f"tokens: {words}" in texts(figure)
    compared = comparison_sheet(example(), TOKENS, [saliency(image=np.full((2, 2), value), text=np.full(7, value))])
    assert words in texts(compared)
    assert f"tokens: {words}" in texts(compared)


def test_the_phrase_is_yellow_in_the_caption_and_underlined_below() -> None:
    def yellow(marked: bool) -> int:
        tokens = [Token(token.text, token.joined, token.marked and marked) for token in TOKENS]
        picture = rasterize(explanation_sheet(example(), tokens, [saliency()]))
        return int((picture == (0xFF, 0xD6, 0x0A)).all(axis=-1).sum())

    highlight = (rasterize(explanation_sheet(example(), TOKENS, [saliency()])) == (0xFF, 0xE6, 0x80)).all(axis=-1)
    assert highlight.sum() > 300
    assert yellow(True) > yellow(False) + 50


def test_tokens_of_one_word_touch_and_words_stand_apart() -> None:
    figure = explanation_sheet(example(), TOKENS, [saliency()])
    chips = sorted(
        (patch.get_x(), patch.get_x() + patch.get_width()) for patch in grounds(figure) if patch.get_height() > 18.5
    )
    assert len(chips) == len(TOKENS)
    gaps = [second[0] - first[1] for first, second in pairwise(chips)]
    np.testing.assert_allclose(gaps, [5, 5, 5, 5, 5, 0], atol=0.01)


@pytest.mark.parametrize(("size", "count"), [((32, 32), 77), ((24, 60), 5), ((60, 24), 1)])
def test_nothing_overlaps_or_leaves_the_sheet(size: tuple[int, int], count: int) -> None:
    words = ["unbelievably", "a", "dog", "skateboarding"]
    tokens = [Token(words[i % 4], joined=i % 5 == 4, marked=i < 3) for i in range(count)]
    caption = " ".join(token.text for token in tokens)
    shown = Example(np.full((*size, 3), 0.5), "dog", caption, ((0, 3),), (2, 2, 20, 20))
    maps = [saliency(f"method_{i}", text=np.linspace(-1, 1, count)) for i in range(7)]
    read = [replace(each, where="inputs of both towers (layers 0, 0)") for each in maps]
    sheets = [
        explanation_sheet(shown, tokens, maps[:1], asked="what " * 20, notes=["a long note " * 20]),
        explanation_sheet(shown, tokens, read[:2], asked="what " * 20, notes=["a long note " * 20]),
        comparison_sheet(shown, tokens, [*read[:2], *maps]),
        comparison_sheet(shown, tokens, maps, missing={"other": "why not " * 60}),
        text_pair_sheet(tokens, tokens, np.eye(count) - 0.1, (maps[0].text, maps[0].text), similarity=0.1, error=0.0),
    ]
    for sheet in sheets:
        assert_tidy(sheet)


def test_a_comparison_has_a_column_for_each_method_in_even_rows_that_begin_with_the_image() -> None:
    figure = comparison_sheet(example(), TOKENS, [saliency(f"method_{i}") for i in range(9)])
    assert len(pictures(figure)) == 9 + 2
    assert texts(figure).count("image") == 2
    rows = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert rows["method_4"] < rows["method_5"]
    assert {f"method_{i}" for i in range(9)} <= set(texts(figure))
    assert "-2 … 1  (error 2e-03)" in texts(figure)
    assert "cosine similarity 0.250" in texts(figure)


def test_captions_that_are_compared_stand_below_with_their_similarity_and_colours() -> None:
    other = OtherText("a blue ring", (Token("a"), Token("blue"), Token("ring")), np.array([0.0, -1.0, 0.0]), 0.125)
    flat = replace(saliency("flat", text=np.zeros(7)), others=(other, other))
    shown = [replace(saliency(), others=(other, other)), flat]
    figure = comparison_sheet(example(), TOKENS, shown, asked="similarity 0.250 rather than 0.125")
    assert "similarity 0.250 rather than 0.125" in texts(figure)
    assert texts(figure).count("rather than (similarity 0.125): a blue ring") == 2
    assert texts(figure).count("blue") == 4
    assert_tidy(figure)
    alone = comparison_sheet(example(), TOKENS, [replace(saliency(), others=(other,))])
    red, green, blue = ground(alone, "blue")
    assert blue > max(red, green), "against the target"


def test_methods_that_do_not_serve_the_model_are_named_with_the_reason() -> None:
    figure = comparison_sheet(example(), TOKENS, [saliency()], missing={"relevance": "it has no attention"})
    assert "relevance: it has no attention" in texts(figure)
    with pytest.raises(ValueError, match=r"no method serves this model: .*no attention"):
        comparison_sheet(example(), TOKENS, [], missing={"relevance": "it has no attention"})


def test_one_value_for_each_token_is_expected() -> None:
    wrong = saliency(text=TEXT[:3])
    message = r"one value for each of the 7 tokens, got the shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        explanation_sheet(example(), TOKENS, [wrong])
    with pytest.raises(ValueError, match=message):
        comparison_sheet(example(), TOKENS, [wrong])
    with pytest.raises(ValueError, match=message):
        text_pair_sheet(TOKENS, TOKENS, np.eye(7), (TEXT, TEXT[:3]), similarity=0.1, error=0.0)


def test_two_images_show_both_maps_or_the_box_and_what_matches_it() -> None:
    both = image_pair_sheet(example(), example(), (HEAT, -HEAT), similarity=0.5, error=-2e-4)
    first, second = pictures(both)
    assert first[0, 0, 0] > first[0, 0, 2]
    assert second[0, 0, 0] < second[0, 0, 2]
    assert "Two images: what makes them similar" in texts(both)
    assert "cosine similarity 0.500    completeness error -2.0e-04" in texts(both)
    asked = image_pair_sheet(example(box=(4, 4, 20, 20)), example(), (None, HEAT), similarity=0.5, error=0.0)
    plain, heat = pictures(asked)
    assert (plain == (255, 214, 10)).all(axis=-1).any()
    assert heat[0, 0, 0] > heat[0, 0, 2]
    assert "Two images: what matches the box" in texts(asked)


def test_two_captions_are_two_lines_of_tokens_and_a_matrix_of_their_pairs() -> None:
    first, second = TOKENS[:3], (Token("one"), Token("circle"))
    pairs = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -0.5]])
    figure = text_pair_sheet(first, second, pairs, (TEXT[:3], np.array([0.0, 2.0])), similarity=0.5, error=0.0)
    axes = next(axes for axes in figure.axes if axes.images)
    (matrix,) = axes.images
    colours = matrix.to_rgba(np.asarray(matrix.get_array()))
    assert colours.shape == (3, 2, 4)
    assert colours[1, 0].tolist() == [0.86, 0.08, 0.10, 0.85]
    assert colours[2, 1, :3].argmax() == 2
    assert not colours[0, :, 3].any(), "nothing shows"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "red", "ring"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "circle"]
    assert ground(figure, "circle")[0] > ground(figure, "circle")[2] + 0.4
    assert "Two captions: what matches the phrase" in texts(figure)
