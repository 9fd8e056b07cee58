"""The page of a report: one file that needs no network and runs nothing but its own few lines of script.

A page is a list of sections, a section a list of blocks. Whatever text a block holds, it stays text.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from itertools import groupby

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report.charts import follows_reader, svg_text
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.plots import rasterize
from lightning_xai.report.table_formats import to_html

__all__ = ["Block", "Chart", "Code", "Findings", "Folded", "Heading", "Note", "Section", "Sheet", "flat", "page"]


_HALF = 700  # pixels across, up to which two charts stand side by side where there is room
_WIDE = 1200  # from which a chart keeps its size, and scrolls


@dataclass(frozen=True)
class Note:
    """A paragraph; `missing` says that something is not there, and why."""

    text: str
    missing: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Findings:
    """Short results side by side: a number or a name, and the sentence that it belongs to."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    """Text as it is, such as settings."""

    text: str


@dataclass(frozen=True)
class Chart:
    """A figure of lines and bars.

    Attributes:
        name: of its files.
        title: what it shows.
        note: how to read it.
        alt: what a reader who does not see it should know.
        figure: the figure.
    """

    name: str
    title: str
    note: str
    alt: str
    figure: Figure

    @property
    def width(self) -> int:
        """Pixels across in the page."""
        return round(96 * self.figure.get_figwidth())

    @cached_property
    def svg(self) -> str:
        """The figure as SVG."""
        return svg_text(self.figure)


@dataclass(frozen=True)
class Sheet:
    """A picture of heat maps; as for `Chart`, but the picture may be pixels [H, W, 3]."""

    name: str
    title: str
    note: str
    alt: str
    picture: Figure | NDArray[np.uint8]

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """[H, W, 3]."""
        return rasterize(self.picture) if isinstance(self.picture, Figure) else self.picture


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on demand."""

    summary: str
    blocks: tuple[Block, ...]


Block = Note | Heading | Findings | Code | Chart | Sheet | Folded | PaperTable


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
    blocks: tuple[Block, ...]


def flat(blocks: Sequence[Block]) -> Iterator[Block]:
    """All blocks in reading order, also those that are folded."""
    for block in blocks:
        yield block
        if isinstance(block, Folded):
            yield from flat(block.blocks)


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page as HTML.

    Tables and figures are numbered in reading order.

    >>> text = page("<b>", "", [Section("one", "One", (Note("1 < 2"),))], "")
    >>> "&lt;b&gt;" in text, "1 &lt; 2" in text, "<b>" in text
    (True, True, False)
    """
    style, script = (
        files("lightning_xai.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    policy += "; form-action 'none'"
    writer = _Writer()
    contents = "".join(f'<li><a href="#{escape(s.name)}">{escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(
        f'<section id="{escape(section.name)}" aria-labelledby="heading-{escape(section.name)}">\n'
        f'<h2 id="heading-{escape(section.name)}">{escape(section.title)}</h2>\n'
        f"{writer.blocks(section.blocks)}\n</section>"
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<div class="page">
<header>
<h1>{escape(title)}</h1>
<p>{escape(subtitle)}</p>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
</header>
<main id="main" tabindex="-1">
{body}
</main>
<footer>{escape(footer)}</footer>
</div>
<script>{script}</script>
</body>
</html>
"""


class _Writer:
    """Writes blocks, and counts tables and figures."""

    def __init__(self) -> None:
        self._tables = self._figures = 0

    def blocks(self, blocks: Sequence[Block]) -> str:
        parts = []
        for narrow, group in groupby(blocks, key=lambda block: isinstance(block, Chart) and block.width <= _HALF):
            text = "\n".join(map(self._block, group))
            parts.append(f'<div class="charts">\n{text}\n</div>' if narrow else text)
        return "\n".join(parts)

    def _block(self, block: Block) -> str:
        if isinstance(block, Note):
            return f"<p{' class=missing' if block.missing else ''}>{escape(block.text)}</p>"
        if isinstance(block, Heading):
            return f"<h3>{escape(block.text)}</h3>"
        if isinstance(block, Code):
            return f'<pre tabindex="0">{escape(block.text)}</pre>'
        if isinstance(block, Findings):
            items = (f"<li><b>{escape(big)}</b>{escape(text)}</li>" for big, text in block.items)
            return f'<ul class="findings">{"".join(items)}</ul>'
        if isinstance(block, Folded):
            return f"<details>\n<summary>{escape(block.summary)}</summary>\n{self.blocks(block.blocks)}\n</details>"
        if isinstance(block, PaperTable):
            self._tables += 1
            return to_html(block, self._tables)
        return self._figure(block)

    def _figure(self, block: Chart | Sheet) -> str:
        self._figures += 1
        name, kind = escape(block.name), "chart" if isinstance(block, Chart) else "sheet"
        if isinstance(block, Chart):
            source = _data_url("image/svg+xml", follows_reader(block.svg).encode())
            width = block.width
        else:
            pixels = block.pixels
            source, width = _data_url("image/webp", _webp(pixels)), round(pixels.shape[1] * 0.75)
        caption = f"<b>Figure {self._figures}.</b> {escape(block.title)}. <span class=note>{escape(block.note)}</span>"
        image = f'<img src="{source}" alt="{escape(block.alt)}" style="--width:{width}px">'
        image = f'<div class="scroll" role="region" aria-labelledby="caption-figure-{name}" tabindex="0">{image}</div>'
        wide = " wide" if kind == "chart" and width > _WIDE else ""
        caption = f'<figcaption id="caption-figure-{name}">{caption}</figcaption>'
        return f'<figure class="{kind}{wide}" id="figure-{name}">{caption}{image}</figure>'


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _webp(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=88, method=4)
    return stream.getvalue()
