"""Boxes as annotation files give them, made boxes of the upright image: checked, turned with it, and clipped to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_xai.data.excluded import ExcludedError
from lightning_xai.data.sample import Box


@dataclass(frozen=True)
class BoxTransform:
    """Turns boxes of the stored pixels (`stored` wide and high) by an EXIF orientation of 5 to 8; others stay."""

    orientation: int
    stored: tuple[int, int]

    def __call__(self, box: Box) -> Box:
        """The box `(x, y, width, height)` on the upright image."""
        x, y, width, height = box
        right, below = self.stored[0] - x - width, self.stored[1] - y - height
        if self.orientation == 5:
            return y, x, height, width
        if self.orientation == 6:
            return below, x, height, width
        if self.orientation == 7:
            return below, right, height, width
        if self.orientation == 8:
            return y, right, height, width
        return box


def parse_box(values: object) -> Box:
    """Four finite numbers `(x, y, width, height)` with an area, from whatever an annotation file holds.

    >>> parse_box([1, "2", 3.5, 4])
    (1.0, 2.0, 3.5, 4.0)

    Raises:
        ExcludedError: `box_malformed` or `box_without_area`.
    """
    if isinstance(values, str):  # "1234" are no four numbers
        raise ExcludedError("box_malformed")
    try:
        x, y, width, height = (float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError) as error:
        raise ExcludedError("box_malformed") from error
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ExcludedError("box_malformed")
    if width <= 0 or height <= 0:
        raise ExcludedError("box_without_area")
    return x, y, width, height


def clip_box(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box inside an image of `size` (width, height).

    >>> clip_box((-2.0, 3.0, 5.0, 4.0), (10, 5))
    (0.0, 3.0, 3.0, 2.0)

    Raises:
        ExcludedError: there is none (`box_outside_image`).
    """
    x, y, width, height = box
    # A side that lies inside is kept as it is: left + width - left is not always width.
    left, top = max(x, 0.0), max(y, 0.0)
    width = width if x >= 0 and x + width <= size[0] else min(x + width, float(size[0])) - left
    height = height if y >= 0 and y + height <= size[1] else min(y + height, float(size[1])) - top
    if width <= 0 or height <= 0:
        raise ExcludedError("box_outside_image")
    return left, top, width, height
