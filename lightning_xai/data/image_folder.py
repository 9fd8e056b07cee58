"""Images in a folder for each class, as in torchvision's `ImageFolder`, in batches for any number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_xai.data.sample import RecordError, read_image

__all__ = ["ClassBatches", "ClassImages", "ImageFolder"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ClassImages(NamedTuple):
    """A batch of images of known classes.

    Attributes:
        images: [B, 3, H, W] float32, as the model takes them; B may be 0.
        classes: [B] int64, numbers of `ImageFolder.classes`.
        skipped: why images that belong to the batch are not in it, a sentence each.
    """

    images: Tensor
    classes: Tensor
    skipped: list[str]


@dataclass(frozen=True)
class ImageFolder:
    """A folder whose subfolders are classes and hold images (JPEG, PNG, WebP), at any depth.

    Attributes:
        folder: the path.
        classes: names of the subfolders, sorted.
        images: path and class number of each image, sorted by class and path; as torchvision's `ImageFolder.imgs`.
    """

    folder: Path
    classes: tuple[str, ...]
    images: tuple[tuple[Path, int], ...]

    @classmethod
    def of(cls, folder: Path) -> ImageFolder:
        """List a folder, and look whether its images can be read.

        Raises:
            ValueError: there is no such folder, it has fewer than two classes, a class without images, or no class
                whose first image can be read.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder; give one with a subfolder of images for each class")
        classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
        if len(classes) < 2:
            raise ValueError(
                f"{folder}: expected a subfolder of images for each of at least two classes; found {len(classes)}"
            )
        each = [sorted(_images_in(folder / name)) for name in classes]
        empty = [name for name, found in zip(classes, each, strict=True) if not found]
        if empty:
            raise ValueError(
                f"{folder}: {len(empty)} of {len(classes)} classes have no image ({', '.join(_SUFFIXES)}), such as "
                f"{empty[0]}: add images, or remove their folders"
            )
        _check_readable(folder, [found[0] for found in each])
        return cls(folder, classes, tuple((path, number) for number, found in enumerate(each) for path in found))


class ClassBatches(Dataset[ClassImages]):
    """The batches of one of several processes.

    Batches hold the same consecutive images whatever the number of processes, which take them in turn: what is computed
    batch by batch is then the same, bit for bit, on any number of them. The last processes may have one batch fewer.

    Args:
        folder: the images.
        transform: an upright RGB image -> [3, H, W].
        size: (H, W) of what it returns.
        batch_size: images in a batch, at least 1.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: Callable[[Image.Image], Tensor],
        size: tuple[int, int],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._images, self._transform, self._size = folder.images, transform, size
        self._starts = range(rank * batch_size, len(folder.images), world_size * batch_size)
        self._batch_size = batch_size

    def __len__(self) -> int:
        """Number of this process's batches."""
        return len(self._starts)

    def __getitem__(self, number: int) -> ClassImages:
        """Read a batch; images that do not decode are left out, and named."""
        start = self._starts[number]
        images, classes, skipped = [], [], []
        for path, label in self._images[start : start + self._batch_size]:
            try:
                images.append(self._transform(read_image(path.read_bytes(), str(path))))
                classes.append(label)
            except (OSError, RecordError) as error:  # noqa: PERF203 - one image out of many must not end an evaluation
                skipped.append(str(error))
        stacked = torch.stack(images) if images else torch.zeros(0, 3, *self._size)
        return ClassImages(stacked, torch.tensor(classes, dtype=torch.int64), skipped)


def _images_in(folder: Path) -> Iterator[Path]:
    # Through links as well: large data sets are often put together from them.
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names if name.lower().endswith(_SUFFIXES))


def _check_readable(folder: Path, paths: list[Path]) -> None:
    """Raise a ValueError unless one of the images can be read."""
    reason: Exception | None = None
    for path in paths:
        try:
            read_image(path.read_bytes(), str(path))
            return
        except (OSError, RecordError) as error:  # noqa: PERF203 - mostly the first one can be read
            reason = reason or error
    raise ValueError(
        f"{folder}: none of the classes' first images can be read ({reason}); replace the files"
    ) from reason
