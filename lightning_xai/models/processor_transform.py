"""Hugging Face's image processors that resize, crop and normalise, and the same geometry for boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_xai.models.image_transform import ImageTransform

__all__ = ["ProcessorTransform"]

_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as processors keep them."""
_KNOWN_SIZES: tuple[frozenset[str], ...] = (frozenset({"shortest_edge"}), frozenset({"height", "width"}))


@dataclass(frozen=True)
class ProcessorTransform(ImageTransform):
    """Resize and crop an image as an image processor of transformers does with Pillow, and carry boxes along.

    Pixels are the processor's own. Its Torchvision backend rounds differently where it resizes: single pixels differ by
    a few grey values of 255.

    Attributes:
        resize_to: `(height, width)`, which gives the aspect ratio up, or the shorter edge's length, which keeps it.
            What sticks out of `size` is cropped, as much on either side; half a pixel goes to the right and bottom.

    Raises:
        ValueError: an option that is none, or an image that would be smaller than the crop.

    Example:
        >>> import torch
        >>> transform = ProcessorTransform(size=(100, 100), resize_to=100)
        >>> transform.boxes(torch.tensor([[150.0, 50.0, 100.0, 100.0]]), (400, 200)).tolist()  # halved, 50 px cropped
        [[25.0, 25.0, 75.0, 75.0]]
    """

    resize_to: tuple[int, int] | int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = (self.resize_to,) * 2 if isinstance(self.resize_to, int) else self.resize_to
        if height < self.size[0] or width < self.size[1]:
            raise ValueError(
                f"the image processor crops {self.size} pixels (height, width) from images resized to "
                f"{self.resize_to}, which are smaller: set its size to at least its crop_size"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ProcessorTransform:
        """The transform of an image processor, from what its `to_dict` gives.

        Raises:
            ValueError: the processor does what this transform cannot express; the message says what.
        """
        kind = settings.get("image_processor_type", "the image processor")
        if kind.startswith("Siglip2"):
            side = int(settings["max_num_patches"] ** 0.5) * int(settings["patch_size"])
            sizes: tuple[tuple[int, int], tuple[int, int] | int] = ((side, side), (side, side))
        else:
            sizes = _sizes(settings, kind)
        resample = int(settings.get("resample", -1))
        if resample not in _RESAMPLING:
            raise ValueError(
                f"{kind} resizes with resample {resample}; only 2 (bilinear) and 3 (bicubic) are supported: change it "
                "in the folder's preprocessor_config.json if the model was trained so"
            )
        mean, std = _normalisation(settings)
        (height, width), resize_to = sizes
        # Two settings of this project alone: images of another size than the folder's, and the whole of each.
        if "input_size" in settings:
            before, (height, width) = max(height, width), settings["input_size"]
            resize_to = (
                round(resize_to * max(height, width) / before) if isinstance(resize_to, int) else (height, width)
            )
        return cls(
            size=(height, width),
            mean=mean,
            std=std,
            interpolation=_RESAMPLING[resample],
            resize_mode="letterbox" if settings.get("letterbox") else "shortest",
            resize_to=(height, width) if settings.get("letterbox") else resize_to,
        )

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after resizing and before cropping, in transformers' integer arithmetic."""
        if self.resize_mode == "letterbox":
            return super()._resized(size)
        if not isinstance(self.resize_to, int):
            return self.resize_to[1], self.resize_to[0]
        longer = int(self.resize_to * max(size) / min(size))
        return (self.resize_to, longer) if size[0] <= size[1] else (longer, self.resize_to)

    def _kernel(self) -> str:
        return self.interpolation

    @staticmethod
    def _offset(resized: int, target: int) -> int:
        """Pixels that cropping moves the image to the left or up, as a negative number."""
        return -((resized - target) // 2)


def _sizes(settings: Mapping[str, Any], kind: str) -> tuple[tuple[int, int], tuple[int, int] | int]:
    """(height, width) of the transformed image, and what it is resized to before the crop."""
    given = {name: int(value) for name, value in (settings.get("size") or {}).items() if value is not None}
    if not settings.get("do_resize", True) or given.keys() not in _KNOWN_SIZES or settings.get("do_pad"):
        raise ValueError(
            f"{kind} does not resize images to one size ({'do_resize' if given else 'size'}: "
            f"{given or settings.get('size')}); supported are a size of shortest_edge with a center crop, and a size "
            "of height and width: set one of them in the folder's preprocessor_config.json"
        )
    resize_to = given.get("shortest_edge") or (given["height"], given["width"])
    if settings.get("do_center_crop"):
        crop = settings["crop_size"]
        return (int(crop["height"]), int(crop["width"])), resize_to
    if isinstance(resize_to, int):
        raise ValueError(
            f"{kind} resizes the shorter edge to {resize_to} and crops nothing, so that images differ in size: set "
            "do_center_crop and crop_size in the folder's preprocessor_config.json"
        )
    return resize_to, resize_to


def _normalisation(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel values in [0, 1] that say all that is done to the values."""
    factor = 255 * (float(settings["rescale_factor"]) if settings.get("do_rescale", True) else 1.0)
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    own_mean, own_std = (_three(settings.get(name, default)) for name, default in (("image_mean", 0), ("image_std", 1)))
    mean, std = (own_mean, own_std) if settings.get("do_normalize", True) else ((0.0,) * 3, (1.0,) * 3)
    # EfficientNet's processor divides by the deviation once more, where it is meant for its classifier.
    again = own_std if settings.get("include_top") else (1.0,) * 3
    return (
        tuple((offset + m) / factor for m in mean),
        tuple(s * more / factor for s, more in zip(std, again, strict=True)),
    )


def _three(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values) if isinstance(values, (list, tuple)) else (float(values),) * 3
