"""Pictures of attributions: heat maps over the image, the caption's tokens on coloured ground, and what they mean.

Red is for the similarity, blue against it. Maps of methods that know no sign are drawn from white to red. Every map has
its own scale, which the picture states in numbers; a map whose values are all equal is labelled constant.

Drawn from numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xai.report.plots import (
    BAR,
    COLOURS,
    Example,
    Scale,
    colour_bar,
    heat_fault,
    limits,
    panel,
    scaled,
)
from lightning_xai.report.sheet import FONT_PT, GAP, LINE, Point, Sheet, text_width

Values = NDArray[np.floating]

_SIDE = 416  # pixels of an image's longer side
_PAIR = 2 * (_SIDE + GAP) + GAP  # of two images side by side
_COLUMN = 232  # likewise, where methods stand side by side
_MOST_COLUMNS = 6  # methods in a row
_CHIP_HEIGHT, _CHIP_LINE = 19, 27  # pixels of a token's ground, and from one line of tokens to the next
_CHIP_PAD, _WORD_GAP = 4, 5
_SMALL = FONT_PT - 1
_GREY = "0.35"
_MARK = "#ffd60a"
_WHITE_TEXT_FROM = 0.6
_ORDER = ("first", "second")
_MEANING = {
    "signed": "blue against, red for",
    "positive": "no sign: white 0, red most",
    "range": "white least, red most",
}


@dataclass(frozen=True)
class Token:
    """A token of a caption as it is shown.

    Attributes:
        text: without spaces.
        joined: it continues the word of the token before it.
        marked: it belongs to the phrase that is asked about.
    """

    text: str
    joined: bool = False
    marked: bool = False


@dataclass(frozen=True)
class OtherText:
    """A caption that is compared with, and its saliency by one method.

    Attributes:
        caption: the text.
        tokens: its tokens, [n].
        values: [n].
        similarity: its cosine similarity with the image.
    """

    caption: str
    tokens: Sequence[Token]
    values: Values
    similarity: float


@dataclass(frozen=True)
class Saliency:
    """Saliency of an image and its caption by one method.

    Attributes:
        method: its name.
        image: [h, w] at patch resolution.
        text: [n], one value for each token that is shown.
        similarity: the cosine similarity that is explained.
        scale: how values become colours.
        completeness_error: None for methods that have none.
        where: the layers that it was read at; empty for methods without.
        others: captions that are compared with.
    """

    method: str
    image: Values
    text: Values
    similarity: float
    scale: Scale = "signed"
    completeness_error: float | None = None
    where: str = ""
    others: tuple[OtherText, ...] = ()


def explanation_sheet(
    example: Example,
    tokens: Sequence[Token],
    readings: Sequence[Saliency],
    *,
    asked: str = "",
    notes: Sequence[str] = (),
) -> Figure:
    """One method: the image, its heat maps, the caption with the phrase in yellow, and its tokens in colours.

    Args:
        example: image, caption, phrase, and the box that is asked about.
        tokens: the caption's tokens, [n].
        readings: the maps of the method, at one or more layers.
        asked: what they answer, for the title.
        notes: lines below the tokens.

    Raises:
        ValueError: not one value for each token.
    """
    for saliency in readings:
        _check_count(tokens, saliency.text)
    (first, *more), across = readings, _SIDE + GAP
    title = f"{first.method}: {asked}" if asked else first.method
    sheet = Sheet((1 + len(readings)) * across + GAP, title, _numbers(first.similarity))
    named = any(saliency.where or saliency.completeness_error is not None for saliency in readings)
    top = sheet.top + (2 * LINE if named else 0)
    y = panel(sheet, example, (GAP, top), _SIDE)
    y = sheet.caption(example.caption, (GAP, y + 12), _SIDE, example.spans)
    for column, saliency in enumerate(readings, start=1):
        x = GAP + column * across
        sheet.text(saliency.where, (x + _SIDE / 2, sheet.top), ha="center", weight="bold")
        error = saliency.completeness_error
        below = "" if error is None else f"completeness error {error:+.1e}"
        sheet.text(below, (x + _SIDE / 2, sheet.top + LINE), ha="center", fontsize=_SMALL, color=_GREY)
        end = panel(sheet, example, (x, top), _SIDE, saliency.image, saliency.scale)
        y = max(y, _chips(sheet, tokens, scaled(saliency.text, saliency.scale), (x, end + 12), _SIDE))
    _bars(
        sheet,
        _notes(sheet, notes, y),
        [
            (f"{part}{place}", values, each.scale)
            for each, place in zip(readings, (", left map", ", right map") if more else ("",), strict=True)
            for part, values in (("patches", each.image), ("tokens", each.text))
        ],
    )
    return sheet.figure


def comparison_sheet(
    example: Example,
    tokens: Sequence[Token],
    saliencies: Sequence[Saliency],
    *,
    missing: Mapping[str, str] | None = None,
    asked: str = "",
) -> Figure:
    """Methods side by side, after Figure 1 of the M2IB paper: the image, then a column for each method.

    Args:
        example: the image and its caption.
        tokens: the caption's tokens, [n].
        saliencies: one for each method that serves the model.
        missing: the other methods, and why they do not.
        asked: the title, where captions are compared; their tokens stand below those of the caption.

    Raises:
        ValueError: no method at all, or not one value for each token.
    """
    if not saliencies:
        raise ValueError(f"no method serves this model: {dict(missing or {})}")
    for saliency in saliencies:
        _check_count(tokens, saliency.text)
    rows = -(-len(saliencies) // _MOST_COLUMNS)
    columns = -(-len(saliencies) // rows)
    across = _COLUMN + GAP
    sheet = Sheet(
        max((columns + 1) * across + GAP, 2 * across + GAP + 200), asked or _numbers(saliencies[0].similarity)
    )
    end = sheet.caption(example.caption, (GAP, sheet.top), sheet.width - 2 * GAP, example.spans)
    for other in saliencies[0].others:
        line = f"rather than (similarity {other.similarity:.3f}): {other.caption}"
        end = sheet.caption(line, (GAP, end), sheet.width - 2 * GAP, color=_GREY)
    end += 12
    y = end
    for i, saliency in enumerate(saliencies):
        above = any(each.where for each in saliencies[i - i % columns :][:columns])
        if i % columns == 0:
            y = end
            sheet.text("image", (GAP + _COLUMN / 2, y), ha="center", weight="bold")
            panel(sheet, example, (GAP, y + (2 + above) * LINE), _COLUMN)
        at = (GAP + (i % columns + 1) * across, y)
        end = max(end, _method_column(sheet, example, tokens, saliency, at, above=above) + GAP)
    sheet.close(_notes(sheet, [f"{name}: {why}" for name, why in (missing or {}).items()], end) + BAR)
    # Every map has its own scale.
    note = "each map relative to its own largest; methods without sign have no blue; error: of completeness"
    colour_bar(sheet, (sheet.width - 300) / 2, 300, {-1: "against", 0: "0, or least", 1: "for, or most"}, note)
    return sheet.figure


def image_pair_sheet(
    first: Example,
    second: Example,
    saliencies: tuple[Values | None, Values],
    *,
    similarity: float,
    error: float | None = None,
    scale: Scale = "signed",
    kinds: str = "Two images",
    where: str = "",
) -> Figure:
    """Draw the parts of two images, or of an image and a sound, that make them similar.

    Args:
        first: the first image, and the box in it that is asked about.
        second: the second image.
        saliencies: [h, w] for each; None for the first where a box of it is asked about.
        similarity: of the images' embeddings.
        error: the completeness error, of methods that have one.
        scale: how values become colours.
        kinds: what is compared, as the title has it.
        where: the layer that it was read at.
    """
    asked = "what matches the box" if saliencies[0] is None else "what makes them similar"
    sheet = Sheet(_PAIR, f"{kinds}: {asked}", _numbers(similarity, error, where))
    y = panel(sheet, first, (GAP, sheet.top), _SIDE, saliencies[0], scale)
    y = max(y, panel(sheet, second, (2 * GAP + _SIDE, sheet.top), _SIDE, saliencies[1], scale))
    named = zip(_ORDER, saliencies, strict=True)
    _bars(sheet, y + GAP, [(f"patches of the {name}", values, scale) for name, values in named if values is not None])
    return sheet.figure


def text_pair_sheet(
    first: Sequence[Token],
    second: Sequence[Token],
    pairs: Values,
    saliencies: tuple[Values, Values],
    *,
    similarity: float,
    error: float,
    where: str = "",
) -> Figure:
    """Draw what makes two captions similar: their tokens in two lines, and all pairs as a matrix.

    Args:
        first: tokens of the first caption, [m]; those of the phrase that is asked about are marked.
        second: tokens of the second caption, [n].
        pairs: [m, n], signed.
        saliencies: [m] and [n], signed.
        similarity: of the captions' embeddings.
        error: the completeness error.
        where: the layer that it was read at.

    Raises:
        ValueError: not one value for each token.
    """
    for tokens, values in zip((first, second), saliencies, strict=True):
        _check_count(tokens, values)
    cell = max(14, min(36, 900 // max(len(second), 1), 900 // max(len(first), 1)))
    left = round(max(text_width(token.text) for token in first)) + 2 * GAP
    above = round(max(text_width(token.text) for token in second)) + GAP
    width = max(left + cell * len(second) + 2 * GAP, 640)
    asked = "what matches the phrase" if any(token.marked for token in first) else "what makes them similar"
    sheet = Sheet(width, f"Two captions: {asked}", _numbers(similarity, error, where))
    y = float(sheet.top)
    for name, tokens, values in zip(_ORDER, (first, second), saliencies, strict=True):
        sheet.text(f"{name} caption", (GAP, y), fontsize=_SMALL, color=_GREY)
        y = _chips(sheet, tokens, scaled(values, "signed"), (GAP, y + LINE), width - 2 * GAP)
    y += GAP + above
    shown: list[tuple[str, Values, Scale]] = [
        (name, values, "signed") for name, values in zip((*_ORDER, "pairs"), (*saliencies, pairs), strict=True)
    ]
    _bars(sheet, y + cell * len(first) + GAP, shown)
    _matrix(sheet.axes(left, y, cell * len(second), cell * len(first)), first, second, pairs)
    return sheet.figure


def _method_column(
    sheet: Sheet, example: Example, tokens: Sequence[Token], saliency: Saliency, at: Point, *, above: bool
) -> float:
    """One method of a comparison: its name, layers (`above` leaves room for them) and range, heat map and tokens."""
    x, y = at
    sheet.text(saliency.method, (x + _COLUMN / 2, y), ha="center", weight="bold")
    if above:
        sheet.text(saliency.where, (x + _COLUMN / 2, y + LINE), ha="center", fontsize=_SMALL)
        y += LINE
    low, high = limits(saliency.image, "range")
    kind = {"signed": "signed", "positive": "from 0", "range": "min–max"}[saliency.scale]
    if saliency.completeness_error is not None:
        kind = f"error {saliency.completeness_error:.0e}"
    numbers = f"{low:.2g} … {high:.2g}  ({kind})"
    sheet.text(numbers, (x + _COLUMN / 2, y + LINE), ha="center", fontsize=_SMALL, color=_GREY)
    y = panel(sheet, example, (x, y + 2 * LINE), _COLUMN, saliency.image, saliency.scale)
    y = _chips(sheet, tokens, scaled(saliency.text, saliency.scale), (x, y + 8), _COLUMN)
    if heat_fault(saliency.text) is not None:
        sheet.text(f"tokens: {heat_fault(saliency.text)}", (x, y - 6), fontsize=_SMALL, color=_GREY)
        y += LINE - 6
    for other in saliency.others:
        sheet.text("rather than", (x, y), fontsize=_SMALL, color=_GREY)
        y = _chips(sheet, other.tokens, scaled(other.values, saliency.scale), (x, y + LINE), _COLUMN)
    return y


def _chips(sheet: Sheet, tokens: Sequence[Token], strengths: Values, at: Point, width: float) -> float:
    """Tokens, each on ground of its colour, those of the chosen phrase underlined in yellow; return where they end.

    Words stay together where they fit on one line.
    """
    colours = COLOURS(strengths / 2 + 0.5)
    widths = [min(max(text_width(token.text), 4.0) + 2 * _CHIP_PAD, width) for token in tokens]
    x, top = 0.0, at[1]
    for i, token in enumerate(tokens):
        x += 0 if token.joined or not x else _WORD_GAP
        after = next((j for j in range(i + 1, len(tokens)) if not tokens[j].joined), len(tokens))
        if x and x + (widths[i] if token.joined else sum(widths[i:after])) > width:
            x, top = 0.0, top + _CHIP_LINE
        look = {"linewidth": 0.5, "zorder": 2}
        place = (at[0] + x, top, widths[i])
        sheet.ground(*place, _CHIP_HEIGHT, facecolor=colours[i], edgecolor="0.8", **look)
        if token.marked:
            sheet.ground(place[0], top + _CHIP_HEIGHT, widths[i], 4, facecolor=_MARK, edgecolor="0.3", **look)
        ink = "white" if abs(strengths[i]) > _WHITE_TEXT_FROM else "black"
        sheet.text(token.text, (place[0] + widths[i] / 2, top + 2), ha="center", color=ink, zorder=3)
        x += widths[i]
    return top + _CHIP_LINE


def _notes(sheet: Sheet, notes: Sequence[str], y: float) -> float:
    """Small lines across the sheet."""
    for note in notes:
        y = sheet.caption(note, (GAP, y), sheet.width - 2 * GAP, fontsize=_SMALL, color=_GREY)
    return y + 16


def _matrix(axes: Any, first: Sequence[Token], second: Sequence[Token], pairs: Values) -> None:
    """All pairs of tokens, a cell each; the first caption's tokens down the side."""
    axes.imshow(scaled(pairs, "signed"), COLOURS, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axes.tick_params(length=0, labelsize=_SMALL, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks(range(len(second)), [token.text for token in second], rotation=90, parse_math=False)
    axes.set_yticks(range(len(first)), [token.text for token in first], parse_math=False)
    for label, token in zip(axes.get_yticklabels(), first, strict=True):
        label.set_bbox({"facecolor": _MARK if token.marked else "white", "edgecolor": "none", "pad": 1})
    fault = heat_fault(pairs)
    if fault is not None:
        axes.text(0.5, 0.5, fault, transform=axes.transAxes, ha="center", va="center", weight="bold")


def _bars(sheet: Sheet, y: float, maps: Sequence[tuple[str, Values, Scale]]) -> None:
    """Close a sheet with colour bars side by side, each with the name and the numbers of its map."""
    sheet.close(y + BAR)
    share = sheet.width / len(maps)
    for place, (name, array, scale) in enumerate(maps):
        length = min(260.0, share - 4 * GAP)
        fault = heat_fault(array) if array.size else "no token"
        if fault is not None:
            sheet.text(f"{name}: {fault}", (share * (place + 0.5), sheet.height - 48), ha="center", color=_GREY)
            continue
        low, high = limits(array, scale)
        ticks = {low: f"{low:.2g}", high: f"{high:.2g}"} | ({0.0: "0"} if scale == "signed" else {})
        note = f"{name} ({_MEANING[scale]})"
        colour_bar(sheet, share * place + (share - length) / 2, length, ticks, note, signed=scale == "signed")


def _numbers(similarity: float, error: float | None = None, where: str = "") -> str:
    given = f"cosine similarity {similarity:.3f}", "" if error is None else f"completeness error {error:+.1e}", where
    return "    ".join(filter(None, given))


def _check_count(tokens: Sequence[Token], values: Values) -> None:
    if np.shape(values) != (len(tokens),):
        raise ValueError(f"expected one value for each of the {len(tokens)} tokens, got the shape {np.shape(values)}")
