"""Pictures of attributions: heat maps over the image, the caption's tokens on coloured ground, and what they mean.

Red is for the similarity, blue against it. Maps of methods that know no sign are drawn from white to red. Every map has
its own scale, which the picture states in numbers; a map whose values are all equal is labelled constant.

Drawn from numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xai.report.plots import Example, colour_map, fitted, heat_fault, outlined, overlay, tinted, to_uint8
from lightning_xai.report.sheet import FONT_PT, GAP, LINE, Sheet, text_width, wrap

Values = NDArray[np.floating]
Scale = Literal["signed", "positive", "range"]
"""How values become colours: zero in the middle, from zero up, or from the lowest to the highest."""

_SIDE = 416  # pixels of an image's longer side
_COLUMN = 232  # likewise, where methods stand side by side
_MOST_COLUMNS = 6  # methods in a row
_HEAD = 64
_FOOT = 76
_CHIP_HEIGHT, _CHIP_LINE = 19, 27  # pixels of a token's ground, and from one line of tokens to the next
_CHIP_PAD, _WORD_GAP = 4, 5
_SMALL = FONT_PT - 1
_GREY = "0.35"
_MARK = "#ffd60a"
_WHITE_TEXT_FROM = 0.6
_ORDER = ("first", "second")


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
class Saliency:
    """What one method says of an image and its caption.

    Attributes:
        method: its name.
        image: [h, w] at patch resolution.
        text: [n], one value for each token that is shown.
        similarity: the cosine similarity that is explained.
        scale: how values become colours.
        completeness_error: None for methods that have none.
    """

    method: str
    image: Values
    text: Values
    similarity: float
    scale: Scale = "signed"
    completeness_error: float | None = None


def explanation_sheet(
    example: Example, tokens: Sequence[Token], saliency: Saliency, *, asked: str = "", notes: Sequence[str] = ()
) -> Figure:
    """One method: the image, its heat map, the caption with the phrase in yellow, and its tokens in colours.

    Args:
        example: image, caption, phrase, and the box that is asked about.
        tokens: the caption's tokens, [n].
        saliency: the maps.
        asked: what they answer, for the title.
        notes: lines below the tokens.

    Raises:
        ValueError: not one value for each token.
    """
    _check_count(tokens, saliency.text)
    width = 2 * (_SIDE + GAP) + GAP
    caption = wrap(example.caption, example.spans, width - 2 * GAP)
    chips, lines = _chip_rows(tokens, width - 2 * GAP), _wrapped(notes, width - 2 * GAP)
    tall = _panel_height(example, _SIDE)
    height = _HEAD + tall + 12 + LINE * (len(caption) + len(lines)) + _CHIP_LINE * len(chips) + 24 + _FOOT
    sheet = _Sheet(width, height)
    sheet.title(f"{saliency.method}: {asked}" if asked else saliency.method)
    sheet.subtitle(_numbers(saliency))
    sheet.plain_panel(example, (GAP, _HEAD), _SIDE)
    sheet.heat_panel(example, saliency.image, saliency.scale, (GAP + _SIDE + GAP, _HEAD), _SIDE)
    y = _HEAD + tall + 12
    sheet.caption(caption, (GAP, y))
    y += LINE * len(caption) + 8
    sheet.chips(chips, tokens, scaled(saliency.text, saliency.scale), (GAP, y))
    y += _CHIP_LINE * len(chips)
    sheet.small_lines(lines, (GAP, y))
    sheet.bars({"patches": saliency.image, "tokens": saliency.text}, saliency.scale)
    return sheet.figure


def comparison_sheet(
    example: Example,
    tokens: Sequence[Token],
    saliencies: Sequence[Saliency],
    *,
    missing: Mapping[str, str] | None = None,
) -> Figure:
    """Methods side by side, after Figure 1 of the M2IB paper: the image, then a column for each method.

    Args:
        example: the image and its caption.
        tokens: the caption's tokens, [n].
        saliencies: one for each method that serves the model.
        missing: the other methods, and why they do not.

    Raises:
        ValueError: no method at all, or not one value for each token.
    """
    if not saliencies:
        raise ValueError(f"no method serves this model: {dict(missing or {})}")
    for saliency in saliencies:
        _check_count(tokens, saliency.text)
    rows = -(-len(saliencies) // _MOST_COLUMNS)
    columns = -(-len(saliencies) // rows)
    width = max((columns + 1) * (_COLUMN + GAP) + GAP, 2 * (_COLUMN + GAP) + GAP + 200)
    chips, tall = _chip_rows(tokens, _COLUMN), _panel_height(example, _COLUMN)
    caption = wrap(example.caption, example.spans, width - 2 * GAP)
    lines = _wrapped([f"{name}: {why}" for name, why in (missing or {}).items()], width - 2 * GAP)
    row_height = 2 * LINE + tall + 8 + _CHIP_LINE * len(chips) + GAP
    top = 40 + LINE * len(caption) + 12
    sheet = _Sheet(width, top + rows * row_height + LINE * len(lines) + 8 + _FOOT)
    sheet.title(f"cosine similarity {saliencies[0].similarity:.3f}")
    sheet.caption(caption, (GAP, 40))
    for i, saliency in enumerate(saliencies):
        row, column = divmod(i, columns)
        at = (GAP + (column + 1) * (_COLUMN + GAP), top + row * row_height)
        if column == 0:
            sheet.text("image", (GAP + _COLUMN / 2, at[1]), ha="center", weight="bold")
            sheet.plain_panel(example, (GAP, at[1] + 2 * LINE), _COLUMN)
        sheet.column(example, tokens, saliency, chips, at)
    sheet.small_lines(lines, (GAP, top + rows * row_height))
    sheet.general_bar()
    return sheet.figure


def image_pair_sheet(
    first: Example, second: Example, saliencies: tuple[Values | None, Values], *, similarity: float, error: float
) -> Figure:
    """What in two images makes them similar.

    Args:
        first: the first image, and the box in it that is asked about.
        second: the second image.
        saliencies: [h, w] signed for each; None for the first where a box of it is asked about.
        similarity: of the images' embeddings.
        error: the completeness error.
    """
    tall = max(_panel_height(first, _SIDE), _panel_height(second, _SIDE))
    sheet = _Sheet(2 * (_SIDE + GAP) + GAP, _HEAD + tall + GAP + 16 + _FOOT)
    asked = "what matches the box" if saliencies[0] is None else "what makes them similar"
    sheet.title(f"Two images: {asked}")
    sheet.subtitle(f"cosine similarity {similarity:.3f}    completeness error {error:+.1e}")
    if saliencies[0] is None:
        sheet.plain_panel(first, (GAP, _HEAD), _SIDE)
    else:
        sheet.heat_panel(first, saliencies[0], "signed", (GAP, _HEAD), _SIDE)
    sheet.heat_panel(second, saliencies[1], "signed", (GAP + _SIDE + GAP, _HEAD), _SIDE)
    named = zip(_ORDER, saliencies, strict=True)
    shown = {f"patches of the {name}": values for name, values in named if values is not None}
    sheet.bars(shown, "signed")
    return sheet.figure


def text_pair_sheet(
    first: Sequence[Token],
    second: Sequence[Token],
    pairs: Values,
    saliencies: tuple[Values, Values],
    *,
    similarity: float,
    error: float,
) -> Figure:
    """What in two captions makes them similar: their tokens in two lines, and all pairs as a matrix.

    Args:
        first: tokens of the first caption, [m]; those of the phrase that is asked about are marked.
        second: tokens of the second caption, [n].
        pairs: [m, n], signed.
        saliencies: [m] and [n], signed.
        similarity: of the captions' embeddings.
        error: the completeness error.

    Raises:
        ValueError: not one value for each token.
    """
    for tokens, values in zip((first, second), saliencies, strict=True):
        _check_count(tokens, values)
    cell = max(14, min(36, 900 // max(len(second), 1), 900 // max(len(first), 1)))
    left = round(max(text_width(token.text) for token in first)) + 2 * GAP
    above = round(max(text_width(token.text) for token in second)) + GAP
    width = max(left + cell * len(second) + 2 * GAP, 640)
    rows = [_chip_rows(tokens, width - 2 * GAP) for tokens in (first, second)]
    chips_height = sum(_CHIP_LINE * len(lines) + LINE for lines in rows) + GAP
    sheet = _Sheet(width, _HEAD + chips_height + above + cell * len(first) + GAP + _FOOT)
    asked = "what matches the phrase" if any(token.marked for token in first) else "what makes them similar"
    sheet.title(f"Two captions: {asked}")
    sheet.subtitle(f"cosine similarity {similarity:.3f}    completeness error {error:+.1e}")
    y = _HEAD
    for name, tokens, values, lines in zip(_ORDER, (first, second), saliencies, rows, strict=True):
        sheet.text(f"{name} caption", (GAP, y), fontsize=_SMALL, color=_GREY)
        sheet.chips(lines, tokens, scaled(values, "signed"), (GAP, y + LINE))
        y += LINE + _CHIP_LINE * len(lines)
    sheet.matrix(first, second, pairs, (left, y + GAP + above), cell)
    sheet.bars(dict(zip((*_ORDER, "pairs"), (*saliencies, pairs), strict=True)), "signed")
    return sheet.figure


def scaled(values: Values, scale: Scale) -> Values:
    """Values as strengths of colour: in [-1, 1] for signed ones, [0, 1] for others; 0 where all of them are equal.

    >>> values = np.array([-1.0, 0.0, 2.0])
    >>> [scaled(values, "signed").tolist(), scaled(values, "range").round(2).tolist()]
    [[-0.5, 0.0, 1.0], [0.0, 0.33, 1.0]]
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size or heat_fault(values) is not None:
        return np.zeros_like(values)
    low, high = limits(values, scale)
    if scale == "range":
        return np.asarray((values - low) / (high - low))
    return np.asarray(np.clip(values / high, -1, 1))


def limits(values: Values, scale: Scale) -> tuple[float, float]:
    """The values that the ends of the colour bar stand for."""
    low, high = float(np.min(values)), float(np.max(values))
    if scale == "range":
        return low, high
    largest = max(abs(low), abs(high))
    return (-largest if scale == "signed" else 0.0), largest


_Row = list[tuple[int, float, float]]
"""Tokens of one line: number, left edge and width in pixels."""


class _Sheet(Sheet):
    """A sheet with heat maps, tokens on coloured ground, and colour bars."""

    def subtitle(self, text: str) -> None:
        self.text(text, (self.width / 2, 36), ha="center", color=_GREY)

    def plain_panel(self, example: Example, at: tuple[float, float], side: int) -> None:
        image, box = fitted(example, side)
        self._panel(outlined(to_uint8(image), box), at, side)

    def heat_panel(self, example: Example, values: Values, scale: Scale, at: tuple[float, float], side: int) -> None:
        image, box = fitted(example, side)
        fault = heat_fault(values)
        strengths = scaled(values, scale)
        self._panel(overlay(image, strengths, box, vmax=1.0), at, side)
        if fault is not None:
            middle = (at[0] + side / 2, at[1] + image.shape[0] / 2)
            ground = {"facecolor": "white", "edgecolor": "0.6", "boxstyle": "round,pad=0.5"}
            self.text(fault, middle, ha="center", va="center", weight="bold", bbox=ground)

    def _panel(self, picture: NDArray[np.uint8], at: tuple[float, float], side: int) -> None:
        """A picture with its upper edge at `at`, centred across."""
        down = (side - picture.shape[0]) // 2
        self.picture(picture, (at[0], at[1] - down), side)

    def column(
        self,
        example: Example,
        tokens: Sequence[Token],
        saliency: Saliency,
        chips: Sequence[_Row],
        at: tuple[float, float],
    ) -> None:
        """One method of a comparison: its name and range, heat map and tokens."""
        x, y = at
        self.text(saliency.method, (x + _COLUMN / 2, y), ha="center", weight="bold")
        low, high = limits(saliency.image, "range")
        kind = {"signed": "signed", "positive": "from 0", "range": "min–max"}[saliency.scale]
        if saliency.completeness_error is not None:
            kind = f"error {saliency.completeness_error:.0e}"
        self.text(
            f"{low:.2g} … {high:.2g}  ({kind})",
            (x + _COLUMN / 2, y + LINE),
            ha="center",
            fontsize=_SMALL,
            color=_GREY,
        )
        self.heat_panel(example, saliency.image, saliency.scale, (x, y + 2 * LINE), _COLUMN)
        below = y + 2 * LINE + _panel_height(example, _COLUMN) + 8
        self.chips(chips, tokens, scaled(saliency.text, saliency.scale), (x, below))
        if heat_fault(saliency.text) is not None:
            line = below + _CHIP_LINE * len(chips) - 6
            self.text(f"tokens: {heat_fault(saliency.text)}", (x, line), fontsize=_SMALL, color=_GREY)

    def chips(self, rows: Sequence[_Row], tokens: Sequence[Token], strengths: Values, at: tuple[float, float]) -> None:
        """Tokens, each on a ground of its colour; those of the chosen phrase are underlined in yellow."""
        colours = tinted(np.ones((len(strengths), 3), dtype=np.float32), strengths.astype(np.float32))
        for number, row in enumerate(rows):
            top = at[1] + number * _CHIP_LINE
            for index, left, width in row:
                x, colour = at[0] + left, tuple(colours[index].tolist())
                self.ground(x, top, width, _CHIP_HEIGHT, facecolor=colour, edgecolor="0.8", linewidth=0.5, zorder=2)
                if tokens[index].marked:
                    look = {"facecolor": _MARK, "edgecolor": "0.3", "linewidth": 0.5, "zorder": 2}
                    self.ground(x, top + _CHIP_HEIGHT, width, 4, **look)
                ink = "white" if abs(strengths[index]) > _WHITE_TEXT_FROM else "black"
                self.text(tokens[index].text, (x + width / 2, top + 2), ha="center", color=ink, zorder=3)

    def small_lines(self, lines: Sequence[str], at: tuple[float, float]) -> None:
        for number, line in enumerate(lines):
            self.text(line, (at[0], at[1] + number * LINE), fontsize=_SMALL, color=_GREY)

    def matrix(
        self, first: Sequence[Token], second: Sequence[Token], pairs: Values, at: tuple[int, int], cell: int
    ) -> None:
        """All pairs of tokens, a cell each; the first caption's tokens down the side."""
        ground = np.ones((*pairs.shape, 3), dtype=np.float32)
        picture = to_uint8(tinted(ground, scaled(pairs, "signed").astype(np.float32)))
        axes = self.axes(*at, cell * len(second), cell * len(first))
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.tick_params(length=0, labelsize=_SMALL, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.set_xticks(range(len(second)), [token.text for token in second], rotation=90, parse_math=False)
        axes.set_yticks(range(len(first)), [token.text for token in first], parse_math=False)
        for label, token in zip(axes.get_yticklabels(), first, strict=True):
            label.set_bbox({"facecolor": _MARK if token.marked else "white", "edgecolor": "none", "pad": 1})
        fault = heat_fault(pairs)
        if fault is not None:
            axes.text(0.5, 0.5, fault, transform=axes.transAxes, ha="center", va="center", weight="bold")

    def bars(self, values: Mapping[str, Values], scale: Scale) -> None:
        """Side by side, a colour bar with its own numbers for each of the maps."""
        share = self.width / len(values)
        for place, (name, array) in enumerate(values.items()):
            length = min(260.0, share - 4 * GAP)
            left = share * place + (share - length) / 2
            fault = heat_fault(array) if array.size else "no token"
            if fault is not None:
                self.text(f"{name}: {fault}", (share * (place + 0.5), self.height - 48), ha="center", color=_GREY)
                continue
            low, high = limits(array, scale)
            ticks = {low: f"{low:.2g}", high: f"{high:.2g}"} | ({0.0: "0"} if scale == "signed" else {})
            meaning = {
                "signed": "blue against, red for",
                "positive": "no sign: white 0, red most",
                "range": "no sign: white least, red most",
            }
            self._bar((left, length), (low, high), ticks, f"{name} ({meaning[scale]})", signed=scale == "signed")

    def general_bar(self) -> None:
        """One colour bar for maps that each have a scale of their own."""
        place = ((self.width - 300) / 2, 300.0)
        ticks = {-1.0: "against", 0.0: "0, or least", 1.0: "for, or most"}
        note = "each map relative to its own largest; methods without sign have no blue; error: of completeness"
        self._bar(place, (-1.0, 1.0), ticks, note, signed=True)

    def _bar(
        self,
        place: tuple[float, float],
        ends: tuple[float, float],
        ticks: Mapping[float, str],
        note: str,
        *,
        signed: bool,
    ) -> None:
        left, length = place
        colours = colour_map() if signed else ListedColormap(colour_map()(np.linspace(0.5, 1, 101)))
        axes = self.axes(left, self.height - _FOOT + 12, length, 12)
        shown = ScalarMappable(Normalize(*ends), colours)
        bar = self.figure.colorbar(shown, cax=axes, orientation="horizontal", ticks=list(ticks))
        bar.ax.set_xticklabels(list(ticks.values()), fontsize=_SMALL)
        bar.outline.set_linewidth(0.5)
        self.text(note, (left + length / 2, self.height - 24), ha="center", fontsize=_SMALL, color=_GREY)


def _chip_rows(tokens: Sequence[Token], width: float) -> list[_Row]:
    """Where tokens stand, in lines of at most `width` pixels; words stay together where they fit on one line."""
    words: list[list[int]] = []
    for index, token in enumerate(tokens):
        if token.joined and words:
            words[-1].append(index)
        else:
            words.append([index])
    rows: list[_Row] = [[]]
    x = 0.0
    for word in words:
        widths = [max(text_width(tokens[index].text), 4.0) + 2 * _CHIP_PAD for index in word]
        if rows[-1] and x + sum(widths) > width:
            rows.append([])
            x = 0.0
        for index, across in zip(word, widths, strict=True):
            if rows[-1] and x + across > width:
                rows.append([])
                x = 0.0
            rows[-1].append((index, x, min(across, width)))
            x += across
        x += _WORD_GAP
    return rows


def _panel_height(example: Example, side: int) -> int:
    height, width = (int(pixels) for pixels in example.image.shape[:2])
    return max(1, round(side * height / max(height, width)))


def _wrapped(lines: Sequence[str], width: float) -> list[str]:
    return [line.text for text in lines for line in wrap(text, (), width)]


def _numbers(saliency: Saliency) -> str:
    text = f"cosine similarity {saliency.similarity:.3f}"
    if saliency.completeness_error is not None:
        text += f"    completeness error {saliency.completeness_error:+.1e}"
    return text


def _check_count(tokens: Sequence[Token], values: Values) -> None:
    if np.shape(values) != (len(tokens),):
        raise ValueError(f"expected one value for each of the {len(tokens)} tokens, got the shape {np.shape(values)}")
