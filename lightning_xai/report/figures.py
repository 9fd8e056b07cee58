"""Charts of the page from frames: distributions, scores and classes.

Line styles and patterns distinguish what colours do; baselines are grey. All of them share `style.mplstyle`. Nothing
here needs torch, and nothing goes through pyplot.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lightning_xai.report.sheet import printable, style, text_width
from lightning_xai.results.runs import Estimate
from lightning_xai.results.stochastic_order import survival_curve

_BASELINE, _INK, _SOFT, _LINE, _PAPER = "#8a8f96", "#1b1f24", "#5b6470", "#d9dee4", "#ffffff"
_DARK = {_INK: "#e6e9ed", _SOFT: "#a2abb6", _LINE: "#333a42", _PAPER: "#14171b", "#4d4d4d": "#b9bfc6"}
_STYLES = ("-", "--", "-.", ":")
_BINS = 41
_IN_THE_CORNER = 6  # names of a legend; more would cover the lines
_LONGEST_NAME = 48  # characters in a line of a legend
_MOST_HATCHED = 30  # classes; patterns of more and thinner bars would be noise
_MOST_ACROSS = 3  # panels

_DARK_CELL, _BRIGHT_CELL = "#fdfdfd", "#101010"  # of numbers on colours, which stay in the reader's dark mode

Panels = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""Heading -> name -> values [n], finite, at least one; a name has the same colour in all panels."""


@style()
def cumulative(
    panels: Panels, title: str, value: str, marks: Sequence[float] = (), *, baselines: Collection[str] = ()
) -> Figure:
    """Draw the share of targets above each value in [0, 1], after Figure 5 (left): the higher a curve, the better.

    Args:
        panels: what to show.
        title: above the figure.
        value: name of the value.
        marks: thresholds to show.
        baselines: names of what ignores the model.

    Raises:
        ValueError: there are no samples.
    """
    figure, every, looks = _panels(panels, title, baselines)
    points = np.linspace(0, 1, 401)
    for axes, samples in zip(every, panels.values(), strict=True):
        for name, values in samples.items():
            axes.plot(points, 100 * survival_curve(values, points), **looks[name])
        for mark in marks:
            axes.axvline(mark, color=_SOFT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        axes.set(xlim=(0, 1), ylim=(0, 100), xlabel=value)
    figure.axes[0].set_ylabel(f"targets with a larger {value} [%]")
    _legend(figure, looks)
    return figure


@style()
def distribution(panels: Panels, title: str, value: str) -> Figure:
    """Draw a histogram of values around zero, after Figure 5 (right); each panel has its own scale.

    Args:
        panels: what to show.
        title: above the figure.
        value: name of the value.

    Raises:
        ValueError: there are no samples.
    """
    figure, every, looks = _panels(panels, title)
    for axes, samples in zip(every, panels.values(), strict=True):
        furthest = max(float(np.quantile(np.abs(values), 0.995)) for values in samples.values()) or 1.0
        edges = np.linspace(-furthest, furthest, _BINS)
        for name, values in samples.items():
            share = 100 * np.histogram(np.clip(values, -furthest, furthest), edges)[0] / len(values)
            axes.stairs(share, edges, linewidth=1.8, **looks[name])
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set(xlabel=value, ylim=(0, None))
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    figure.axes[0].set_ylabel("targets [%]")
    _legend(figure, looks)
    return figure


@style()
def bars(panels: Mapping[str, Mapping[str, Estimate]], baselines: Sequence[str], title: str) -> Figure:
    """Draw scores as bars with standard errors over seeds, a panel for each score; baselines are grey.

    Args:
        panels: heading -> name -> estimate, in the unit to print.
        baselines: names of what ignores the model.
        title: above the figure.

    Raises:
        ValueError: there are no scores.
    """
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / 2)
    size = (max(4.2 * across, 5.5) + 0.8, 0.8 + down * (0.7 + 0.3 * len(names)))
    figure, every = _axes(len(panels), (down, across), size, title, sharey=True)
    for axes, (heading, found) in zip(every, panels.items(), strict=True):
        for place, name in enumerate(names):
            if name not in found:
                continue
            mean, error = found[name].mean, found[name].error
            look = {"color": _BASELINE, "hatch": "///"} if name in baselines else {"color": "C0"}
            axes.barh(place, mean, 0.68, edgecolor=_PAPER, **look)
            if not math.isnan(error):
                axes.errorbar(mean, place, xerr=error, fmt="none", ecolor=_INK, elinewidth=1.4, capsize=3)
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set_title(printable(heading))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_yticks(range(len(names)), [_name(name) for name in names])
    every[0].invert_yaxis()
    return figure


@style()
def class_bars(runs: Mapping[str, pd.DataFrame], title: str, value: str) -> Figure:
    """Draw the mean and standard deviation of each class, after Figure 6, the best of the first run to the left.

    Args:
        runs: name -> index `label`, columns `mean` and `std`; classes of later runs that the first lacks come last.
        title: above the figure.
        value: name of the value.

    Raises:
        ValueError: there are no classes.
    """
    ordered = [classes.sort_index().sort_values("mean", ascending=False, kind="stable") for classes in runs.values()]
    order = list(dict.fromkeys(label for classes in ordered for label in classes.index))
    figure, (axes,) = _axes(
        min(len(order), 1), (1, 1), (max(6.5, 1.6 + len(order) * 0.09 * (1 + len(runs))), 4.2), title
    )
    thick = 0.8 / len(runs)
    hatches = ("", "///", "...", "xxx") if len(order) <= _MOST_HATCHED else ("",)
    for number, (name, classes) in enumerate(runs.items()):
        shown = classes.reindex(order)
        places = np.arange(len(order)) + (number - (len(runs) - 1) / 2) * thick
        look = {"edgecolor": _PAPER, "linewidth": 0.4, "hatch": hatches[number % len(hatches)]}
        axes.bar(places, shown["mean"], thick, color=f"C{number}", label=_name(name), **look)
        axes.errorbar(places, shown["mean"], shown["std"].fillna(0), fmt="none", ecolor=_SOFT, elinewidth=0.9)
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(order) > 8 else {}
    axes.set_xticks(range(len(order)), [_name(label) for label in order], **turned)
    axes.set(xlim=(-0.7, len(order) - 0.3), ylim=(0, None), ylabel=f"{value}, mean ± standard deviation")
    if len(runs) > 1:
        figure.legend(loc="outside lower left", ncols=_columns(figure, runs))
    return figure


@style()
def correlations(matrix: pd.DataFrame, title: str, first: int = 0) -> Figure:
    """Draw correlations in [-1, 1] as a heat map with numbers, blue for the same order and red for the opposite one.

    Args:
        matrix: symmetric, its index and columns the names; NaN leaves a cell empty.
        title: above the figure.
        first: a line parts so many first names from the others.

    Raises:
        ValueError: there is nothing to show.
    """
    count = len(matrix)
    side = 0.42 * count + 2.6
    figure, (axes,) = _axes(min(count, 1), (1, 1), (side + 0.8, side), title)
    image = axes.imshow(matrix.to_numpy(dtype=np.float64), cmap="RdBu", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(matrix.to_numpy(dtype=np.float64)):
        if not math.isnan(value):
            ink = "white" if abs(value) > 0.6 else "black"
            number = f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")
            axes.text(column, row, number, ha="center", va="center", fontsize=6, color=ink)
    names = [_name(str(name)) for name in matrix.index]
    axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.grid(visible=False)
    if 0 < first < count:
        axes.axhline(first - 0.5, color=_INK, linewidth=1.2)
        axes.axvline(first - 0.5, color=_INK, linewidth=1.2)
    figure.colorbar(image, ax=axes, shrink=0.6, label="rank correlation")
    return figure


@dataclass(frozen=True)
class LayerMap:
    """A score by layers.

    Attributes:
        heading: above it.
        values: [I, T], image layers by text layers; NaN where there is none.
        mark: the referee's number, on the colour bar and in the heading; NaN for none.
    """

    heading: str
    values: NDArray[np.float64]
    mark: float = math.nan


@style()
def layer_maps(maps: Sequence[LayerMap], rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """Draw scores as heat maps over image layers (down) and text layers (across), a panel for each score.

    Args:
        maps: what to show.
        rows: names of the image layers, [I].
        columns: names of the text layers, [T].
        title: above the figure.

    Raises:
        ValueError: there are no scores.
    """
    across = min(len(maps), _MOST_ACROSS)
    down = math.ceil(len(maps) / _MOST_ACROSS)
    size = (across * (1.6 + 0.45 * max(len(columns), 3)), 0.6 + down * (1.1 + 0.32 * max(len(rows), 3)))
    figure, every = _axes(len(maps), (down, max(across, 1)), size, title)
    for axes, each in zip(every, maps, strict=True):
        marked = np.append(each.values[np.isfinite(each.values)], [] if math.isnan(each.mark) else each.mark)
        low, high = (float(marked.min()), float(marked.max())) if len(marked) else (0.0, 1.0)
        digits = next((digits for most, digits in ((10, 1), (0.1, 2)) if max(-low, high) >= most), 4)
        mesh = axes.pcolormesh(np.ma.masked_invalid(each.values), vmin=low, vmax=high, cmap="viridis")
        for (row, column), value in np.ndenumerate(each.values):
            known = math.isfinite(value)
            ink = _SOFT if not known else _DARK_CELL if mesh.norm(value) < 0.6 else _BRIGHT_CELL
            text = f"{value:.{digits}f}" if known else "–"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8)
        bar = figure.colorbar(mesh, ax=axes)
        heading = printable(each.heading)
        if not math.isnan(each.mark):
            bar.ax.axhline(each.mark, color="#d55e00", linewidth=3)
            heading += f"\nreferee: {each.mark:.{digits}f}"
        axes.set_title(heading)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.grid(visible=False)
        axes.invert_yaxis()
    figure.supxlabel("text layer", fontsize="medium")
    figure.supylabel("image layer", fontsize="medium")
    return figure


def svg_text(figure: Figure) -> str:
    """Return a chart as SVG, the same text each time."""
    stream = io.StringIO()
    with style():
        figure.savefig(stream, format="svg", dpi=figure.dpi, metadata={"Date": None, "Creator": None})
    # The layout is found: another format need not search it again.
    figure.set_layout_engine("none")
    return stream.getvalue()


def follows_reader(svg: str) -> str:
    """Return the SVG of a chart whose ink and ground change with the reader's light or dark mode."""
    names = {colour: f"--c{number}" for number, colour in enumerate(_DARK)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{names[colour]}:{replacement};" for colour, replacement in _DARK.items())
    rules = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    head, end, body = svg.partition("<defs>")
    return f"{head}{rules}{end}{body}"


def _axes(
    count: int, grid: tuple[int, int], size: tuple[float, float], title: str, **options: Any
) -> tuple[Figure, list[Any]]:
    """Make a figure with a grid of panels, of which the first `count` stay."""
    if not count:
        raise ValueError(f"{title}: expected something to show, got nothing; leave the figure out instead")
    figure = Figure(figsize=size)
    every = list(figure.subplots(*grid, squeeze=False, **options).flat)
    for axes in every[count:]:
        axes.remove()
    figure.suptitle(printable(title), wrap=True)
    return figure, every[:count]


def _panels(
    panels: Panels, title: str, baselines: Collection[str] = ()
) -> tuple[Figure, list[Any], dict[str, dict[str, Any]]]:
    """Make a figure with axes for each panel; also name -> colour and line style."""
    across = min(max(len(panels), 1), _MOST_ACROSS)
    down = math.ceil(len(panels) / across)
    size = (6.4, 4.2) if len(panels) == 1 else (3.3 * across + 0.4, 2.7 * down + 0.9)
    figure, every = _axes(len(panels) if any(panels.values()) else 0, (down, across), size, title)
    for axes, heading in zip(every, panels, strict=True):
        axes.set_title(printable(heading))
    names = dict.fromkeys(name for samples in panels.values() for name in samples)
    colours = cycler(linestyle=_STYLES) * mpl.rcParams["axes.prop_cycle"]
    greys = cycler(linestyle=_STYLES[1:]) * cycler(color=[_BASELINE])
    looks: dict[str, dict[str, Any]] = dict(zip((n for n in names if n not in baselines), cycle(colours), strict=False))
    looks |= zip((name for name in names if name in baselines), cycle(greys), strict=False)
    return figure, every, looks


def _legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Name the lines: in the only panel's empty corner where few fit there, else below."""
    if len(looks) == 1:
        return
    lines, names = [Line2D([], [], **look) for look in looks.values()], [_name(name) for name in looks]
    if len(figure.axes) == 1 and len(looks) <= _IN_THE_CORNER:
        figure.axes[0].legend(lines, names, loc="upper right", frameon=True, framealpha=1.0)
    else:
        columns = _columns(figure, looks)
        rows = math.ceil(len(names) / columns) * max(name.count("\n") + 1 for name in names)
        # Two rows have room below the axes; a row takes about a fifth of an inch.
        figure.set_figheight(figure.get_figheight() + 0.2 * max(rows - 2, 0))
        figure.legend(lines, names, loc="outside lower center", ncols=columns)


def _columns(figure: Figure, names: Iterable[str]) -> int:
    """Number of names of a legend that fit side by side, so that it is not cut off at the sides."""
    widest = max(text_width(line) for name in names for line in _name(name).splitlines())
    # A line's sample and the gaps take about 60 pixels.
    return max(1, int(figure.get_figwidth() * figure.dpi / (widest + 60)))


def _name(name: str) -> str:
    """Return a name as charts print it, in lines that fit."""
    return "\n".join(textwrap.wrap(printable(name), _LONGEST_NAME)) or " "
