"""RSICD, aerial images with five captions each, as its publishers ship it.

`dataset_rsicd.json` has Karpathy's form and names the splits; the images, 224 pixels wide and high, lie in one folder.
There are no boxes. Some captions of an image are the same: where fewer than five were written, the publishers repeat
them.

Reasons for leaving out

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the images
  folder), `image_without_caption`, `image_twice`;
- a caption: `caption_empty`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lightning_xai.data.sample import Sample
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.data.sources.files import check_folder, read_image_file
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy
from lightning_xai.data.sources.left_out import kept_captions, key_from, usable_samples


def prepare_rsicd(
    images: Path, karpathy: Path, out: Path, split: str, samples_per_shard: int = 1000, overwrite: bool = False
) -> Manifest:
    """Convert a split of RSICD to shards.

    Args:
        images: folder with the image files (`RSICD_images`).
        karpathy: `dataset_rsicd.json`.
        out: folder to make for the shards.
        split: "train", "val", "test", or several joined by "+".
        samples_per_shard: size of all shards but the last.
        overwrite: replace shards that are already in `out`.

    Returns:
        The manifest; its `left_out` counts, by reason, what could not be used.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the file is broken or of another form, the split is unknown, or not one image could be used.
    """
    left_out: Counter[str] = Counter()
    return write_shards(
        read_rsicd(images, karpathy, split, left_out),
        out,
        name=f"rsicd/{split}",
        samples_per_shard=samples_per_shard,
        left_out=left_out,
        overwrite=overwrite,
    )


def read_rsicd(images: Path, karpathy: Path, split: str, left_out: Counter[str] | None = None) -> Iterator[Sample]:
    """Read the images of a split one after the other, in the order of the file.

    Args:
        images: folder with the image files (`RSICD_images`).
        karpathy: `dataset_rsicd.json`.
        split: "train", "val", "test", or several joined by "+".
        left_out: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the file is read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the file is broken or of another form, the split is unknown, or (at the end) no image could be used.
    """
    left_out = Counter() if left_out is None else left_out
    check_folder(images, "images", "the image files")
    return usable_samples(
        read_karpathy(karpathy, split),
        partial(_sample, images=images, split=split, left_out=left_out),
        left_out,
        what=f"image of {split!r} in {images}",
        advice=f"Check that the images belong to {karpathy}",
    )


def _sample(image: KarpathyImage, images: Path, split: str, left_out: Counter[str]) -> Sample:
    captions = kept_captions(image.captions, left_out)
    file = read_image_file(images, image.files)
    key = key_from(image.filename.removesuffix(".jpg"))
    return Sample(key, file.data, file.size, captions, source=f"rsicd/{split}/{file.name}")
