"""Conceptual Captions, whose publishers ship captions and addresses of images: what was fetched beforehand is read.

The images lie in a folder and a file lists `caption<TAB>path`, without header and quotes, as the publishers' TSV files
do with addresses in place of paths; or img2dataset fetched them (see `img2dataset`, also for its reasons for leaving
out). Nothing is downloaded here. Rows that cannot be used are normal in this data set: they are counted by reason.

Reasons for leaving out

- a row: `row_malformed` (it has not two fields), `row_not_utf8`;
- an image: `image_not_fetched` (the row has an address, no path), `image_missing`, `image_unreadable`,
  `image_does_not_decode`, `image_name_unsafe` (it leaves the images folder), `image_without_caption`, `image_twice`;
- a caption: `caption_empty`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from lightning_xai.data.sample import Sample
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.data.sources.files import check_file, check_folder, read_image_file
from lightning_xai.data.sources.img2dataset import read_img2dataset
from lightning_xai.data.sources.left_out import ExcludedError, kept_captions, key_from, usable_samples
from lightning_xai.data.sources.tab_separated import read_rows

_NAME = "conceptual-captions"
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def prepare_conceptual_captions(
    out: Path,
    split: str,
    captions: Path | None = None,
    images: Path | None = None,
    shards: Path | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> Manifest:
    """Convert fetched images with their captions to shards; from `captions` and `images`, or from `shards`.

    Args:
        out: folder to make for the shards.
        split: the split's name.
        captions: TSV file of captions and paths.
        images: folder that the paths start from.
        shards: folder of tar files that img2dataset wrote.
        samples_per_shard: size of all shards but the last.
        overwrite: replace shards that are already in `out`.

    Returns:
        The manifest; its `left_out` counts, by reason, what could not be used.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: neither or both ways were given, or not one image could be used.
    """
    left_out: Counter[str] = Counter()
    if shards is not None and captions is None and images is None:
        samples = read_img2dataset(shards, f"{_NAME}/{split}", left_out)
    elif shards is None and captions is not None and images is not None:
        samples = read_conceptual_captions(captions, images, split, left_out)
    else:
        raise ValueError(
            "give captions (a TSV file) with images (their folder), or shards (img2dataset's folder) alone"
        )
    return write_shards(
        samples,
        out,
        name=f"{_NAME}/{split}",
        samples_per_shard=samples_per_shard,
        left_out=left_out,
        overwrite=overwrite,
    )


def read_conceptual_captions(
    captions: Path, images: Path, split: str, left_out: Counter[str] | None = None
) -> Iterator[Sample]:
    """Read the images of a TSV file one after the other, in its order.

    Args:
        captions: the TSV file, UTF-8: a caption and a path below `images` in each line.
        images: folder that the paths start from.
        split: the split's name, used in `Sample.source`.
        left_out: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: (at the end) no image could be used.
    """
    left_out = Counter() if left_out is None else left_out
    check_file(captions, "captions", "the TSV file of captions and paths")
    check_folder(images, "images", "the images that were fetched")
    return usable_samples(
        read_rows(captions, left_out),
        partial(_sample, images=images, split=split, left_out=left_out),
        left_out,
        what=f"row of {captions}",
        advice="Fetch the images first; each row needs its caption, a tab and the path of its image below the images "
        "folder. For img2dataset's tar files give shards instead",
    )


def _sample(row: tuple[str, str], images: Path, split: str, left_out: Counter[str]) -> Sample:
    caption, path = row
    if "\t" in path:
        raise ExcludedError("row_malformed")
    if _ADDRESS.match(path):
        raise ExcludedError("image_not_fetched")
    captions = kept_captions([caption], left_out)
    file = read_image_file(images, [str(PurePosixPath(path))])
    key = key_from(file.name.removesuffix(".jpg"))
    return Sample(key, file.data, file.size, captions, source=f"{_NAME}/{split}/{file.name}")
