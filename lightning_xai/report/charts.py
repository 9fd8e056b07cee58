"""The papers' figures from plain values: distributions of gamma and delta, signs, classes, ROAR+.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles and patterns tell them apart as
well. Controls are grey and dashed. `follows_reader` makes a chart of a page follow the reader's light or dark mode.
Nothing here needs torch, and nothing goes through pyplot.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_xai.report.sheet import DPI, printable
from lightning_xai.results.effect_size import ClassGrounding
from lightning_xai.results.schema import Estimate
from lightning_xai.results.stochastic_order import Values, survival_curve

__all__ = [
    "Sample",
    "class_bars",
    "cumulative_gammas",
    "delta_distributions",
    "dressed",
    "follows_reader",
    "roar_bars",
    "sign_bars",
    "svg_text",
]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c564b")
_CONTROL, _INK, _SOFT, _LINE, _PAPER = "#8a8f96", "#1b1f24", "#5b6470", "#d9dee4", "#ffffff"
_DARK = {_INK: "#e6e9ed", _SOFT: "#a2abb6", _LINE: "#333a42", _PAPER: "#14171b", "#4d4d4d": "#b9bfc6"}
_STYLES = ("-", "--", "-.", ":")
_BINS = 41
_IN_THE_CORNER = 6  # names of a legend; more would cover the lines
_MOST_HATCHED = 30  # classes; patterns of more and thinner bars would be noise


@dataclass(frozen=True)
class Sample:
    """What one run or method measured.

    Attributes:
        name: as the legend calls it.
        values: [n], finite, at least one.
        control: whether the method knows nothing of the model.
    """

    name: str
    values: NDArray[np.float64]
    control: bool = False


def cumulative_gammas(panels: Mapping[str, Sequence[Sample]], title: str) -> Figure:
    """The share of phrases with gamma above each value, after Figure 5 (left): the higher a curve, the better.

    Args:
        panels: heading -> gammas in [0, 1] of each run or method; a name has the same colour in all panels.
        title: stands above.

    Raises:
        ValueError: there are no samples.
    """
    figure, pairs = _panels(panels, title)
    points = np.linspace(0, 1, 401)
    looks = _looks([sample for samples in panels.values() for sample in samples])
    for axes, samples in pairs:
        for sample in samples:
            share = 100 * survival_curve(sample.values, points)
            axes.plot(points, share, linewidth=2, label=printable(sample.name), **looks[sample.name])
        for threshold in (0.5, 0.8):
            axes.axvline(threshold, color=_SOFT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 100)
        axes.set_xlabel("γ: share of the attribution inside the box" if len(panels) == 1 else "γ")
    figure.axes[0].set_ylabel("phrases with a larger γ [%]")
    _legend(figure, looks)
    return figure


def delta_distributions(panels: Mapping[str, Sequence[Sample]], title: str) -> Figure:
    """How delta is distributed, after Figure 5 (right): a panel for each method, whose maps have a scale of their own.

    Args:
        panels: method -> deltas of each run; a name has the same colour in all panels.
        title: stands above.

    Raises:
        ValueError: there are no samples.
    """
    figure, pairs = _panels(panels, title)
    looks = _looks([sample for samples in panels.values() for sample in samples])
    for axes, samples in pairs:
        furthest = max(float(np.quantile(np.abs(sample.values), 0.995)) for sample in samples) or 1.0
        edges = np.linspace(-furthest, furthest, _BINS)
        for sample in samples:
            share = 100 * np.histogram(np.clip(sample.values, -furthest, furthest), edges)[0] / len(sample.values)
            look = looks[sample.name]
            style = {"edgecolor": look["color"], "linestyle": look["linestyle"], "fill": False, "linewidth": 1.8}
            axes.stairs(share, edges, label=printable(sample.name), **style)
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set_xlabel("δ   (below 0: noticed)")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("pairs [%]")
    _legend(figure, looks)
    return figure


def sign_bars(rows: Mapping[str, tuple[Values, Values]], title: str) -> Figure:
    """Signs of the attribution to the own and the other object, after Figure 12: negative to the left, positive right.

    Args:
        rows: name -> the total attributions [n] to the own and [m] to the other object's box; zeros have no bar.
        title: stands above.

    Raises:
        ValueError: there are no rows.
    """
    figure, axes = _axes(list(rows), (6.4, 1.5 + 0.5 * len(rows)), title)
    looks: list[dict[str, Any]] = [{"color": _COLOURS[0]}, {"color": _COLOURS[1], "hatch": "///"}]
    for place, both in enumerate(rows.values()):
        for offset, values, look in zip((-0.19, 0.19), both, looks, strict=True):
            style = {"height": 0.34, "edgecolor": _PAPER, **look}
            for side, alpha in ((1, 1.0), (-1, 0.45)):
                share = float(np.mean(np.sign(values) == side))
                axes.barh(place + offset, side * 100 * share, alpha=alpha, **style)
                align = {"ha": "left" if side > 0 else "right", "va": "center"}
                axes.text(side * 101, place + offset, f"{100 * share:.0f}", fontsize=8, color=_SOFT, **align)
    axes.set_yticks(range(len(rows)), list(map(printable, rows)), parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=_INK, linewidth=0.9)
    axes.set_xlim(-112, 112)
    axes.set_xticks([-100, -50, 0, 50, 100], ["100", "50", "0", "50", "100"])
    axes.set_xlabel("← negative      pairs of objects [%]      positive →")
    axes.grid(visible=False, axis="y")
    handles = [Patch(edgecolor=_PAPER, facecolor=look["color"], hatch=look.get("hatch")) for look in looks]
    style = {"frameon": False, "fontsize": 9, "ncols": 2}
    _ink(figure.legend(handles, ["the phrase's own object", "another object"], loc="outside lower center", **style))
    return figure


def class_bars(runs: Mapping[str, Sequence[ClassGrounding]], title: str) -> Figure:
    """Mean gamma and its standard deviation by class, after Figure 6: ordered by the first run, the best to the left.

    Args:
        runs: name -> its classes, in any order; classes of later runs that the first has not come last.
        title: stands above.

    Raises:
        ValueError: there are no classes.
    """
    means = {name: {found.label: found for found in classes} for name, classes in runs.items()}
    order = list(
        dict.fromkeys(
            found.label
            for classes in runs.values()
            for found in sorted(classes, key=lambda found: (-found.gamma_mean, found.label))
        )
    )
    width = max(6.5, 1.6 + len(order) * (0.09 + 0.09 * len(runs)))
    figure, axes = _axes(order, (width, 4.2), title)
    thick = 0.8 / len(runs)
    hatches = ("", "///", "...", "xxx") if len(order) <= _MOST_HATCHED else ("",)
    for number, (name, found) in enumerate(means.items()):
        there = [i for i, label in enumerate(order) if label in found]
        heights = [found[order[i]].gamma_mean for i in there]
        stds = [0.0 if math.isnan(found[order[i]].gamma_std) else found[order[i]].gamma_std for i in there]
        places = np.array(there) + (number - (len(runs) - 1) / 2) * thick
        colour = _COLOURS[number % len(_COLOURS)]
        axes.bar(
            places,
            heights,
            thick,
            color=colour,
            edgecolor=_PAPER,
            linewidth=0.4,
            hatch=hatches[number % len(hatches)],
            label=printable(name),
        )
        axes.errorbar(places, heights, stds, fmt="none", ecolor=_SOFT, elinewidth=0.9)
    axes.set_xticks(
        range(len(order)),
        [printable(label) for label in order],
        rotation=60 if len(order) > 8 else 0,
        ha="right" if len(order) > 8 else "center",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("γ, mean ± standard deviation")
    if len(runs) > 1:
        _ink(figure.legend(frameon=False, fontsize=9, loc="outside lower left", ncols=min(len(runs), 4)))
    return figure


def roar_bars(scores: Mapping[str, Mapping[str, Estimate]], controls: Sequence[str], title: str) -> Figure:
    """ROAR+ of each method in each modality, with standard errors over seeds; controls are grey.

    Args:
        scores: modality -> label -> score, a fraction.
        controls: labels of methods that know nothing of the model.
        title: stands above.

    Raises:
        ValueError: there are no scores.
    """
    labels = list(dict.fromkeys(label for found in scores.values() for label in found))
    if not labels:
        raise ValueError("expected at least one score, got none; leave the figure out instead")
    figure = Figure(
        figsize=(max(4.2 * len(scores), 5.5) + 0.8, 1.5 + 0.36 * len(labels)),
        dpi=DPI,
        layout="constrained",
        facecolor=_PAPER,
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (modality, found) in zip(panels, scores.items(), strict=True):
        _dress(axes)
        for place, label in enumerate(labels):
            if label not in found:
                continue
            mean, error = 100 * found[label].mean, 100 * found[label].standard_error
            control = label in controls
            axes.barh(
                place,
                mean,
                0.68,
                color=_CONTROL if control else _COLOURS[0],
                hatch="///" if control else "",
                edgecolor=_PAPER,
            )
            if not math.isnan(error):
                axes.errorbar(mean, place, xerr=error, fmt="none", ecolor=_INK, elinewidth=1.4, capsize=3)
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set_title(modality, fontsize=10, color=_INK)
        axes.set_xlabel("rise of the loss [%]")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=_LINE, linewidth=0.7)
    panels[0].set_yticks(range(len(labels)), [printable(label) for label in labels], parse_math=False)
    panels[0].invert_yaxis()
    figure.suptitle(printable(title), fontsize=11, color=_INK, parse_math=False)
    return figure


def dressed(figure: Figure) -> Figure:
    """A figure of another room, which is changed, with this one's ink, so that it follows the reader as well."""
    figure.set_facecolor(_PAPER)
    for axes in figure.axes:
        _dress(axes)
        axes.title.set_color(_INK)
        legend = axes.get_legend()
        if legend is not None:
            _ink(legend)
    return figure


def svg_text(figure: Figure) -> str:
    """A chart as SVG, the same text each time."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "lightning_xai", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", dpi=figure.dpi, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def follows_reader(svg: str) -> str:
    """The SVG of a chart, whose ink and ground now change with the reader's light or dark mode, as browsers know it."""
    names = {colour: f"--c{number}" for number, colour in enumerate(_DARK)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{names[colour]}:{replacement};" for colour, replacement in _DARK.items())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    head, end, body = svg.partition("<defs>")
    return f"{head}{style}{end}{body}"


def _axes(shown: Sequence[Any], size: tuple[float, float], title: str) -> tuple[Figure, Any]:
    """A figure with one pair of axes for what is shown, of which there has to be something."""
    if not shown:
        raise ValueError(f"{title}: expected something to show, got nothing; leave the figure out instead")
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _dress(axes)
    axes.set_title(printable(title), fontsize=11, color=_INK, loc="left", parse_math=False)
    return figure, axes


def _dress(axes: Any) -> None:
    axes.set_facecolor(_PAPER)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(colors=_SOFT, labelcolor=_INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)


def _panels(panels: Mapping[str, Sequence[Sample]], title: str) -> tuple[Figure, list[tuple[Any, Sequence[Sample]]]]:
    """A figure with axes for each panel, side by side in rows of at most three, and the samples that go there."""
    if not any(panels.values()):
        raise ValueError(f"{title}: expected at least one sample, got none; leave the figure out instead")
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    size = (6.4, 4.2) if len(panels) == 1 else (3.3 * across + 0.4, 2.7 * down + 0.9)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    every = figure.subplots(down, across, squeeze=False).flat
    for axes, heading in zip(every, panels, strict=False):
        _dress(axes)
        axes.set_title(printable(heading), fontsize=10, color=_INK, parse_math=False)
    for axes in list(every[len(panels) :]):
        axes.remove()
    figure.suptitle(printable(title), fontsize=11, color=_INK, parse_math=False)
    return figure, list(zip(figure.axes, panels.values(), strict=True))


def _looks(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Name -> colour and line style: those of methods in turn, controls grey."""
    looks: dict[str, dict[str, Any]] = {}
    controls = 0
    for sample in samples:
        if sample.name in looks:
            continue
        if sample.control:
            controls += 1
            looks[sample.name] = {"color": _CONTROL, "linestyle": _STYLES[controls % len(_STYLES)]}
            continue
        number = len(looks) - controls
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
        looks[sample.name] = {"color": colour, "linestyle": style}
    return looks


def _legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """What the lines are: in the only panel's empty corner where few fit there, else below."""
    if len(looks) == 1:
        return
    lines = [Line2D([], [], linewidth=2, **look) for look in looks.values()]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9}
    names = [printable(name) for name in looks]
    if len(figure.axes) == 1 and len(looks) <= _IN_THE_CORNER:
        style |= {"frameon": True, "facecolor": _PAPER, "edgecolor": _PAPER, "framealpha": 1.0}
        _ink(figure.axes[0].legend(lines, names, loc="upper right", **style))
    else:
        _ink(figure.legend(lines, names, loc="outside lower center", ncols=min(len(looks), 5), **style))


def _ink(legend: Any) -> None:
    for text in legend.get_texts():
        text.set_color(_INK)
        text.set_parse_math(False)
