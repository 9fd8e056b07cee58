"""Where a model's input lies on the photo it was made from, and maps written on the photo again.

Plain numbers and numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PhotoGeometry", "on_photo"]

LONGEST = 1024
"""Pixels of the longer side, at most, of maps on the photo and of the photo in pictures."""
_LEAST_SEEN = 0.8


@dataclass(frozen=True)
class PhotoGeometry:
    """How the pixels of a photo become those of the image tower's input: resized, then cropped or padded.

    The point (x, y) of the photo is the point `x * scale[0] + offset[0]`, `y * scale[1] + offset[1]` of the input.

    Attributes:
        photo: (width, height) of the photo in pixels.
        size: (width, height) of the input in pixels.
        scale: across and down, pixels of the input for a pixel of the photo.
        offset: (x, y) of the photo's upper left corner in the input; negative where a crop cuts, positive if padded.

    Example:
        >>> cropped = PhotoGeometry((400, 200), (100, 100), (0.5, 0.5), (-50.0, 0.0))
        >>> cropped.seen_xyxy, cropped.seen
        ((100.0, 0.0, 300.0, 200.0), 0.5)
    """

    photo: tuple[int, int]
    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    @property
    def frame_xyxy(self) -> tuple[float, float, float, float]:
        """The input's frame on the photo, in the photo's pixels; padding lies outside of the photo."""
        (x0, x1), (y0, y1) = (
            (-offset / scale, (size - offset) / scale)
            for size, scale, offset in zip(self.size, self.scale, self.offset, strict=True)
        )
        return x0 + 0.0, y0 + 0.0, x1, y1  # no -0.0

    @property
    def seen_xyxy(self) -> tuple[float, float, float, float]:
        """The part of the photo that the model sees, in the photo's pixels."""
        x0, y0, x1, y1 = self.frame_xyxy
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(self.photo[0])), min(y1, float(self.photo[1]))

    @property
    def seen(self) -> float:
        """The share, in (0, 1], of the photo that the model sees."""
        x0, y0, x1, y1 = self.seen_xyxy
        return min((x1 - x0) * (y1 - y0) / (self.photo[0] * self.photo[1]), 1.0)

    @property
    def is_cropped(self) -> bool:
        """Whether more than a fifth of the photo is hidden from the model, which is then said."""
        return self.seen < _LEAST_SEEN

    def padding(self, grid: tuple[int, int]) -> NDArray[np.float64]:
        """The share of each patch of a grid (rows, columns) that is padding, no photo: [H, W] in [0, 1]."""
        covered = []
        for axis, count in ((1, grid[0]), (0, grid[1])):
            edges = np.linspace(0, self.size[axis], count + 1)
            start = self.offset[axis]
            inside = np.clip(edges, max(start, 0.0), start + self.photo[axis] * self.scale[axis])
            covered.append(np.diff(inside) / np.diff(edges))
        return np.asarray(np.clip(1 - np.outer(*covered), 0, 1), dtype=np.float64)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> PhotoGeometry:
        """The geometry that `record` has written."""
        pairs = (record[name] for name in ("photo_width_height", "input_width_height", "scale_x_y", "offset_x_y"))
        return cls(*((first, second) for first, second in pairs))

    def record(self) -> dict[str, Any]:
        """Every number, by its name, as JSON takes it."""
        return {
            "photo_width_height": list(self.photo),
            "input_width_height": list(self.size),
            "scale_x_y": list(self.scale),
            "offset_x_y": list(self.offset),
            "seen_x0_y0_x1_y1": list(self.seen_xyxy),
            "seen": self.seen,
        }


def on_photo(heat: NDArray[Any], geometry: PhotoGeometry, longest: int = LONGEST) -> NDArray[np.float16]:
    """A map of patches on the pixels of the photo: bilinear between the patches' centres, NaN where a crop has cut.

    Args:
        heat: [..., H, W] at patch resolution, over the whole input.
        geometry: of the photo.
        longest: pixels of the longer side; a larger photo is reduced to it.

    Returns:
        [..., height, width] float16: pixel (row, column) is the photo's, reduced by its longer side over `longest`.

    Example:
        >>> cropped = PhotoGeometry((4, 2), (2, 2), (1.0, 1.0), (-1.0, 0.0))
        >>> on_photo(np.array([[1.0, 2.0], [3.0, 4.0]]), cropped).tolist()
        [[nan, 1.0, 2.0, nan], [nan, 3.0, 4.0, nan]]
    """
    reduced = max(1.0, max(geometry.photo) / longest)
    down, across = (_weights(geometry, axis, heat.shape[-1 - axis], reduced) for axis in (1, 0))
    return np.asarray(down @ np.asarray(heat, dtype=np.float64) @ across.T, dtype=np.float16)


def _weights(geometry: PhotoGeometry, axis: int, count: int, reduced: float) -> NDArray[np.float64]:
    """[pixels of the photo, patches] along an axis (0 across, 1 down): rows of sum 1, of NaN where nothing is seen."""
    pixels = max(1, round(geometry.photo[axis] / reduced))
    photo = (np.arange(pixels) + 0.5) * geometry.photo[axis] / pixels
    point = (photo * geometry.scale[axis] + geometry.offset[axis]) / geometry.size[axis]
    place = np.clip(point * count - 0.5, 0, count - 1)
    weights: NDArray[np.float64] = np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(count)))
    weights[(point < 0) | (point > 1)] = np.nan
    return weights
