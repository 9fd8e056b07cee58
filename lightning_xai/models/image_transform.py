"""The evaluation transform of open_clip for pixels, and the very same geometry for boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import Self

from lightning_xai.data.masks import Mask, decode_mask
from lightning_xai.data.sample import RecordError
from lightning_xai.photo import PhotoGeometry

__all__ = ["ImageTransform"]

RESIZE_MODES = ("shortest", "longest", "letterbox", "squash")
INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZERS = ("pillow", "torch")


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop or pad, and normalise an image as open_clip does in evaluation, and carry boxes along.

    Attributes:
        size: `(height, width)` of the transformed image in pixels.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
        interpolation: `"bicubic"`, `"bilinear"`, or `"random"` (which open_clip evaluates as bicubic).
        resize_mode: `"shortest"` (the image covers the target, what sticks out is cropped), `"longest"` (the image fits
            into the target, the rest is filled), `"letterbox"` (likewise, filled with the mean colour, which is zero
            after normalisation; open_clip lacks it) or `"squash"` (the aspect ratio is given up).
        fill_color: value 0 to 255, or one for each channel, of what `"longest"` fills.
        resizer: `"pillow"`, as open_clip, or `"torch"`, which takes a third of the time: of a photo's values about one
            in 300 differs by one grey level of 255, very few by two.

    Raises:
        ValueError: an option that open_clip does not have.

    Example:
        >>> transform = ImageTransform(size=(100, 100))
        >>> transform.boxes(torch.tensor([[150.0, 50.0, 100.0, 100.0]]), (400, 200)).tolist()  # halved, 50 px cropped
        [[25.0, 25.0, 75.0, 75.0]]
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int | tuple[int, ...] = 0
    resizer: str = "pillow"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size has to be (height, width) in pixels, at least 1 each; got {self.size}")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode has to be one of {RESIZE_MODES}; got {self.resize_mode!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation has to be one of {INTERPOLATIONS}; got {self.interpolation!r}")
        if self.resizer not in RESIZERS:
            raise ValueError(f"resizer has to be one of {RESIZERS}; got {self.resizer!r}")

    @classmethod
    def from_open_clip(cls, model: Any) -> ImageTransform:
        """The transform that an open_clip model was built with, from its `visual.preprocess_cfg`.

        Raises:
            ValueError: the model carries no preprocessing configuration (it was not made by open_clip's factory).
        """
        config = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
        if config is None:
            raise ValueError(
                f"{type(model).__name__} has no visual.preprocess_cfg; build the model with open_clip.create_model"
            )
        config = PreprocessCfg(**config)
        height, width = config.input_size[1:]
        return cls(
            size=(int(height), int(width)),
            mean=_three(config.mean),
            std=_three(config.std),
            interpolation=config.interpolation,
            resize_mode=config.resize_mode,
            fill_color=tuple(config.fill_color) if isinstance(config.fill_color, list) else config.fill_color,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an RGB image to `[3, height, width]`, normalised float32: exactly open_clip's evaluation pixels.

        A letterbox has those of `"longest"` where the photo is, and zeros around it.

        Raises:
            RecordError: the image is so thin that nothing of it is left after resizing.
        """
        width, height = self._resized(image.size)
        if min(width, height) < 1:
            raise RecordError(
                f"an image of {image.size} pixels is too thin to be resized to {self.size}; drop the record"
            )
        resized, left, top = self._seen(image, width, height)
        pixels = self._normalize(resized)
        if pixels.shape[1:] == self.size:
            return pixels
        filled = self._filling().repeat(1, *self.size)
        filled[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        return filled

    def with_resizer(self, resizer: str) -> Self:
        """The same transform with another `resizer`."""
        return replace(self, resizer=resizer)

    def _seen(self, image: Image.Image, width: int, height: int) -> tuple[Tensor, int, int]:
        """The part of the resized image that the target shows, [3, h, w] uint8, and where its corner (x, y) lies."""
        left, top = self._offset(width, self.size[1]), self._offset(height, self.size[0])
        x0, y0 = max(-left, 0), max(-top, 0)
        x1, y1 = min(x0 + self.size[1], width), min(y0 + self.size[0], height)
        kernel = self._kernel()
        if self.resizer == "torch":
            resized = interpolate(_planes(image)[None], size=(height, width), mode=kernel, antialias=True)[0]
            seen = resized[:, y0:y1, x0:x1]
        else:
            resampling = Image.Resampling.BILINEAR if kernel == "bilinear" else Image.Resampling.BICUBIC
            seen = _planes(image.resize((width, height), resampling).crop((x0, y0, x1, y1)))
        return seen, max(left, 0), max(top, 0)

    def _kernel(self) -> str:
        """What an image is resized with, `"bicubic"` or `"bilinear"`."""
        # open_clip forgets the interpolation where it covers a target that is not square.
        forgotten = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        return "bilinear" if self.interpolation == "bilinear" and not forgotten else "bicubic"

    def _normalize(self, pixels: Tensor) -> Tensor:
        """[3, h, w] of grey levels 0 to 255 as float32, in torchvision's order of operations."""
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return scaled.sub_(mean).div_(std)

    def _filling(self) -> Tensor:
        """[3, 1, 1] float32, of what lies around the photo: normalised."""
        if self.resize_mode == "letterbox":
            return torch.zeros(3, 1, 1)
        return self._normalize(torch.tensor(self.fill_color).expand(3)[:, None, None])

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Transform boxes as the pixels.

        Args:
            boxes: `[N, 4]` as `(x, y, width, height)` in pixels of the original image.
            size: `(width, height)` of the original image in pixels.

        Returns:
            `[N, 4]` float32 as `(x0, y0, x1, y1)` in pixels of the transformed image, clipped to the visible part of
            the original and to the transformed image; of area 0 where nothing is left.
        """
        geometry = self.geometry(size)
        parts = (geometry.scale, geometry.offset, geometry.photo, geometry.size)
        scale, offset, original, target = torch.tensor([[*pair] * 2 for pair in parts], dtype=torch.float64)
        corners = boxes.reshape(-1, 4).to(torch.float64, copy=True)
        corners[:, 2:] += corners[:, :2]
        corners = torch.minimum(corners.clamp_(min=0), original) * scale + offset
        return torch.minimum(corners.clamp_(min=0), target).float()

    def mask(self, mask: Mask) -> Tensor:
        """Transform a mask as the pixels: each pixel of the result takes the one of the original under its centre.

        Args:
            mask: of the original image.

        Returns:
            `[height, width]` bool of the transformed image; False where it shows nothing of the original.

        Raises:
            MaskError: it does not decode.
        """
        pixels = torch.from_numpy(decode_mask(mask))
        for axis, resized in enumerate(reversed(self._resized(mask.size[::-1]))):
            target, original = self.size[axis], mask.size[axis]
            # In whole numbers: a centre that falls between two pixels takes the one to the right or below.
            twice = 2 * (torch.arange(target) - self._offset(resized, target)) + 1
            inside = (twice > 0) & (twice < 2 * resized)
            seen = pixels.index_select(axis, (twice * original // (2 * resized)).clamp(0, original - 1))
            pixels = seen & (inside[:, None] if axis == 0 else inside)
        return pixels

    def geometry(self, size: tuple[int, int]) -> PhotoGeometry:
        """Where the transformed image lies on an image of (width, height) pixels."""
        resized, target = self._resized(size), (self.size[1], self.size[0])
        return PhotoGeometry(
            photo=(size[0], size[1]),
            size=target,
            scale=(resized[0] / size[0], resized[1] / size[1]),
            offset=(float(self._offset(resized[0], target[0])), float(self._offset(resized[1], target[1]))),
        )

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo the normalisation of `[..., 3, H, W]`: pixel values in [0, 1]."""
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
        return (images * std + mean).clamp(0, 1)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after resizing and before cropping, in torchvision's and open_clip's integer arithmetic."""
        width, height = size
        target_height, target_width = self.size
        if self.resize_mode == "squash":
            return target_width, target_height
        if self.resize_mode == "shortest" and target_height == target_width:
            # torchvision's Resize(int) truncates the longer edge; ResizeKeepRatio below rounds it.
            longer = int(target_height * max(size) / min(size))
            return (target_width, longer) if width <= height else (longer, target_height)
        ratios = (height / target_height, width / target_width)
        if self.resize_mode == "letterbox":
            # However thin: open_clip's own rounding leaves nothing of some images.
            return tuple(max(1, round(side / max(ratios))) for side in size)  # type: ignore[return-value]
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(width / ratio), round(height / ratio)

    @staticmethod
    def _offset(resized: int, target: int) -> int:
        """Pixels that centre cropping (negative) or padding (positive) moves the image right or down."""
        if resized < target:
            return (target - resized) // 2
        return -round((resized - target) / 2.0)


def _planes(image: Image.Image) -> Tensor:
    """The grey levels [3, h, w] uint8 of an image, channels last in memory."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _three(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values) if isinstance(values, list | tuple) else (float(values),) * 3


def open_clip_preprocessing(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocessing configuration as open_clip knows it: a letterbox is its `longest`, filled with the mean's greys.

    These are whole numbers of 255, so that padding is not exactly zero after normalisation.
    """
    if preprocess_cfg.get("resize_mode") != "letterbox":
        return dict(preprocess_cfg)
    mean = preprocess_cfg.get("mean", OPENAI_DATASET_MEAN)
    return {**preprocess_cfg, "resize_mode": "longest", "fill_color": [round(255 * value) for value in mean]}
