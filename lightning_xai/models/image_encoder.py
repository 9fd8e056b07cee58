"""Encoders of image files: how pixels and boxes become the image tower's input, and a picture again."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lightning_xai.data.sample import read_image, upright
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.photo import PhotoGeometry

__all__ = ["ImageEncoder"]


class ImageEncoder(TwoTowerEncoder):
    """Two towers of images and texts.

    Attributes:
        image_transform: pixels and boxes -> what the image tower takes.
    """

    image_transform: ImageTransform

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, height, width) of the images that the transform makes."""
        return (3, *self.image_transform.size)

    def black_image(self) -> Tensor:
        """Black pixels, normalised: [3, height, width]."""
        black = -torch.tensor(self.image_transform.mean) / torch.tensor(self.image_transform.std)
        return black[:, None, None].expand(self.image_shape)

    def read(self, source: Path | Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """An image or a JPEG, PNG or WebP file, upright, transformed: [3, height, width]; and its (width, height)."""
        image = read_image(source.read_bytes(), str(source)) if isinstance(source, Path) else upright(source, "image")
        return self.image_transform(image), image.size

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes of an image file, resized and cropped as its pixels are."""
        return self.image_transform.boxes(boxes, size)

    def geometry(self, size: tuple[int, int]) -> PhotoGeometry | None:
        """Where the input lies on an image of (width, height) pixels."""
        return self.image_transform.geometry(size)

    def pictures(self, images: Tensor) -> Tensor:
        """The images' pixels, no longer normalised."""
        return self.image_transform.denormalize(images)
