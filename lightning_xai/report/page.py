"""The page of a report: one file that needs no network and runs only its own few lines of script.

A page is a list of sections, a section a list of blocks; `page.html.j2` turns them into HTML. Text stays text, whatever
it holds.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report import explorer
from lightning_xai.report.explorer import ExplorerItem
from lightning_xai.report.figures import follows_reader, svg_text
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.plots import rasterize

_HALF, _WIDE = 700, 1200  # pixels across: charts up to which stand side by side, and from which they scroll


@dataclass(frozen=True)
class Note:
    """Text in an element of its own.

    Attributes:
        text: as it is.
        missing: whether it says what a report lacks, and why.
        tag: a paragraph ("p"), a heading within a section ("h3") or preformatted text, such as settings ("pre").
    """

    text: str
    missing: bool = False
    tag: Literal["p", "h3", "pre"] = "p"


@dataclass(frozen=True)
class Findings:
    """Short results side by side: a number or a name, and the sentence that it belongs to."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chart:
    """A figure of lines and bars.

    Attributes:
        name: of its files.
        title: above it.
        note: how to read it.
        alt: what a reader who does not see it should know.
        figure: the figure.
        number: in the page.
    """

    name: str
    title: str
    note: str
    alt: str
    figure: Figure
    number: int = 0

    @property
    def width(self) -> int:
        """Pixels across in the page."""
        return round(96 * self.figure.get_figwidth())

    @property
    def look(self) -> str:
        """Classes of the style sheet."""
        return "chart half" if self.width <= _HALF else "chart wide" if self.width > _WIDE else "chart"

    @cached_property
    def svg(self) -> str:
        """The figure as SVG."""
        return svg_text(self.figure)

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The figure as [H, W, 3]."""
        return rasterize(self.figure)

    @property
    def explorer(self) -> Markup | None:
        """What is shown in place of the figure, which is then folded below it; None: the figure."""
        return None

    @property
    def url(self) -> str:
        """The figure, in the colours of the reader's mode."""
        return _data_url("image/svg+xml", follows_reader(self.svg).encode())


@dataclass(frozen=True)
class HeatMaps(Chart):
    """A sheet of heat maps, shown as pixels, which are sharp on dense screens too.

    Attributes:
        items: what the sheet shows, for an explorer.
    """

    items: tuple[ExplorerItem, ...] = ()
    look = "sheet"

    @property
    def explorer(self) -> Markup | None:
        """The items in an explorer."""
        return explorer.component(self.items, "strip") if self.items else None

    @property
    def url(self) -> str:
        """The picture."""
        stream = io.BytesIO()
        Image.fromarray(self.pixels).save(stream, "WEBP", quality=88, method=4)
        return _data_url("image/webp", stream.getvalue())


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on demand."""

    summary: str
    blocks: tuple[Block, ...]


Block = Note | Findings | Chart | Folded | PaperTable


@dataclass(frozen=True)
class Section:
    """A part of the page, in its table of contents.

    Attributes:
        name: what links point to.
        title: its heading.
        blocks: what it holds.
    """

    name: str
    title: str
    blocks: Sequence[Block]


def flat(blocks: Sequence[Block]) -> Iterator[Block]:
    """Go through all blocks in reading order, those that are folded included."""
    for block in blocks:
        yield block
        if isinstance(block, Folded):
            yield from flat(block.blocks)


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """Return the whole page as HTML.

    >>> text = page("<b>", "", [Section("one", "One", (Note("1 < 2"),))], "")
    >>> "&lt;b&gt;" in text, "1 &lt; 2" in text, "<b>" in text
    (True, True, False)
    """
    base, style, script = (
        files("lightning_xai.report").joinpath(name).read_text("utf-8") for name in ("base.css", "page.css", "page.js")
    )
    environment = Environment(
        loader=PackageLoader("lightning_xai", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        footer=footer,
        style=Markup(base + style) + explorer.style(),  # noqa: S704
        script=Markup(script),  # noqa: S704
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        explorer=explorer,
        kind=lambda block: type(block).__name__,
    )


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
