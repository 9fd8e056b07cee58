"""Boxes as annotation files give them, made boxes of the upright image."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.sample import Box


@dataclass(frozen=True)
class BoxTransform:
    """Makes boxes of annotation files boxes of the upright image: checked, turned with it, and clipped to it.

    Attributes:
        size: `(width, height)` of the upright image.
        orientation: EXIF orientation of 5 to 8, by which boxes of the stored pixels are turned; others stay.
    """

    size: tuple[int, int]
    orientation: int = 1

    def __call__(self, values: object) -> Box:
        """The box `(x, y, width, height)` on the upright image, from whatever an annotation file holds.

        Raises:
            ExcludedError: `box_malformed`, `box_without_area` or `box_outside_image`.
        """
        return _clip(self._turn(parse_box(values)), self.size)

    def counted(self, values: object, excluded: Counter[str]) -> Box | None:
        """The box; or None, with the reason counted: what was annotated is an instance all the same."""
        box = None
        with counting(excluded):
            box = self(values)
        return box

    def _turn(self, box: Box) -> Box:
        if self.orientation < 5:
            return box
        x, y, width, height = box
        # The stored image is as wide as the upright one is high.
        right, below = self.size[1] - x - width, self.size[0] - y - height
        left = y if self.orientation in (5, 8) else below
        top = x if self.orientation in (5, 6) else right
        return left, top, height, width


def parse_box(values: object) -> Box:
    """Four finite numbers `(x, y, width, height)` with an area, from whatever an annotation file holds.

    >>> parse_box([1, "2", 3.5, 4])
    (1.0, 2.0, 3.5, 4.0)

    Raises:
        ExcludedError: `box_malformed` or `box_without_area`.
    """
    if isinstance(values, str):  # "1234" are no four numbers
        raise ExcludedError("box_malformed")
    with excluded_as("box_malformed", (TypeError, ValueError, OverflowError)):
        x, y, width, height = (float(value) for value in values)  # type: ignore[attr-defined]
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ExcludedError("box_malformed")
    if width <= 0 or height <= 0:
        raise ExcludedError("box_without_area")
    return x, y, width, height


def _clip(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box inside an image of `size` (width, height).

    >>> _clip((-2.0, 3.0, 5.0, 4.0), (10, 5))
    (0.0, 3.0, 3.0, 2.0)
    """
    x, y, width, height = box
    # A side that lies inside is kept as it is: left + width - left is not always width.
    left, top = max(x, 0.0), max(y, 0.0)
    width = width if x >= 0 and x + width <= size[0] else min(x + width, float(size[0])) - left
    height = height if y >= 0 and y + height <= size[1] else min(y + height, float(size[1])) - top
    if width <= 0 or height <= 0:
        raise ExcludedError("box_outside_image")
    return left, top, width, height
