"""A picture laid out by hand in pixels: text whose width is known, captions with highlights, images pixel for pixel.

Figures are made with matplotlib's objects on the Agg canvas, never through pyplot: a training process draws many of
them, and users may plot with pyplot at the same time. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib.resources import files
from itertools import pairwise
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

P = ParamSpec("P")

DPI = 128
FONT_PT = 9.0
LINE = 19  # pixels from one line of text to the next at that size and DPI
GAP = 16
_HIGHLIGHT = "#ffe680"


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw a figure with `style.mplstyle`, whatever settings of matplotlib the user has."""

    @wraps(draw)
    def with_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return with_style


@contextmanager
def style() -> Iterator[None]:
    """Use matplotlib's defaults with `style.mplstyle` on top."""
    with mpl.rc_context(_style()):
        yield


@cache
def _style() -> Any:
    """Matplotlib's defaults with `style.mplstyle` on top, but for the backend, which would be loaded."""
    own = mpl.rc_params_from_file(str(files("lightning_xai.report").joinpath("style.mplstyle")))
    return {name: value for name, value in own.items() if not name.startswith("backend")}


class Sheet:
    """A figure in pixels counted from the top left corner, with the parts that sheets are made of."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        # One pair of axes for all pictures and texts: axes are slow to make and to draw.
        self._axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self._axes.set_axis_off()

    def text(self, text: str, at: tuple[float, float], **style: Any) -> None:
        """Write one line of text, as it is (no mathematics in it), with its top left corner at `at`."""
        self._axes.text(*at, printable(text), parse_math=False, **{"fontsize": FONT_PT, "va": "top", **style})

    def title(self, title: str) -> None:
        """Write the title in the middle above all, smaller where it would not fit."""
        # Bold letters at 12 points are about 1.5 times as wide as the plain ones that the ruler measures.
        size = min(12.0, 12.0 * (self.width - 2 * GAP) / max(1.5 * text_width(printable(title)), 1.0))
        self.text(title, (self.width / 2, 12), ha="center", fontsize=size, weight="bold")

    def picture(self, picture: NDArray[np.uint8], at: tuple[float, float], side: int) -> None:
        """Show uint8 [h, w, 3] pixel for pixel, centred in the square at `at`."""
        height, width = picture.shape[:2]
        x, y = at[0] + (side - width) // 2, at[1] + (side - height) // 2
        extent = (x, x + width, y + height, y)
        self._axes.imshow(picture, interpolation="nearest", aspect="auto", extent=extent)

    def ground(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        """Fill a rectangle."""
        self._axes.add_patch(Rectangle((x, y), width, height, **style))

    def caption(self, lines: Sequence[Line], at: tuple[float, float]) -> None:
        """Write the lines of a caption below each other, with their highlights in yellow."""
        for number, line in enumerate(lines):
            top = at[1] + number * LINE
            for start, end in line.spans:
                right = text_width(line.text[:end])
                left = right - text_width(line.text[start:end])
                look = {"color": _HIGHLIGHT, "linewidth": 0, "zorder": 1}
                self.ground(at[0] + left - 2, top - 2, right - left + 4, LINE - 1, **look)
            self.text(line.text, (at[0], top), zorder=2)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes in a rectangle, for a colour bar or a matrix."""
        shares = x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height
        return self.figure.add_axes(shares)


@dataclass(frozen=True)
class Line:
    """One line of a wrapped caption, and the parts of it that are highlighted."""

    text: str
    spans: tuple[tuple[int, int], ...]


def wrap(caption: str, spans: Sequence[tuple[int, int]], width: float) -> list[Line]:
    """Break a caption at blanks (a word wider than the line anywhere), so that each line is at most `width` pixels."""
    text = printable(caption)
    breaks, start = [0], 0
    while text_width(text[start:]) > width:
        # Bisection, since the measured width grows with the number of characters.
        low, high = start + 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if text_width(text[start:middle]) <= width else (low, middle - 1)
        blank = text.rfind(" ", start + 1, low + 1)
        start = blank + 1 if blank > 0 else low
        breaks.append(start)
    lines = []
    for begin, end in pairwise([*breaks, len(text)]):
        line = text[begin:end].rstrip()
        inside = [(max(first - begin, 0), min(last - begin, len(line))) for first, last in spans]
        lines.append(Line(line, tuple((first, last) for first, last in inside if first < last)))
    return lines


@cache
def _ruler() -> Any:
    canvas: Any = FigureCanvasAgg(Figure(dpi=DPI))
    return canvas.get_renderer()


def text_width(text: str) -> float:
    """Pixels that a text takes at `FONT_PT`."""
    return float(_ruler().get_text_width_height_descent(text, FontProperties(size=FONT_PT), ismath=False)[0])


def printable(text: str) -> str:
    """The text with line breaks and what no font can draw replaced one for one, so that character spans still hold."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)
