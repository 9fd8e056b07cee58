"""Options of a model that its files may not know: how its images are made, and its activation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["PIXEL_OPTIONS", "ModelOptions"]

# What decides an image's pixels, but for their number: open_clip's name -> our option.
PIXEL_OPTIONS = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
}

_FITS = {"crop": "shortest", "letterbox": "letterbox"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Settings that you know better than the files: each replaces what was found, None leaves it.

    Attributes:
        image_size: (height, width) in pixels, or one number for both; positions are interpolated to it.
        image_mean: mean of each channel, of pixel values in [0, 1].
        image_std: standard deviation of each channel, likewise.
        interpolation: of resizing: bicubic, bilinear or random.
        resize_mode: shortest (crop what sticks out), longest (pad), letterbox (pad with the mean colour) or squash
            (give the aspect ratio up).
        fit: the same in plain words: crop (shortest) or letterbox.
        quick_gelu: whether the transformers compute with OpenAI's QuickGELU.

    Raises:
        ValueError: not three channels, a size that is not positive, or a fit that is none or contradicts resize_mode.
    """

    image_size: int | tuple[int, int] | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    resize_mode: str | None = None
    fit: str | None = None
    quick_gelu: bool | None = None

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            given = getattr(self, name)
            if given is not None and len(given) != 3:
                raise ValueError(f"{name} needs a number for each of red, green and blue; got {given}")
            if given is not None and not all(map(math.isfinite, given)):
                raise ValueError(f"{name} has to hold finite numbers; got {given}")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"image_std has to be positive; got {self.image_std}")
        size = self.size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"image_size is one number or height and width, at least 1 each; got {self.image_size}")
        if self.fit is not None and self.fit not in _FITS:
            raise ValueError(f"fit is {' or '.join(_FITS)}; got {self.fit!r}")
        if self.fit is not None and self.resize_mode not in (None, _FITS[self.fit]):
            raise ValueError(
                f"fit={self.fit} means resize_mode={_FITS[self.fit]}; got {self.resize_mode}: give one of them"
            )

    @property
    def size(self) -> tuple[int, ...] | None:
        """(height, width), if given."""
        size = self.image_size
        return size if size is None else (size, size) if isinstance(size, int) else tuple(size)

    @property
    def mode(self) -> str | None:
        """How images are resized, if given: as resize_mode, or as fit."""
        return self.resize_mode if self.fit is None else _FITS[self.fit]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is given of open_clip's preprocessing configuration."""
        given = {name: getattr(self, option) for name, option in PIXEL_OPTIONS.items()}
        given["resize_mode"] = self.mode
        return {name: list(x) if isinstance(x, tuple) else x for name, x in given.items() if x is not None}
