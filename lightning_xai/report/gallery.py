"""Heat maps of an evaluation's examples: methods or runs side by side, the worst, and those of some classes.

Each selection is a sheet, for its file, and items of an explorer, for the page.

Pictures are read once each. Examples that cannot be drawn are counted, never shown as something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report.explanation import Token
from lightning_xai.report.explorer import ExplorerCaption, ExplorerItem, ExplorerReading
from lightning_xai.report.plots import Example, GradedMap, Scale, graded_picture, heat_fault, progress_sheet, scaled
from lightning_xai.results.examples import ExampleRecord
from lightning_xai.results.runs import Run

_LARGEST_PICTURE = 4096 * 4096  # pixels; examples are what a model sees
_LARGEST_MAP = 512

Key = tuple[str, str, str, str]


class _Drawable(NamedTuple):
    example: Example
    graded: GradedMap
    record: ExampleRecord
    heat: NDArray[np.floating]
    scale: Scale


class SideBySide(NamedTuple):
    """Examples with their heat maps by several methods, or of several runs.

    Attributes:
        figure: a row for each example, a column for each method or run.
        items: the same examples, with a reading for each method or run.
    """

    figure: Figure
    items: tuple[ExplorerItem, ...]


class Gallery:
    """The examples of all runs.

    Args:
        runs: of the report.

    Attributes:
        faults: example that could not be drawn -> why.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.faults: dict[str, str] = {}
        self._images: dict[Path, NDArray[np.float32]] = {}
        self._drawable = {
            (run.name, label): {
                _key(record): drawable for record in records if (drawable := self._draw(run, label, record)) is not None
            }
            for run in runs
            for label, records in run.examples.items()
        }

    def side_by_side(
        self,
        columns: Mapping[str, tuple[str, str]],
        why: str,
        title: str,
        *,
        labels: Collection[str] | None = None,
        most: int = 6,
    ) -> SideBySide | None:
        """One row for each example that all columns have, one column for each method or run.

        Args:
            columns: heading -> run and label.
            why: the reason to show an example, as the records have it; failures start with the lowest gamma.
            title: stands above.
            labels: classes of the examples; None: all.
            most: at most so many examples, the first ones.

        Returns:
            The sheet and its rows; None where the columns share no example.
        """
        found = [self._drawable.get(where, {}) for where in columns.values()]
        shared = [found[0][key] for key in found[0] if all(key in other for other in found)] if found else []
        rows = [each for each in shared if why in each.record.why and (labels is None or each.record.label in labels)]
        if why == "failure":
            rows.sort(key=lambda each: -1.0 if each.record.gamma is None else each.record.gamma)
        if not rows:
            return None
        rows = rows[:most]
        maps = [[other[_key(each.record)].graded for each in rows] for other in found]
        examples = [each.example for each in rows]
        sheet = progress_sheet(examples, maps, list(columns), title, columns=len(columns) + 1, side=176)
        shown = [{name: other[_key(each.record)] for name, other in zip(columns, found, strict=True)} for each in rows]
        return SideBySide(sheet, tuple(map(_item, shown)))

    def pictures(self) -> dict[tuple[str, str, str, str], NDArray[np.uint8]]:
        """Each example of one run: label of the method, key, caption, phrase -> its heat map on it, [H, W, 3]."""
        return {
            (label, each.record.key, each.record.caption, each.record.phrase): graded_picture(each.example, each.graded)
            for (_, label), found in self._drawable.items()
            for each in found.values()
        }

    def _draw(self, run: Run, label: str, record: ExampleRecord) -> _Drawable | None:
        try:
            image = self._image(run.folder / record.image)
            heat = _checked_heat(record)
            signed = run.record.methods[label].signed
            drawn = heat
            if not signed and heat_fault(heat) is None:
                drawn = scaled(heat, "range")  # a map that is nowhere zero would be red all over
            box = record.box
            if not all(map(math.isfinite, box)):
                raise ValueError(f"the box {box} is not finite")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self.faults[f"{run.folder}, {label}, {record.key}, {record.phrase!r}"] = str(error)
            return None
        length = len(record.caption)
        spans = tuple((max(start, 0), min(end, length)) for start, end in record.spans if start < min(end, length))
        example = Example(image, record.phrase, record.caption, spans, box, record.key)
        gamma = math.nan if record.gamma is None else record.gamma
        graded = GradedMap(drawn, gamma, record.hit)
        return _Drawable(example, graded, record, heat, "signed" if signed else "range")

    def _image(self, path: Path) -> NDArray[np.float32]:
        if path not in self._images:
            with Image.open(path) as picture:
                if picture.width * picture.height > _LARGEST_PICTURE:
                    raise ValueError(f"the picture has {picture.width} x {picture.height} pixels, which is too many")
                self._images[path] = np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255)
        return self._images[path]


def _item(columns: Mapping[str, _Drawable]) -> ExplorerItem:
    """An example as the explorer shows it, with a reading for each column."""
    first = next(iter(columns.values()))
    example, record = first.example, first.record
    tokens = [
        Token(word.group(), marked=any(start < word.end() and word.start() < end for start, end in example.spans))
        for word in re.finditer(r"\S+", example.caption)
    ]
    readings = [
        ExplorerReading(name, "", None, each.heat, None, None, scale=each.scale, note=each.graded.words)
        for name, each in columns.items()
    ]
    photo = (255 * np.clip(example.image, 0, 1)).round().astype(np.uint8)
    caption = ExplorerCaption(example.caption, tokens, readings)
    return ExplorerItem(record.key, photo, [caption], box=example.box, label=record.label)


def _key(record: ExampleRecord) -> Key:
    return record.key, record.caption, record.phrase, record.label


def _checked_heat(record: ExampleRecord) -> NDArray[np.floating]:
    widths = {len(row) for row in record.heat}
    if len(widths) != 1 or not 0 < max(widths) <= _LARGEST_MAP or len(record.heat) > _LARGEST_MAP:
        raise ValueError(
            f"expected a map [h, w] of at most {_LARGEST_MAP} x {_LARGEST_MAP}, got rows of {sorted(widths)}"
        )
    return np.array(record.heat, dtype=np.float64)
