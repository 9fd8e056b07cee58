"""The files of a data set as they lie on a user's disk, and the samples of those entries in them that can be used.

Names of image files come from annotation files, which may come from anywhere: a name that leaves the images folder is
never opened.

A function that finds something unusable raises `ExcludedError(reason)`; the caller that can go on without it (without
the region, the caption or the whole image) counts it. Reasons are words joined by `_` that begin with what is excluded,
and each source's module text lists its reasons.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec
from PIL import Image

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.sample import HardNegative, RecordError, Region, Sample, exif_orientation, read_image
from lightning_xai.data.sources.boxes import BoxTransform

Entry = TypeVar("Entry")
T = TypeVar("T")

_UNSAFE_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_KEY = 200
_HASH_DIGITS = 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ImageFile:
    """An image file that decodes.

    Attributes:
        name: its name below the images folder.
        data: its bytes.
        size: `(width, height)` of the upright image.
        orientation: EXIF orientation, 1 to 8.
    """

    name: str
    data: bytes
    size: tuple[int, int]
    orientation: int

    def from_annotated(self, size: tuple[int, int]) -> BoxTransform:
        """The transform of boxes that were drawn on an image of `size` (width, height) into boxes of the upright image.

        The annotated size shows which image was annotated where EXIF orientation swaps the sides (5 to 8): boxes drawn
        on the stored pixels are turned with them. Orientations 2 to 4 (and square images) keep the size; there the
        boxes are taken as drawn on the upright image.

        Raises:
            ExcludedError: it is another image (`size_mismatch`).
        """
        if size == self.size:
            return BoxTransform(self.size)
        if self.orientation >= 5 and size == self.size[::-1]:
            return BoxTransform(self.size, self.orientation)
        raise ExcludedError("size_mismatch")

    def sample(
        self,
        name: str,
        source: str,
        captions: Iterable[str],
        regions: Iterable[Region] = (),
        negatives: Iterable[HardNegative] = (),
    ) -> Sample:
        """The sample of this file, with a key made from `name`, of the data set (and split) `source`."""
        key, source = key_from(name), f"{source}/{self.name}"
        return Sample(key, self.data, self.size, tuple(captions), tuple(regions), source, tuple(negatives))


def read_image_file(folder: Path, names: Iterable[str]) -> ImageFile:
    """The first file of `names` below `folder` that is there; the whole image is decoded to be sure that it can.

    Args:
        folder: where the images lie.
        names: possible names with `/` between folders, as an annotation file gives them.

    Raises:
        ExcludedError: `image_missing`, `image_name_unsafe` (no file is there, and a name would leave the folder),
            `image_unreadable`, `image_does_not_decode`.
    """
    reason = "image_missing"
    for name in names:
        file = folder / name
        if not is_safe_name(name):
            reason = "image_name_unsafe"
            continue
        with excluded_as("image_unreadable", OSError):
            data = file.read_bytes() if file.is_file() else None
        if data is not None:
            return decode_image_file(name, data)
    raise ExcludedError(reason)


def decode_image_file(name: str, data: bytes) -> ImageFile:
    """An image file whose bytes were read already; the whole image is decoded to be sure that it can.

    Raises:
        ExcludedError: `image_does_not_decode`.
    """
    with excluded_as("image_does_not_decode", RecordError):
        size = read_image(data, name).size
    with Image.open(io.BytesIO(data)) as opened:
        return ImageFile(name, data, size, exif_orientation(opened))


def is_safe_name(name: str) -> bool:
    r"""True where a file name stays below the folder that it is looked up in, on any system.

    Only the name is judged: a link below the folder that leads elsewhere was put there by its owner.

    >>> [is_safe_name(name) for name in ("val2014/a.jpg", "../a.jpg", "/etc/passwd", "C:a.jpg", "..\\a.jpg")]
    [True, False, False, False, False]
    """
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name)


def check_path(path: Path, name: str, kind: Literal["file", "folder"], what: str) -> None:
    """Refuse a path that is no file, or no folder.

    Args:
        path: the file or folder.
        name: the argument or option that it was given as.
        kind: which of both it should be.
        what: what is expected ("the folder that holds the image files").

    Raises:
        FileNotFoundError: it is none.
    """
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        raise FileNotFoundError(f"{name}: {path} is not a {kind}; give {what}")


def read_json(path: Path, name: str, kind: type[T], what: str) -> T:
    """The content of a JSON file, of which the fields of `kind` are checked and the others ignored.

    Args:
        path: the file.
        name: the argument or option that it was given as, for messages.
        kind: the form that it has, most often a `msgspec.Struct`.
        what: what file it should be ("COCO's captions_*.json").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: broken JSON, with the place; or of another form, with the record and the field. The message names
            option and file.
    """
    check_path(path, name, "file", what)
    try:
        return msgspec.convert(json.loads(path.read_bytes()), kind)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path}: {error}; is it {what}? If it is, download it again") from error


def text_of(value: object, reason: str) -> str:
    """A text without white space around it.

    Raises:
        ExcludedError: it is empty or no text; counted under `reason`.
    """
    if not isinstance(value, str) or not value.strip():
        raise ExcludedError(reason)
    return value.strip()


def joined_names(joined: str, there: Collection[str], lacks: str, advice: str = "") -> list[str]:
    """The names that `joined` holds with "+" between them.

    Args:
        joined: "train+val".
        there: the names that there are.
        lacks: begins the error ("karpathy: dataset_coco.json has no split").
        advice: ends it.

    Raises:
        ValueError: there is no such name; the message lists those there are.
    """
    names = joined.split("+")
    for name in names:
        if name not in there:
            raise ValueError(f"{lacks} {name!r}; it has {sorted(there)}, which '+' joins{advice}")
    return names


def read_rows(path: Path, excluded: Counter[str]) -> Iterator[tuple[str, str]]:
    """The rows of a text file, one after the other: what stands before the first tab, and what follows it.

    Nothing is quoted: a `"` is a character like any other.

    Args:
        path: the file, UTF-8.
        excluded: filled while iterated: `row_not_utf8`, `row_malformed` (there is no tab).
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            with counting(excluded):
                with excluded_as("row_not_utf8"):
                    text = (line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line).decode()
                first, tab, rest = text.rstrip("\r\n").partition("\t")
                if not tab:
                    raise ExcludedError("row_malformed")
                yield first, rest


def usable_samples(
    entries: Iterable[Entry], build: Callable[[Entry], Sample], excluded: Counter[str], *, what: str, advice: str
) -> Iterator[Sample]:
    """The samples of all entries that can be used, in order; the others are counted.

    Args:
        entries: a data set's own description of its images, whatever it is.
        build: makes an entry's sample, or raises `ExcludedError`.
        excluded: reason -> count; filled while iterated. An entry with the key of an earlier sample is an
            `image_twice`.
        what: what an entry is, for the error where not one can be used ("image of 'val' in coco/val2014").
        advice: what to check in that case, as a sentence without full stop.

    Raises:
        ValueError: (at the end) no entry could be used.
    """
    keys: set[str] = set()
    for entry in entries:
        with counting(excluded):
            sample = build(entry)
            if sample.key in keys:
                raise ExcludedError("image_twice")
            keys.add(sample.key)
            yield sample
    if not keys:
        raise ValueError(f"no {what} could be used; excluded: {dict(+excluded) or 'nothing'}. {advice}")


def kept_captions(texts: Iterable[object], excluded: Counter[str]) -> tuple[str, ...]:
    """The captions without white space around them; those that are empty or no text count as `caption_empty`.

    Raises:
        ExcludedError: none is left (`image_without_caption`).
    """
    captions = []
    for text in texts:
        with counting(excluded):
            captions.append(text_of(text, "caption_empty"))
    if not captions:
        raise ExcludedError("image_without_caption")
    return tuple(captions)


def captioned_sample(
    entry: tuple[Sequence[str], Iterable[object]], images: Path, source: str, excluded: Counter[str]
) -> Sample:
    """The sample of an image without boxes: `entry` is where its file may lie below `images`, and its captions.

    Raises:
        ExcludedError: without caption, or as `read_image_file`.
    """
    names, texts = entry
    captions = kept_captions(texts, excluded)
    return read_image_file(images, names).sample(names[0].removesuffix(".jpg"), source, captions)


def key_from(name: str) -> str:
    """A sample's key from any name of its image: the name itself where it is a key, else one that stays distinct.

    >>> key_from("p10_s50414267-a")
    'p10_s50414267-a'
    >>> key_from("airport/1.tif")
    'airport_1_tif-af4ce3b6e153838e'
    """
    key = _UNSAFE_IN_KEYS.sub("_", name)
    if key == name and 0 < len(name) <= _LONGEST_KEY:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{key[: _LONGEST_KEY - _HASH_DIGITS - 1]}-{digest}"
