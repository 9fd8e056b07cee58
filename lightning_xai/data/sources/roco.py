"""ROCO, radiology images with the captions of the articles that they come from, as its publishers ship it.

Each split has `radiology/captions.txt` with `id<TAB>caption` in each line, and `radiology/images/{id}.jpg`. The images
are fetched from the articles, so that some are missing. There are no boxes.

Reasons for exclusion

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
from lightning_xai.data.sources.files import captioned_sample, check_path, read_rows, usable_samples

_CAPTIONS = "radiology/captions.txt"
_IMAGES = "radiology/images"


def read_roco(*, folder: Path, split: str, excluded: Counter[str]) -> Iterator[Sample]:
    """ROCO: radiology images with one caption each, no boxes.

    Args:
        folder: folder of the splits; each holds radiology/captions.txt and radiology/images/.
        split: which of them: train, validation or test.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples, in the order of the captions.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: there is no such split, or (at the end) no image could be used.
    """
    check_path(folder, "folder", "folder", "the folder that holds ROCO's splits, with radiology/captions.txt in each")
    captions, images = folder / split / _CAPTIONS, folder / split / _IMAGES
    if not captions.is_file():
        there = sorted(path.parents[1].name for path in folder.glob(f"*/{_CAPTIONS}"))
        raise ValueError(f"folder: {folder} has no split {split!r} ({split}/{_CAPTIONS}); it has {there or 'none'}")
    check_path(images, "folder", "folder", "the folder that holds the images of this split")
    return usable_samples(
        (([f"{image}.jpg"], [caption]) for image, caption in read_rows(captions, excluded)),
        partial(captioned_sample, images=images, source=f"roco/{split}", excluded=excluded),
        excluded,
        what=f"row of {captions}",
        advice=f"Check that the images were fetched to {images}, each named by its id (ROCO_00001.jpg)",
    )
