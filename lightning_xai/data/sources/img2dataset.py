"""The output of img2dataset: a folder of tar files whose records are an image, its caption and how it was fetched.

`img2dataset --output_format webdataset` writes `00000.tar`, `00001.tar`, ... with `000000000.jpg` (or .png, .webp),
`000000000.txt` and `000000000.json` for each image. The `.parquet` and `_stats.json` files next to them, which list
what could not be fetched as well, are not needed.

Reasons for exclusion

- a tar file from the place on where it cannot be read: `shard_damaged`;
- an image: `image_not_fetched` (its .json says so), `image_missing`, `image_does_not_decode`, `image_without_caption`,
  `image_twice`, `record_malformed` (a member comes twice, there are several images, or the .json is no JSON object);
- a caption: `caption_empty`, `caption_not_utf8`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lightning_xai.data.excluded import ExcludedError, excluded_as
from lightning_xai.data.sample import IMAGE_MEMBERS, Sample
from lightning_xai.data.shard_reader import TarRecord, TarRecords
from lightning_xai.data.shard_store import open_file
from lightning_xai.data.sources.files import check_path, decode_image_file, kept_captions, key_from, usable_samples

_MEMBERS = (*IMAGE_MEMBERS, "txt", "json")
_FETCHED = "success"

_log = logging.getLogger(__name__)


class _About(msgspec.Struct):
    status: Any = _FETCHED
    caption: Any = None


def read_img2dataset(shards: Path, name: str, excluded: Counter[str]) -> Iterator[Sample]:
    """Read the images of all tar files of a folder one after the other, in the order of the files' names.

    The caption is the .txt member, or what the .json calls `caption` where there is none. Keys hold the tar file's
    name: img2dataset's first versions counted from 0 in each.

    Args:
        shards: folder with the tar files.
        name: data set and split, used in `Sample.source` ("conceptual-captions/train").
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no tar file, or (at the end) no image could be used.
    """
    check_path(shards, "shards", "folder", "the folder that holds the tar files that img2dataset wrote")
    files = sorted(shards.glob("*.tar"))
    if not files:
        raise ValueError(
            f"shards: {shards} holds no .tar file; give the folder that img2dataset wrote with "
            "--output_format webdataset"
        )
    return usable_samples(
        _records(files, excluded),
        partial(_sample, name=name, excluded=excluded),
        excluded,
        what=f"image in the tar files of {shards}",
        advice="Check that img2dataset wrote them with --output_format webdataset and the column of the captions",
    )


def _records(files: Iterable[Path], excluded: Counter[str]) -> Iterator[tuple[str, TarRecord]]:
    """Every record with the name of its tar file."""
    for file in files:
        records = TarRecords(partial(open_file, file), _MEMBERS)
        for record in records:
            yield file.stem, record
        if records.error:
            excluded["shard_damaged"] += 1
            _log.warning("%s: only %d records could be read (%s); fetch it again", file, records.seen, records.error)


def _sample(entry: tuple[str, TarRecord], name: str, excluded: Counter[str]) -> Sample:
    shard, record = entry
    images = [record.members[extension] for extension in IMAGE_MEMBERS if extension in record.members]
    if record.fault or len(images) > 1:
        raise ExcludedError("record_malformed")
    with excluded_as("record_malformed", (ValueError, RecursionError)):
        about = msgspec.convert(json.loads(record.members.get("json", b"{}")), _About)
    if about.status != _FETCHED:
        raise ExcludedError("image_not_fetched")
    caption = about.caption
    if "txt" in record.members:
        with excluded_as("caption_not_utf8"):
            caption = record.members["txt"].decode()
    captions = kept_captions([caption], excluded)
    if not images:
        raise ExcludedError("image_missing")
    key = key_from(f"{shard}-{record.key}")
    return decode_image_file(key, images[0]).sample(key, name, captions)
