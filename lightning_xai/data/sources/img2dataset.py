"""The output of img2dataset: a folder of tar files whose records are an image, its caption and how it was fetched.

`img2dataset --output_format webdataset` writes `00000.tar`, `00001.tar`, ... with `000000000.jpg` (or .png, .webp),
`000000000.txt` and `000000000.json` for each image. The `.parquet` files next to them are not needed; a `_stats.json`
says how many records its tar file should hold. Names end at their first dot, as webdataset has it.

Images that img2dataset has written again have lost their EXIF block, but not been turned: an orientation that only the
.json holds (`exif`, "Image Orientation") is put into the file, whose pixels stay as they are.

Reasons for exclusion

- every record that a damaged tar file, or one that is not there, has lost: `shard_damaged` (at least one for each;
  how many is known where the headers of those after the damage can be read, or a `_stats.json` says);
- a tar file that is compressed, or lies in a sub-folder without a manifest: `shard_not_read`;
- a record whose members have no extension that is known, or a hidden file: `member_unknown`;
- an image: `image_not_fetched` (its .json says so), `image_missing`, `image_does_not_decode`, `image_without_caption`,
  `image_twice`, `record_malformed` (a member comes twice, there are several images, or the .json is no JSON object);
- a caption: `caption_empty`, `caption_not_utf8`.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from PIL import ExifTags, Image

from lightning_xai.data.excluded import ExcludedError, excluded_as
from lightning_xai.data.sample import IMAGE_MEMBERS, Sample
from lightning_xai.data.shard_reader import TarRecord, TarRecords
from lightning_xai.data.shard_store import open_file
from lightning_xai.data.shards import MANIFEST_NAME
from lightning_xai.data.sources.files import check_path, decode_image_file, kept_captions, key_from, usable_samples

_MEMBERS = (*IMAGE_MEMBERS, "txt", "json")
_FETCHED = "success"
_ORIENTATIONS = {  # as exifread, which img2dataset uses, calls them
    "mirrored horizontal": 2,
    "rotated 180": 3,
    "mirrored vertical": 4,
    "mirrored horizontal then rotated 90 ccw": 5,
    "rotated 90 cw": 6,
    "mirrored horizontal then rotated 90 cw": 7,
    "rotated 90 ccw": 8,
}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")

_log = logging.getLogger(__name__)


class _Stats(msgspec.Struct):
    successes: int


class _About(msgspec.Struct):
    status: Any = _FETCHED
    caption: Any = ""
    exif: Any = None


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
    others = sorted(path for path in shards.rglob("*.t*") if path not in files and _is_unread(path, shards))
    if not files:
        there = f", but {others[0]}: unpack compressed files, and give sub-folders by themselves" if others else ""
        raise ValueError(
            f"shards: {shards} holds no .tar file{there}; give the folder that img2dataset wrote with "
            "--output_format webdataset"
        )
    for path in others:
        excluded["shard_not_read"] += 1
        _log.warning("%s: not read; unpack compressed files, and give sub-folders by themselves", path)
    stated = {path: _stated(path) for path in shards.glob("*_stats.json")}
    absent = {shards / f"{path.name.removesuffix('_stats.json')}.tar": size for path, size in stated.items() if size}
    files = sorted({*files, *absent})
    return usable_samples(
        _records(files, excluded),
        partial(_sample, name=name, excluded=excluded),
        excluded,
        what=f"image in the tar files of {shards}",
        advice="Check that img2dataset wrote them with --output_format webdataset and the column of the captions",
    )


def _is_unread(path: Path, folder: Path) -> bool:
    """Whether a file looks like a shard that is not read; shards that were prepared, with a manifest, are none."""
    if path.name.endswith(_COMPRESSED):
        return path.parent == folder
    return path.suffix == ".tar" and path.parent != folder and not (path.parent / MANIFEST_NAME).exists()


def _stated(path: Path) -> int:
    """The number of records that a `_stats.json` states; 0 where it cannot be read."""
    try:
        return max(0, msgspec.convert(json.loads(path.read_bytes()), _Stats).successes)
    except (OSError, ValueError, RecursionError):
        return 0


def _records(files: Iterable[Path], excluded: Counter[str]) -> Iterator[tuple[str, TarRecord]]:
    """Every record with the name of its tar file."""
    for file in files:
        records = TarRecords(partial(open_file, file), _MEMBERS)
        read: set[str] = set()
        lost: set[str] = set()
        usual = frozenset(_MEMBERS)
        for record in records:
            if records.error and not (record.members.keys() >= usual or (not read and _is_pair(record))):
                lost.add(record.key)  # some of its members lie after the damage
                break
            usual = frozenset(record.members)
            read.add(record.key)
            yield file.stem, record
        excluded["member_unknown"] += records.unknown
        if records.unknown:
            _log.warning("%s: records read: %d%s", file, len(read), records.unknown_text)
        missing = _stated(file.with_name(f"{file.stem}_stats.json")) - len(read)
        if records.error:
            missing = max(missing, len((lost | records.keys_behind()) - read), 1)
        if missing > 0:
            excluded["shard_damaged"] += missing
            reason = records.error or "it ends early"
            message = "%s: only %d records could be read, at least %d are lost (%s); fetch it again"
            _log.warning(message, file, len(read), missing, reason)


def _is_pair(record: TarRecord) -> bool:
    return bool(record.members.keys() & {"txt", "json"} and record.members.keys() & set(IMAGE_MEMBERS))


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
            text = record.members["txt"].decode()
        # As Python and pandas write that there is none.
        caption = None if not isinstance(about.caption, str) and text.strip() in ("None", "nan") else text
    captions = kept_captions([caption], excluded)
    if not images:
        raise ExcludedError("image_missing")
    key = key_from(f"{shard}-{record.key}")
    return decode_image_file(key, _turned(images[0], _orientation(about.exif))).sample(key, name, captions)


def _orientation(exif: Any) -> int:
    """The EXIF orientation, 1 to 8, that a .json states; 1, upright, where it states none that exists."""
    try:
        stated = (json.loads(exif) if isinstance(exif, str) else exif)["Image Orientation"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return 1
    text = str(stated).strip().lower()
    return int(text) if text in "12345678" and len(text) == 1 else _ORIENTATIONS.get(text, 1)


def _turned(data: bytes, orientation: int) -> bytes:
    """An image file that says how it lies, where it does not say so itself; the pixels are those of `data`."""
    if orientation == 1:
        return data
    with suppress(OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):  # it will not decode
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
            exif = Image.Exif()
            with suppress(Exception):  # a broken block makes Pillow raise errors of any type
                exif = opened.getexif()
            if ExifTags.Base.Orientation in exif:
                return data
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            if opened.format in ("PNG", "WEBP"):
                file = io.BytesIO()
                opened.save(file, opened.format, exif=exif, lossless=True, exact=True)
                return file.getvalue()
        block = exif.tobytes()
        return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    return data
