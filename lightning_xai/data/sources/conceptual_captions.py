"""Conceptual Captions, whose publishers ship captions and addresses of images: what was fetched beforehand is read.

The images lie in a folder and a file lists `caption<TAB>path`, without header and quotes, as the publishers' TSV files
do with addresses in place of paths; or img2dataset fetched them (see `img2dataset`, also for its reasons for leaving
out). Nothing is downloaded here. Rows that cannot be used are normal in this data set: they are counted by reason.

Reasons for exclusion

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
from lightning_xai.data.sources.files import captioned_sample, check_path, read_rows, usable_samples

_NAME = "conceptual-captions"
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def read_conceptual_captions(
    *,
    split: str,
    captions: Path | None = None,
    images: Path | None = None,
    shards: Path | None = None,
    excluded: Counter[str],
) -> Iterator[Sample]:
    """Conceptual Captions after its images were fetched: one caption an image, no boxes; nothing is downloaded.

    Args:
        split: name of the split: train or val.
        captions: TSV file without header, each line a caption, a tab and the path of the image below --images (which
            has to be given, too). Lines with an address in place of the path were not fetched: they are counted.
        images: folder that the paths in --captions start from.
        shards: instead of both, the folder that `img2dataset --output_format webdataset` wrote: tar files with .jpg,
            .txt and .json members.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: neither or both ways were given, or (at the end) no image could be used.
    """
    if shards is not None and captions is None and images is None:
        from lightning_xai.data.sources.img2dataset import read_img2dataset  # loads torch by way of webdataset

        return read_img2dataset(shards, f"{_NAME}/{split}", excluded)
    if shards is not None or captions is None or images is None:
        raise ValueError(
            "give captions (a TSV file) with images (their folder), or shards (img2dataset's folder) alone"
        )
    check_path(captions, "captions", "file", "the path of the TSV file of captions and paths")
    check_path(images, "images", "folder", "the folder that holds the images that were fetched")
    return usable_samples(
        _fetched(captions, excluded),
        partial(captioned_sample, images=images, source=f"{_NAME}/{split}", excluded=excluded),
        excluded,
        what=f"row of {captions}",
        advice="Fetch the images first; each row needs its caption, a tab and the path of its image below the images "
        "folder. For img2dataset's tar files give shards instead",
    )


def _fetched(path: Path, excluded: Counter[str]) -> Iterator[tuple[list[str], list[str]]]:
    """The path and the caption of each row that has them."""
    for caption, image in read_rows(path, excluded):
        if "\t" in image:
            excluded["row_malformed"] += 1
        elif _ADDRESS.match(image):
            excluded["image_not_fetched"] += 1
        else:
            yield [str(PurePosixPath(image))], [caption]
