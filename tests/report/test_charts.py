from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lightning_xai.report.charts import (
    Sample,
    class_bars,
    cumulative_gammas,
    delta_distributions,
    dressed,
    follows_reader,
    roar_bars,
    sign_bars,
    svg_text,
)
from matplotlib.figure import Figure

from lightning_xai.report.plots import curves
from lightning_xai.results.effect_size import ClassGrounding
from lightning_xai.results.schema import Estimate

HIGH, LOW = np.array([0.2, 0.6, 0.9, 1.0]), np.array([0.1, 0.2])


def grounding(label: str, mean: float, std: float = 0.1) -> ClassGrounding:
    return ClassGrounding(label, 10, mean, std, 0.5, 0.5)


def axes_of(figure: Figure) -> list[Any]:
    """Matplotlib's types do not tell lines from bars."""
    return list(figure.axes)


def test_a_curve_is_the_share_above_each_gamma() -> None:
    figure = cumulative_gammas({"": [Sample("high", HIGH), Sample("low", LOW, control=True)]}, "t")
    (axes,) = axes_of(figure)
    lines = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) > 2}
    x, y = lines["high"].get_data()
    for point, share in zip(x, y, strict=True):
        assert share == 100 * np.mean(point < HIGH)
    assert lines["low"].get_linestyle() != "-"
    assert lines["low"].get_color() != lines["high"].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["high", "low"]


def test_a_name_has_one_colour_in_all_panels() -> None:
    panels = {"one": [Sample("a", HIGH), Sample("b", LOW)], "two": [Sample("b", HIGH)]}
    for figure in (cumulative_gammas(panels, "t"), delta_distributions(panels, "t")):
        assert [axes.get_title() for axes in axes_of(figure)] == ["one", "two"]
    lines = [
        {line.get_label(): line.get_color() for line in axes.lines} for axes in cumulative_gammas(panels, "t").axes
    ]
    assert lines[0]["b"] == lines[1]["b"] != lines[0]["a"]


def test_a_distribution_of_deltas_sums_to_all_of_them_outliers_included() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 999), [1e6]])
    figure = delta_distributions({"m": [Sample("a", values)]}, "t")
    (patch,) = axes_of(figure)[0].patches
    assert patch.get_data().values.sum() == pytest.approx(100)
    assert patch.get_data().edges[-1] < 10


def test_bars_of_signs_are_shares_and_zeros_have_none() -> None:
    figure = sign_bars({"a": ([1.0, 2.0, 0.0, -1.0], [-1.0, -1.0, -3.0, 1.0])}, "t")
    widths = [patch.get_width() for patch in axes_of(figure)[0].patches]
    assert widths == [50, -25, 25, -75]


def test_classes_are_ordered_by_the_first_run_and_have_their_spread() -> None:
    runs = {
        "first": [grounding("cup", 0.2), grounding("dog", 0.8)],
        "later": [grounding("cup", 0.9), grounding("new", 0.4, math.nan)],
    }
    axes = axes_of(class_bars(runs, "t"))[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dog", "cup", "new"]
    heights = [[patch.get_height() for patch in group] for group in axes.containers if hasattr(group, "patches")]
    assert heights == [[0.8, 0.2], [0.9, 0.4]]
    segments = [collection.get_segments() for collection in axes.collections]
    assert [round(float(end - start), 6) for (_, start), (_, end) in segments[0]] == [0.2, 0.2]


def test_bars_of_roar_have_errors_where_there_are_seeds_and_controls_look_different() -> None:
    scores = {"image": {"m2ib": Estimate((0.1, 0.2)), "random": Estimate((0.05,))}, "text": {"m2ib": Estimate((0.3,))}}
    figure = roar_bars(scores, ["random"], "t")
    image, text = axes_of(figure)
    assert [patch.get_width() for patch in image.patches] == pytest.approx([15, 5])
    assert image.patches[0].get_facecolor() != image.patches[1].get_facecolor()
    assert (len(image.collections), len(text.collections)) == (1, 0)
    assert [label.get_text() for label in image.get_yticklabels()] == ["m2ib", "random"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: cumulative_gammas({}, "t"),
        lambda: delta_distributions({"m": []}, "t"),
        lambda: sign_bars({}, "t"),
        lambda: class_bars({"run": []}, "t"),
        lambda: roar_bars({"image": {}}, [], "t"),
    ],
)
def test_nothing_to_show_is_refused(draw: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="leave the figure out instead"):
        draw()


def test_an_svg_is_the_same_each_time_and_has_no_colour_of_its_own_for_ink_where_it_follows_the_reader() -> None:
    def draw() -> Figure:
        return dressed(curves([{"epoch": 0, "rho": 0.5}, {"epoch": 1, "rho": 0.6}]))

    svg = svg_text(draw())
    assert svg == svg_text(draw())
    assert "var(--" not in svg
    followed = follows_reader(svg)
    assert "@media (prefers-color-scheme: dark)" in followed
    style, _, rest = followed.partition("</style>")
    for colour in ("#1b1f24", "#ffffff", "#5b6470"):
        assert colour in style
        assert colour not in rest


def test_text_that_looks_like_mathematics_or_breaks_lines_is_drawn_as_it_is() -> None:
    name = "$x_{ y\n<b>"
    figures = [
        cumulative_gammas({name: [Sample(name, HIGH), Sample("b", LOW)], "two": [Sample(name, HIGH)]}, name),
        delta_distributions({name: [Sample(name, HIGH), Sample("b", LOW)]}, name),
        sign_bars({name: ([1.0], [1.0])}, name),
        class_bars({name: [grounding(name, 0.5)], "b": [grounding(name, 0.5)]}, name),
        roar_bars({"image": {name: Estimate((0.1,))}}, [], name),
    ]
    for figure in figures:
        assert svg_text(figure).startswith("<?xml")
