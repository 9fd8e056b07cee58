"""RSICD, aerial images with five captions each, as its publishers ship it.

`dataset_rsicd.json` has Karpathy's form and names the splits; the images, 224 pixels wide and high, lie in one folder.
There are no boxes. Some captions of an image are the same: where fewer than five were written, the publishers repeat
them.

Reasons for exclusion

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
from lightning_xai.data.sources.files import captioned_sample, check_path, usable_samples
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy


def read_rsicd(*, images: Path, karpathy: Path, split: str, excluded: Counter[str]) -> Iterator[Sample]:
    """RSICD: aerial images with five captions each, no boxes.

    Args:
        images: folder of the image files (RSICD_images).
        karpathy: dataset_rsicd.json, which has the form of the Karpathy splits.
        split: train, val, test, or several joined by "+".
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation files are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the file is broken or of another form, the split is unknown, or (at the end) no image could be used.
    """
    check_path(images, "images", "folder", "the folder that holds the image files")
    return usable_samples(
        ((image.files, image.captions) for image in read_karpathy(karpathy, split, KarpathyImage)),
        partial(captioned_sample, images=images, source=f"rsicd/{split}", excluded=excluded),
        excluded,
        what=f"image of {split!r} in {images}",
        advice=f"Check that the images belong to {karpathy}",
    )
