"""Charts show the numbers that they are given, and hold together whatever the names are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xai.report.figures import bars, class_bars, cumulative, distribution, follows_reader, svg_text
from lightning_xai.report.plots import rasterize
from lightning_xai.results.runs import Estimate

DRAW = np.random.default_rng(0)
LONG = "a rather long name of a run, made of many words, number"


def samples(*names: str) -> dict[str, NDArray[Any]]:
    return {name: DRAW.random(50) for name in names}


def classes(**means: float) -> pd.DataFrame:
    frame = pd.DataFrame({"mean": means, "std": dict.fromkeys(means, 0.1)})
    return frame.rename_axis("label")


def test_a_curve_is_the_share_above_each_value_and_baselines_are_grey() -> None:
    values = np.array([0.1, 0.3, 0.3, 0.9])
    figure = cumulative({"": {"a": values, "r": values}}, "t", "γ", [0.5], baselines=["r"])
    line, grey = figure.axes[0].lines[:2]
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    assert y.tolist() == [100 * float(np.mean(values > point)) for point in x]
    assert (line.get_color(), grey.get_color()) == ("#0072b2", "#8a8f96")


def test_a_name_has_one_colour_in_all_panels() -> None:
    panels = {"m": samples("a", "b"), "n": samples("b", "c")}
    first, second = cumulative(panels, "t", "γ").axes
    assert first.lines[1].get_color() == second.lines[0].get_color()
    assert len({line.get_color() for line in (*first.lines, *second.lines)}) == 3


def test_a_distribution_sums_to_all_values_outliers_included() -> None:
    values = np.append(DRAW.normal(size=400), [1e6, -1e6])
    (axes,) = distribution({"m": {"a": values}}, "t", "δ").axes
    assert axes.patches[0].get_data().values.sum() == pytest.approx(100)  # type: ignore[attr-defined]
    assert axes.get_xlim()[1] < 1e5


def test_bars_have_errors_where_there_are_seeds_and_baselines_look_different() -> None:
    scores = {
        "image": {"a": Estimate(40.0, 1.0, 9), "r": Estimate(3.0, math.nan, 9)},
        "text": {"a": Estimate(7.0, 0.5, 9)},
    }
    image, text = bars(scores, ["r"], "t").axes
    assert [bar.get_width() for bar in image.patches] == [40, 3]  # type: ignore[attr-defined]
    assert image.patches[0].get_hatch() != image.patches[1].get_hatch()
    assert (len(image.collections), len(text.collections)) == (1, 1)


def test_classes_are_ordered_by_the_first_run() -> None:
    figure = class_bars({"a": classes(dog=0.2, cup=0.9), "b": classes(cow=0.5, dog=0.8)}, "t", "γ")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cup", "dog", "cow"]
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights[:2] == [0.9, 0.2]
    assert heights[4:] == [0.8, 0.5]


@pytest.mark.parametrize("count", [7, 12])
@pytest.mark.parametrize("draw", [cumulative, distribution])
def test_a_legend_and_a_title_are_never_cut_off(count: int, draw: Callable[..., Figure]) -> None:
    figure = draw({"panel": samples(*(f"{LONG} {i}" for i in range(count)))}, f"{LONG} " * 3, "γ")
    rasterize(figure)
    for artist in (figure.legends[0], *figure.texts):
        extent = artist.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    "draw",
    [
        lambda: cumulative({}, "t", "γ"),
        lambda: distribution({"a": {}}, "t", "δ"),
        lambda: bars({}, [], "t"),
        lambda: class_bars({"a": classes()}, "t", "γ"),
    ],
)
def test_nothing_to_show_is_refused(draw: Callable[[], Figure]) -> None:
    with pytest.raises(ValueError, match="leave the figure out"):
        draw()


def test_an_svg_is_the_same_each_time_follows_the_reader_and_leaves_settings_alone() -> None:
    before = dict(mpl.rcParams)
    texts = [svg_text(cumulative({"": {"$x$ \n\x00": np.array([0.5])}}, "$y_", "γ")) for _ in range(2)]
    assert dict(mpl.rcParams) == before
    assert texts[0] == texts[1]
    followed = follows_reader(texts[0])
    head, _, body = followed.partition("</style>")
    assert "prefers-color-scheme: dark" in head
    assert "#1b1f24" not in body
    assert "var(--c" in body
