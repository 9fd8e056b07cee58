"""Explorers as HTML: one file that needs no network and runs only its own script. Text stays text, whatever it holds.

Interactions travel as 16-bit integers with one step size for each reading, so that a value is off by at most half a
step: the largest magnitude / 65,534.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report.explorer.items import ExplorerCaption, ExplorerItem, ExplorerReading, Frame
from lightning_xai.report.plots import COLOURS, scaled

Mode = Literal["single", "strip", "time"]
"""One item; a strip of thumbnails with a filter; or a slider over the items of a group, and a strip of the groups."""

_STEPS = 32767
_SMALL_PHOTO = 128 * 128  # pixels up to which a photo is kept as it is
_FEW = 8  # items that are shown with all their pixels
_LONGEST_OF_MANY = 512


def explorer_page(items: Sequence[ExplorerItem], *, title: str, mode: Mode | None = None) -> str:
    """Return a page with an explorer of some items, as HTML.

    Args:
        items: what to show.
        title: of the page; plain text.
        mode: `"single"` shows one item, `"strip"` (the default for several) has thumbnails and a filter, `"time"` a
            slider over the items of each group.

    Raises:
        ValueError: there is no item, or the mode `"single"` with several.
    """
    template = _environment().get_template("page.html.j2")
    text = template.render(title=title, explorer=component(items, mode), style=style(), script=script())
    # Captions may hold halves of characters, which JSON allows and UTF-8 does not.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def explorer_frame(
    items: Sequence[ExplorerItem], *, title: str = "Explorer", mode: Mode | None = None, height: int = 720
) -> str:
    """Return a page with an explorer as an `<iframe>`, for notebooks: its styles and script are apart from theirs.

    Args:
        items: what to show.
        title: of the page; plain text.
        mode: as of `explorer_page`.
        height: pixels; the frame is as wide as what it stands in.

    Raises:
        ValueError: as `explorer_page`.
    """
    return str(
        Markup(
            '<iframe title="{}" sandbox="allow-scripts" style="width:100%;height:{}px;border:0" srcdoc="{}"></iframe>'
        ).format(title, height, explorer_page(items, title=title, mode=mode))
    )


def component(items: Sequence[ExplorerItem], mode: Mode | None = None) -> Markup:
    """Return an explorer as a part of a page, which has to hold `style` and `script` once.

    Args:
        items: what to show.
        mode: as of `explorer_page`.

    Raises:
        ValueError: as `explorer_page`.
    """
    mode = mode or ("single" if len(items) == 1 else "strip")
    if not items or (mode == "single" and len(items) > 1):
        raise ValueError(f"an explorer in the mode {mode!r} cannot show {len(items)} items; give one, or another mode")
    longest = math.inf if len(items) <= _FEW else _LONGEST_OF_MANY
    # A photo is encoded once, however many items show it.
    encoded = {
        id(photo): _photo_url(photo, longest) for photo in {id(item.photo): item.photo for item in items}.values()
    }
    urls = [encoded[id(item.photo)] for item in items]
    last = {item.series: place for place, item in enumerate(items)}
    with_stills = sorted(last.values()) if mode == "time" else range(len(items))
    # Photos stand in the stills already; only others are given again.
    photos = list(dict.fromkeys([urls[place] for place in with_stills] + urls))
    stills = [
        _still(items[place], urls[place]) | {"place": place, "photo": photos.index(urls[place])}
        for place in with_stills
    ]
    further = photos[len({still["url"] for still in stills}) :]
    data = {
        "mode": mode,
        "colours": _base64(_colours()),
        "photos": further,
        "items": [_item(item, photos.index(url)) for item, url in zip(items, urls, strict=True)],
    }
    template = _environment().get_template("component.html.j2")
    return Markup(template.render(data=data, stills=stills, mode=mode))  # noqa: S704 - the template escapes


@cache
def style() -> Markup:
    """The style sheet of explorers."""
    return Markup(_own("explorer.css"))  # noqa: S704


@cache
def script() -> Markup:
    """The script of explorers, an ES module."""
    return Markup(_own("explorer.js"))  # noqa: S704


@cache
def script_digest() -> str:
    """The script's SHA-256 as a content security policy takes it."""
    return base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lightning_xai.report", "explorer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["digest"] = script_digest
    return environment


def _own(name: str) -> str:
    return files("lightning_xai.report.explorer").joinpath(name).read_text("utf-8")


def _item(item: ExplorerItem, photo: int) -> dict[str, Any]:
    height, width = item.photo.shape[:2]
    return {
        "key": item.key,
        "label": item.label,
        "series": item.series,
        "photo": photo,
        "size": [width, height],
        "frame": _share(item.frame or (0, 0, width, height), width, height),
        "box": None if item.box is None else _share(item.box, width, height),
        "asksBox": item.asks_box,
        "captions": [_caption(caption) for caption in item.captions],
    }


def _caption(caption: ExplorerCaption) -> dict[str, Any]:
    return {
        "text": caption.text,
        "tokens": [{"text": each.text, "joined": each.joined, "marked": each.marked} for each in caption.tokens],
        "readings": [_reading(reading) for reading in caption.readings],
    }


def _reading(reading: ExplorerReading) -> dict[str, Any]:
    pairs, step = None, None
    if reading.tokens_by_patches is not None:
        steps, step = quantised(reading.tokens_by_patches)
        pairs = _base64(steps)
    return {
        "method": reading.method,
        "where": reading.where,
        "note": reading.note,
        "scale": reading.scale,
        "similarity": _finite(reading.similarity),
        "error": _finite(reading.completeness_error),
        "grid": list(reading.image.shape),
        "image": _base64(np.asarray(reading.image, dtype="<f4")),
        "text": None if reading.text is None else _base64(np.asarray(reading.text, dtype="<f4")),
        "pairs": pairs,
        "step": _finite(step),
    }


def quantised(values: NDArray[np.floating]) -> tuple[NDArray[np.int16], float]:
    """Values as 16-bit integers, and the step that they are multiplied by; NaN where a value is not finite.

    >>> quantised(np.array([-2.0, 0.0, 1.0]))[0].tolist()
    [-32767, 0, 16384]
    """
    largest = float(np.abs(values).max(initial=0))
    if not math.isfinite(largest):
        return np.zeros(values.shape, dtype="<i2"), math.nan
    step = largest / _STEPS or 1.0
    return np.rint(np.asarray(values, dtype=np.float64) / step).astype("<i2"), step


def _still(item: ExplorerItem, url: str) -> dict[str, Any]:
    """What a reader without a script sees: the photo with the first map, and the words in colours."""
    caption = item.captions[0]
    reading = caption.readings[0]
    height, width = item.photo.shape[:2]
    x0, y0, x1, y1 = (100 * edge for edge in _share(item.frame or (0, 0, width, height), width, height))
    inside = [min(max(edge, 0.0), 100.0) for edge in (x0, y0, x1, y1)]
    strengths = np.zeros(len(caption.tokens)) if reading.text is None else scaled(reading.text, reading.scale)
    colours = (255 * COLOURS(strengths / 2 + 0.5)).round().tolist()
    return {
        "url": url,
        "key": item.key,
        "name": item.series,
        "size": (width, height),
        "heat": _png_url((255 * COLOURS(scaled(reading.map_of(caption.phrase), reading.scale) / 2 + 0.5)).round()),
        "position": _position(x0, y0, x1, y1),
        "seen": _position(*inside),
        "caption": caption.text,
        "method": reading.method,
        "words": [
            (token, f"rgb({red:.0f} {green:.0f} {blue:.0f} / {alpha / 255:.3f})")
            for token, (red, green, blue, alpha) in zip(caption.tokens, colours, strict=True)
        ],
    }


def _position(x0: float, y0: float, x1: float, y1: float) -> str:
    """A place, in percent of the photo, as CSS."""
    return f"left:{x0:.4f}%;top:{y0:.4f}%;width:{x1 - x0:.4f}%;height:{y1 - y0:.4f}%"


def _share(edges: Frame, width: int, height: int) -> list[float]:
    """Edges in pixels as shares of a photo's width and height."""
    return [edge / (width, height)[place % 2] for place, edge in enumerate(edges)]


def _photo_url(photo: NDArray[np.uint8], longest: float) -> str:
    image = Image.fromarray(photo)
    if image.width * image.height <= _SMALL_PHOTO:
        return _png_url(photo)
    if max(image.size) > longest:
        image.thumbnail((int(longest), int(longest)), Image.Resampling.BILINEAR, reducing_gap=2.0)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)  # WebP takes ten times as long for a third less
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _png_url(pixels: NDArray[Any]) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


@cache
def _colours() -> NDArray[np.uint8]:
    """The colours of strengths from -1 to 1, [N, 4]."""
    return np.asarray(COLOURS(np.arange(COLOURS.N), bytes=True), dtype=np.uint8)


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _finite(number: float | None) -> float | None:
    """A number as JSON takes it."""
    return None if number is None or not math.isfinite(number) else float(number)
