"""Pictures of a run: heat maps over images with the phrase they belong to, their change over epochs, curves.

Figures are made with matplotlib's objects on the Agg canvas, never through pyplot: a training process draws many of
them, and users may plot with pyplot at the same time. Nothing here needs torch.

Sheets are laid out in pixels of the finished picture, and a caption's lines are broken by the measured width of their
text. Heat maps lie over their images in colours that are the more opaque the stronger they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.report.sheet import DPI, FONT_PT, GAP, LINE, Place, Point, Sheet, style
from lightning_xai.results.record import Score, state_name

Box = tuple[float, float, float, float]
Heat = NDArray[np.floating]
Scale = Literal["signed", "positive", "range"]
"""How values become colours: zero in the middle, from zero up, or from the lowest to the highest."""

_BLUE, _RED, _MOST_OPAQUE = (0.10, 0.25, 0.90), (0.86, 0.08, 0.10), 0.85
COLOURS = LinearSegmentedColormap.from_list(
    "attribution",
    [(0, (*_BLUE, _MOST_OPAQUE)), (0.5, (*_BLUE, 0)), (0.5, (*_RED, 0)), (1, (*_RED, _MOST_OPAQUE))],
    N=513,  # an odd number, so that one of them is for zero
)
"""Colours of strengths from -1 to 1: blue and red, the weaker the more of the ground shows."""
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_YELLOW = "#ffd60a"
BAR = 76  # pixels that a colour bar takes
_NARROWEST = 672  # so that the colour bar's note fits
_HAIR = 0.5  # pixels: narrower strips are rounding
_HIT, _MISS = "#1a7f37", "#8a8a8a"


@dataclass(frozen=True)
class Example:
    """One phrase of a caption and the object that it names.

    Attributes:
        image: [H, W, 3] floats in [0, 1], as the model saw it.
        phrase: the words, for instance `"a red ring"`.
        caption: the whole caption.
        spans: character spans `(start, end)` of the phrase in the caption (end exclusive).
        box: `(x0, y0, x1, y1)` of the object in pixels of `image`; None where there is none.
        key: names the image.
        frame: `(x0, y0, x1, y1)` of what maps cover, in pixels of `image`, where that is another part than the whole:
            the rest of the image is dimmed, and a map is not drawn outside of the image.
    """

    image: NDArray[np.floating]
    phrase: str
    caption: str
    spans: tuple[tuple[int, int], ...] = ()
    box: Box | None = None
    key: str = ""
    frame: Box | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or not self.image.size:
            raise ValueError(f"image: expected [H, W, 3] floats in [0, 1], got the shape {self.image.shape}")


def heat_fault(heat: Heat) -> str | None:
    """Reason why a map shows nothing, in words for its title; None where it shows something.

    A map is constant where its values differ by rounding only. A single value is no map, and cannot be constant.

    >>> [heat_fault(np.zeros((7, 7))), heat_fault(np.array([[0.0, np.nan]])), heat_fault(np.array([[0.0, 1.0]]))]
    ['constant map', 'map not finite', None]
    """
    if not np.isfinite(heat).all():
        return "map not finite"
    rounding = 1e-6 * float(np.abs(heat).max(initial=0)) + 1e-12
    return "constant map" if heat.size != 1 and (not heat.size or np.ptp(heat) <= rounding) else None


def scaled(values: Heat, scale: Scale) -> Heat:
    """Heat as strengths of colour: in [-1, 1] for signed ones, [0, 1] for others; 0 where all of them are equal.

    A single value is of full strength; of none where it is zero, or where it would be compared with others.

    >>> values = np.array([-1.0, 0.0, 2.0])
    >>> [scaled(values, "signed").tolist(), scaled(values, "range").round(2).tolist()]
    [[-0.5, 0.0, 1.0], [0.0, 0.33, 1.0]]
    >>> [scaled(np.array([2.0]), "signed").tolist(), scaled(np.array([2.0]), "range").tolist()]
    [[1.0], [0.0]]
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size or heat_fault(values) is not None:
        return np.zeros_like(values)
    low, high = limits(values, scale)
    zero = low if scale == "range" else 0.0
    if high == zero:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - zero) / (high - zero), -1, 1))


def limits(values: Heat, scale: Scale) -> tuple[float, float]:
    """The values that the ends of the colour bar stand for."""
    low, high = float(np.min(values)), float(np.max(values))
    if scale == "range":
        return low, high
    largest = max(abs(low), abs(high))
    return (-largest if scale == "signed" else 0.0), largest


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 ... count - 1, evenly spread, with the first and the last.

    >>> [evenly(4, 6), evenly(11, 6), evenly(50, 2), evenly(3, 1)]
    [[0, 1, 2, 3], [0, 2, 4, 6, 8, 10], [0, 49], [2]]
    """
    # Counted from the end, since the last one stays where there is room for one.
    return [int(place) for place in np.rint(np.linspace(count - 1, 0, min(count, most)))[::-1]]


@dataclass(frozen=True)
class GradedMap:
    """A heat map and how it was graded.

    Attributes:
        heat: [h, w], signed.
        gamma: in [0, 1]; NaN where it does not exist, None where the map was not graded.
        hit: whether its largest entry lies inside the box.
    """

    heat: Heat
    gamma: float | None = None
    hit: bool = False

    @property
    def words(self) -> str:
        """Its grade in words; empty where it was not graded."""
        if self.gamma is None:
            return ""
        if heat_fault(self.heat):
            return "no γ"
        gamma = f"γ = {self.gamma:.2f}" if math.isfinite(self.gamma) else "no γ: nothing positive"
        return f"{gamma}   {'✓ hit' if self.hit else '✗ miss'}"


def progress_sheet(
    examples: Sequence[Example],
    maps: Sequence[Sequence[GradedMap]],
    epoch_names: Sequence[str],
    title: str = "",
    *,
    columns: int = 7,
    side: int = 256,
) -> Figure:
    """Draw the heat maps of each epoch: a row for each example, a column for each epoch.

    Args:
        examples: the rows.
        maps: [epoch][example].
        epoch_names: the columns' headings, for instance `"before"`, `"epoch 1"`.
        title: stands above the sheet.
        columns: at most so many, the plain image's included; the epochs shown are spread evenly from first to last.
        side: pixels of a picture's longer side.

    Raises:
        ValueError: the sequences differ in length or are empty, or there is no room for one epoch.
    """
    if columns < 2:
        raise ValueError(f"columns: expected at least 2 (the image and one epoch), got {columns}")
    _check_length("maps", maps, len(epoch_names))
    for name, of_epoch in zip(epoch_names, maps, strict=True):
        _check_length(f"maps of {name}", of_epoch, len(examples))
    epochs = evenly(len(epoch_names), columns - 1)
    places = [GAP + place * (side + GAP) for place in range(len(epochs) + 1)]
    sheet = Sheet(max(places[-1] + side + GAP, _NARROWEST), title)
    y = float(sheet.top)
    for x, name in zip(places, ["image", *(epoch_names[epoch] for epoch in epochs)], strict=True):
        y = max(y, sheet.caption(name, (x, sheet.top), side, weight="bold", fontsize=FONT_PT - 1) + 6)
    for i, example in enumerate(examples):
        below = sheet.caption(example.caption, (GAP, y), sheet.width - 2 * GAP, example.spans)
        y = panel(sheet, example, (GAP, below), side) + GAP
        for x, epoch in zip(places[1:], epochs, strict=True):
            y = max(y, _graded_panel(sheet, example, maps[epoch][i], (x, below), side) + GAP)
    if all(each.gamma is None for of_epoch in maps for each in of_epoch):
        return sheet.close(y)
    sheet.close(y + BAR)
    note = "attribution, relative to each map's largest    ○ its largest entry    yellow: the object's box"
    ticks = {-1.0: "against", 0.0: "0", 1.0: "for the phrase"}
    colour_bar(sheet, (sheet.width - 300) / 2, 300, ticks, note)
    return sheet.figure


def graded_picture(example: Example, graded: GradedMap, side: int = 256) -> NDArray[np.uint8]:
    """Draw an example's heat map over its image, with its box and the map's largest entry, as uint8 [H, W, 3].

    Args:
        example: the image.
        graded: the map.
        side: pixels of the picture's longer side.
    """
    height, width = example.image.shape[:2]
    sheet = Sheet(max(1, round(side * width / max(height, width))), "")
    left = -((side - sheet.width) // 2)  # a panel is in the middle of a square
    return rasterize(sheet.close(panel(sheet, example, (left, 0), side, graded.heat, marked=True)))


@style()
def curves(
    rows: Sequence[Mapping[str, object]],
    title: str = "Grounding while the model learns",
    *,
    scores: Sequence[Score],
    panels: Mapping[str, str] | None = None,
    others: Mapping[str, str] | None = None,
) -> Figure:
    """Draw scores in percent against the epoch, or against the step where some were measured within an epoch.

    Args:
        rows: `epoch`, the finished epochs, and the scores by name, fractions; within an epoch also `step` and `batch`,
            as in `ResultRecord.state`, and `step` in all. A missing or NaN value leaves a gap.
        title: above the axes.
        scores: what to draw, in this order; dashed where a score is no share.
        panels: what ends the names of the scores in rows -> the name of their panel; one panel, without a name, by
            default.
        others: names of other shares in rows -> their headings; they have a panel below.

    Raises:
        ValueError: there are no rows, or one has no `epoch`.
    """
    if not rows or not all(isinstance(row.get("epoch"), int) for row in rows):
        raise ValueError(f"rows: expected at least one, each with an 'epoch'; got {[sorted(row) for row in rows]}")
    drawn = [
        (
            ", ".join(filter(None, (title, name))),
            "targets, or mean (dashed) [%]",
            {f"{score.name}{suffix}": (score.heading, "-" if score.percent else "--") for score in scores},
        )
        for suffix, name in ({"": ""} if panels is None else panels).items()
    ]
    if others:
        drawn.append(("What else was measured", "share [%]", {name: (text, "-") for name, text in others.items()}))
    figure = Figure(figsize=(8.0, 4.2 * len(drawn)))
    place = "step" if any(row.get("batch") for row in rows) else "epoch"
    every = figure.subplots(len(drawn), squeeze=False)[:, 0]
    for axes, (heading, unit, lines) in zip(every, drawn, strict=True):
        _draw_curves(axes, rows, place, lines)
        axes.set(title=heading, ylabel=unit)
    every[-1].set_xlabel("steps" if place == "step" else "finished epochs")
    return figure


def _draw_curves(
    axes: Any, rows: Sequence[Mapping[str, object]], place: str, lines: Mapping[str, tuple[str, str]]
) -> None:
    """Draw columns of rows, each by its heading and its line style."""
    import pandas as pd  # explanations are drawn without it

    names = [place, *lines]
    frame = pd.DataFrame([[row.get(name) for name in names] for row in rows], columns=names, dtype="float64")
    highest = 0.0
    for name, (heading, look) in lines.items():
        known = 100 * frame[name].dropna()
        if known.empty:
            continue
        highest = max(highest, known.max())
        label = f"{heading}   {known.iloc[0]:.1f} → {known.iloc[-1]:.1f} %"
        axes.plot(frame[place], known.reindex(frame.index), look, marker="o", label=label)
    shown = frame[place].iloc[evenly(len(rows), 11)]
    axes.set_xticks(shown, [f"{number:g}" if number else state_name({"epoch": 0}) for number in shown])
    axes.set_ylim(0, min(100.0, 10 * math.ceil((highest + 4) / 10)))
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as it was laid out; the suffix chooses the format (`.png`, `.pdf`, `.svg`).

    Raises:
        ValueError: matplotlib does not know the suffix.
    """
    with replaced_at_once(path) as part:
        figure.savefig(part, dpi=figure.dpi)


def rasterize(figure: Figure) -> NDArray[np.uint8]:
    """A figure as uint8 [H, W, 3], for loggers that take images."""
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib does not type the methods used here
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def panel(
    sheet: Sheet,
    example: Example,
    at: Point,
    side: int,
    heat: Heat | None = None,
    scale: Scale = "signed",
    *,
    marked: bool = False,
) -> float:
    """Show an image with its box, or a heat map over it, and return where it ends; a fault of the map is named on it.

    Below a map, the image has little colour, or a red object would look like a red patch. The map is interpolated
    linearly between patch centres, which adds neither an extremum nor a sign.

    Args:
        sheet: where to show it.
        example: image and box.
        at: top left corner of the square that holds the image.
        side: pixels of the image's longer side.
        heat: [h, w] at patch resolution; covers the whole image, or the example's frame.
        scale: how its values become colours.
        marked: draw a circle at the centre of the map's largest entry, the one that rho asks about.
    """
    image: NDArray[np.float32] = np.clip(np.asarray(example.image, dtype=np.float32), 0, 1)
    enlarged = side / max(image.shape[:2])
    height, width = (max(1, round(pixels * enlarged)) for pixels in image.shape[:2])
    x, y = at[0] + (side - width) // 2, at[1]
    fault = None if heat is None else heat_fault(heat)
    place = covered = (x, y, width, height)
    if example.frame is not None:
        left, top, right, bottom = (edge * enlarged for edge in example.frame)
        covered = (x + left, y + top, right - left, bottom - top)
    if heat is not None and fault is None:
        image = 0.2 + 0.7 * (image @ _GREY_WEIGHTS)[..., None] + 0.1 * image
    # Pixels of small images stay sharp squares.
    sheet.picture(image, place, interpolation="nearest" if enlarged >= 2 else "auto")
    if heat is not None and fault is None:
        colours = {"cmap": COLOURS, "vmin": -1, "vmax": 1, "interpolation_stage": "data"}
        sheet.picture(scaled(heat, scale), covered, clip=place, interpolation="bilinear", **colours)
    _dim(sheet, place, covered)
    if example.box is not None:
        ends = [min(max(end * enlarged, 0), (width, height)[i % 2]) for i, end in enumerate(example.box)]
        thick = max(2, side // 112) * 72 / DPI  # whole pixels are sharp
        dark = withStroke(linewidth=thick + 1.2, foreground="black")
        look = {"fill": False, "edgecolor": _YELLOW, "linewidth": thick, "path_effects": [dark]}
        sheet.ground(x + ends[0], y + ends[1], ends[2] - ends[0], ends[3] - ends[1], **look)
    if fault is not None:
        ground = {"facecolor": "white", "edgecolor": "0.6", "boxstyle": "round,pad=0.5"}
        middle = (at[0] + side / 2, y + height / 2)
        sheet.text(fault, middle, ha="center", va="center", weight="bold", bbox=ground)
    elif marked and heat is not None:
        row, column = np.unravel_index(int(np.argmax(heat)), heat.shape)
        left, top, across, down = covered
        sheet.ring((left + (column + 0.5) * across / heat.shape[1], top + (row + 0.5) * down / heat.shape[0]))
    return float(y + height)


def _dim(sheet: Sheet, place: Place, seen: Place) -> None:
    """Veil the parts of a picture at `place` (left, top, width, height) that lie outside of what is seen."""
    (x, y, width, height), (left, top, across, down) = place, seen
    before = min(max(left - x, 0), width), min(max(top - y, 0), height)
    after = min(max(x + width - left - across, 0), width), min(max(y + height - top - down, 0), height)
    middle = height - before[1] - after[1]
    for strip in (
        (x, y, width, before[1]),
        (x, y + height - after[1], width, after[1]),
        (x, y + before[1], before[0], middle),
        (x + width - after[0], y + before[1], after[0], middle),
    ):
        if min(strip[2:]) >= _HAIR:
            sheet.ground(*strip, facecolor="white", alpha=0.7, linewidth=0)


def _graded_panel(sheet: Sheet, example: Example, graded: GradedMap, at: Point, side: int) -> float:
    """Show a heat map with gamma and the mark of a hit or a miss below it."""
    y = panel(sheet, example, at, side, graded.heat, marked=graded.gamma is not None)
    if graded.gamma is None:
        return y
    look: dict[str, Any] = {"color": _HIT if graded.hit else _MISS, "weight": "bold"}
    if heat_fault(graded.heat):
        look = {"color": "0.25"}
    sheet.text(graded.words, (at[0], y + 6), **look)
    return y + 6 + LINE


def colour_bar(
    sheet: Sheet, left: float, length: float, ticks: Mapping[float, str], note: str, *, signed: bool = True
) -> None:
    """Draw a colour bar at the foot of a closed sheet, with its ends at the first and the last tick."""
    colours = COLOURS if signed else ListedColormap(COLOURS(np.linspace(0.5, 1, 256)))
    shown = ScalarMappable(Normalize(min(ticks), max(ticks)), colours)
    axes = sheet.axes(left, sheet.height - 64, length, 12)
    bar = sheet.figure.colorbar(shown, cax=axes, orientation="horizontal", ticks=list(ticks))
    bar.ax.set_xticklabels(list(ticks.values()), fontsize=FONT_PT - 1)
    bar.outline.set_linewidth(0.5)
    sheet.text(note, (left + length / 2, sheet.height - 24), ha="center", fontsize=FONT_PT - 1, color="0.35")


def _check_length(name: str, given: Sequence[object], expected: int) -> None:
    if not expected:
        raise ValueError("expected at least one example and one epoch, got none; leave the sheet out instead")
    if len(given) != expected:
        raise ValueError(f"{name}: expected {expected} entries, got {len(given)}")
