"""A picture laid out by hand in pixels: text whose width is known, captions with highlights, images pixel for pixel.

Figures are made with matplotlib's objects on the Agg canvas, never through pyplot: a training process draws many of
them, and users may plot with pyplot at the same time. Nothing here needs torch.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

DPI = 128
FONT_PT = 9.0
LINE = 19  # pixels from one line of text to the next at that size and DPI
GAP = 16
_HIGHLIGHT = "#ffe680"
_OWN_FONT = "DejaVu Sans"  # which matplotlib brings
_FALLBACK_FONTS = (
    *(f"Noto Sans {name}" for name in ("CJK SC", "CJK JP", "CJK KR", "SC", "JP", "KR", "Thai", "Devanagari", "Arabic")),
    *("Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Noto Sans Hebrew", "Noto Sans Bengali"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Leelawadee UI", "PingFang SC", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "Thonburi", "Arial Unicode MS"),
)
_NO_GLYPH = "\u25a1"
_told_of: set[str] = set()

Point = tuple[float, float]
Place = tuple[float, float, float, float]


@contextmanager
def style() -> Iterator[None]:
    """Use matplotlib's defaults with `style.mplstyle` on top, whatever settings the user has; also a decorator."""
    families: dict[Any, Any] = {"font.family": ["sans-serif", *_fallback_fonts()]}
    with mpl.rc_context(rc=families, fname=str(files("lightning_xai.report").joinpath("style.mplstyle"))):
        yield


class SheetFigure(Figure):
    """A figure that notebooks show, although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()


class Sheet:
    """A figure in pixels counted from the top left corner, filled from the top down.

    Args:
        width: of the figure; `close` gives it its height.
        title: stands in the middle above all, smaller where it would not fit.
        subtitle: a line below it.

    Attributes:
        top: where the title ends.
    """

    def __init__(self, width: int, title: str, subtitle: str = "") -> None:
        self.width, self.height, self.top = width, 0, 64 if subtitle else 44
        self.figure = SheetFigure(figsize=(width / DPI, 1), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        # One pair of axes for all pictures and texts: axes are slow to make and to draw.
        self._axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(1, 0))
        self._axes.set_axis_off()
        # Bold letters at 12 points are about 1.6 times as wide as the plain ones that the ruler measures.
        size = min(12.0, 12.0 * (width - 2 * GAP) / max(1.6 * text_width(printable(title)), 1.0))
        self.text(title, (width / 2, 12), ha="center", fontsize=size, weight="bold")
        self.text(subtitle, (width / 2, 36), ha="center", color="0.35")

    def close(self, height: float) -> Figure:
        """Give the figure its height, after which `axes` can be added."""
        self.height = round(height)
        self.figure.set_size_inches(self.width / DPI, self.height / DPI)
        self._axes.set_ylim(self.height, 0)
        return self.figure

    def text(self, text: str, at: Point, **style: Any) -> None:
        """Write one line of text, as it is (no mathematics in it), with its top left corner at `at`."""
        self._axes.text(*at, printable(text), parse_math=False, **{"fontsize": FONT_PT, "va": "top", **style})

    def picture(self, values: NDArray[np.floating], place: Place, clip: Place | None = None, **style: Any) -> None:
        """Show [h, w, 3] or, in the colours of the `style`, [h, w] in a rectangle, and nothing outside of `clip`.

        Rectangles are left, top, width and height.
        """
        x, y, width, height = place
        shown = self._axes.imshow(values, aspect="auto", extent=(x, x + width, y + height, y), **style)
        if clip not in (None, place):
            left, top, across, down = clip
            shown.set_clip_path(Rectangle((left, top), across, down, transform=self._axes.transData))

    def ring(self, at: Point) -> None:
        """Draw a small white circle, with a dark line around it."""
        dark = withStroke(linewidth=2.5, foreground="black")
        self._axes.plot(*at, "o", markersize=5, markerfacecolor="none", markeredgecolor="white", path_effects=[dark])

    def ground(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        """Fill a rectangle."""
        self._axes.add_patch(Rectangle((x, y), width, height, **style))

    def caption(
        self, caption: str, at: Point, width: float, spans: Sequence[tuple[int, int]] = (), **style: Any
    ) -> float:
        """Write a text in lines of at most `width`, with its spans on yellow ground; return where it ends."""
        text, (x, top) = printable(caption), at
        for begin, end in pairwise(wrap(text, width)):
            line = text[begin:end].rstrip()
            for first, last in ((max(first - begin, 0), min(last - begin, len(line))) for first, last in spans):
                if first < last:
                    right = text_width(line[:last])
                    left = right - text_width(line[first:last])
                    look = {"color": _HIGHLIGHT, "linewidth": 0, "zorder": 1}
                    self.ground(x + left - 2, top - 2, right - left + 4, LINE - 1, **look)
            self.text(line, (x, top), zorder=2, **style)
            top += LINE
        return top

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes in a rectangle of a closed sheet, for a colour bar or a matrix."""
        shares = x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height
        return self.figure.add_axes(shares)


def picture(pixels: NDArray[np.uint8]) -> Figure:
    """A figure of nothing but these pixels, [H, W, 3].

    Raises:
        ValueError: they are more across or down than matplotlib draws.
    """
    if max(pixels.shape) >= 2**16:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are more than can be drawn")
    figure = Figure(figsize=(pixels.shape[1] / DPI, pixels.shape[0] / DPI), dpi=DPI)
    figure.figimage(pixels)
    return figure


def wrap(text: str, width: float) -> list[int]:
    """Where the lines of a text begin, and its end: broken at blanks (a word wider than `width` pixels anywhere)."""
    breaks = [0]
    for word in re.finditer(r"\S+", text):
        if text_width(text[breaks[-1] : word.end()]) > width:
            breaks += [word.start()] if word.start() > breaks[-1] else []
            for end in range(word.start() + 1, word.end()):
                if text_width(text[breaks[-1] : end + 1]) > width:
                    breaks.append(end)
    return [*breaks, len(text)]


@cache
def _ruler() -> Any:
    canvas: Any = FigureCanvasAgg(Figure(dpi=DPI))
    return canvas.get_renderer()


def text_width(text: str) -> float:
    """Pixels that a text takes at `FONT_PT`."""
    return float(_ruler().get_text_width_height_descent(text, FontProperties(size=FONT_PT), ismath=False)[0])


def printable(text: str) -> str:
    """The text with line breaks and what no font can draw replaced one for one, so that character spans still hold.

    Scripts that no installed font has are warned of, once each.
    """
    shown = "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)
    if shown.isascii():
        return shown
    for char in dict.fromkeys(shown):
        if not any(ord(char) in _characters(family) for family in (_OWN_FONT, *_fallback_fonts())):
            _tell_of_missing_font(unicodedata.name(char, "these").split()[0], char)
            shown = shown.replace(char, _NO_GLYPH)
    return shown


@cache
def _fallback_fonts() -> tuple[str, ...]:
    """Installed fonts for scripts that matplotlib's own font lacks."""
    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FALLBACK_FONTS if name in installed)


@cache
def _characters(family: str) -> frozenset[int]:
    """The code points that a font can draw."""
    return frozenset(get_font(findfont(FontProperties(family=family))).get_charmap())


def _tell_of_missing_font(script: str, char: str) -> None:
    if script in _told_of:
        return
    _told_of.add(script)
    warnings.warn(
        f"no installed font draws {script} characters such as {char!r}, which become {_NO_GLYPH} in pictures: install "
        "one that does (Noto Sans CJK for Chinese, Japanese and Korean, on Debian fonts-noto-cjk; else Noto Sans)",
        stacklevel=4,
    )
