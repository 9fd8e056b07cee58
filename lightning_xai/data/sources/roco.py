"""ROCO, radiology images with the captions of the articles that they come from, as its publishers ship it.

Each split has `radiology/captions.txt` with `id<TAB>caption` in each line, and `radiology/images/{id}.jpg`. The images
are fetched from the articles, so that some are missing. There are no boxes.

Reasons for leaving out

- a row: `row_malformed` (there is no tab), `row_not_utf8`;
- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (its id leaves the images
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
from lightning_xai.data.sources.left_out import kept_captions, key_from, usable_samples
from lightning_xai.data.sources.tab_separated import read_rows

_CAPTIONS = "radiology/captions.txt"
_IMAGES = "radiology/images"


def prepare_roco(
    folder: Path, out: Path, split: str, samples_per_shard: int = 1000, overwrite: bool = False
) -> Manifest:
    """Convert a split of ROCO to shards.

    Args:
        folder: folder with the splits (`train`, `validation`, `test`).
        out: folder to make for the shards.
        split: which of them.
        samples_per_shard: size of all shards but the last.
        overwrite: replace shards that are already in `out`.

    Returns:
        The manifest; its `left_out` counts, by reason, what could not be used.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there is no such split, or not one image could be used.
    """
    left_out: Counter[str] = Counter()
    return write_shards(
        read_roco(folder, split, left_out),
        out,
        name=f"roco/{split}",
        samples_per_shard=samples_per_shard,
        left_out=left_out,
        overwrite=overwrite,
    )


def read_roco(folder: Path, split: str, left_out: Counter[str] | None = None) -> Iterator[Sample]:
    """Read the images of a split one after the other, in the order of its captions.

    Args:
        folder: folder with the splits (`train`, `validation`, `test`).
        split: which of them.
        left_out: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there is no such split, or (at the end) no image could be used.
    """
    left_out = Counter() if left_out is None else left_out
    check_folder(folder, "folder", "ROCO's splits, with radiology/captions.txt in each")
    captions, images = folder / split / _CAPTIONS, folder / split / _IMAGES
    if not captions.is_file():
        there = sorted(path.parents[1].name for path in folder.glob(f"*/{_CAPTIONS}"))
        raise ValueError(f"folder: {folder} has no split {split!r} ({split}/{_CAPTIONS}); it has {there or 'none'}")
    check_folder(images, "folder", "the images of this split")
    return usable_samples(
        read_rows(captions, left_out),
        partial(_sample, images=images, split=split, left_out=left_out),
        left_out,
        what=f"row of {captions}",
        advice=f"Check that the images were fetched to {images}, each named by its id (ROCO_00001.jpg)",
    )


def _sample(row: tuple[str, str], images: Path, split: str, left_out: Counter[str]) -> Sample:
    image, caption = row
    captions = kept_captions([caption], left_out)
    file = read_image_file(images, [f"{image}.jpg"])
    return Sample(key_from(image), file.data, file.size, captions, source=f"roco/{split}/{file.name}")
