"""Winoground, pairs of images whose captions have the same words in another order, as its publishers ship it.

`examples.jsonl` holds one line for each pair, and the images are PNG files in a folder:

    {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "an old person kisses a young person",
     "caption_1": "a young person kisses an old person", "collapsed_tag": "Relation", ...}

Each image is a sample, its own caption the true one and that of the other image the wrong one, of the kind
`collapsed_tag`. Both samples of a pair have the same group, by which image and group scores are computed.

Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the images
  folder), `image_without_pair` (the other image cannot be used), `image_without_choice` (a caption is empty, or both
  are equal), `image_twice` (a pair has the id of an earlier one);
- a line: `row_malformed` (no JSON, or a field is missing or of another type);
- a pair of captions: `choice_caption_empty`, `choice_captions_equal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.sample import Sample
from lightning_xai.data.sources.choices import CaptionPair, choice_sample, usable_pairs
from lightning_xai.data.sources.files import ImageFile, check_path, read_image_file, usable_samples

_EXTENSIONS = (".png", ".jpg", "")


class _Record(msgspec.Struct):
    id: int | str
    image_0: str
    image_1: str
    caption_0: str
    caption_1: str
    collapsed_tag: str = ""


@dataclass(frozen=True)
class _Side:
    """One image of a pair."""

    record: _Record
    number: int  # 0 or 1

    def image(self, images: Path) -> ImageFile:
        name = self.record.image_1 if self.number else self.record.image_0
        return read_image_file(images, [f"{name}{extension}" for extension in _EXTENSIONS])

    @property
    def pair(self) -> CaptionPair:
        both = (self.record.caption_0, self.record.caption_1)
        return CaptionPair(both[self.number], both[1 - self.number], self.record.collapsed_tag)


def read_winoground(*, images: Path, examples: Path, excluded: Counter[str]) -> Iterator[Sample]:
    """Winoground: pairs of images whose captions have the same words in another order.

    Args:
        images: folder of the publishers' images (ex_0_img_0.png and so on).
        examples: the publishers' examples.jsonl.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; that the files are there is checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: (at the end) no image could be used.
    """
    check_path(images, "images", "folder", "the folder that holds Winoground's images")
    check_path(examples, "examples", "file", "Winoground's examples.jsonl")

    def build(side: _Side) -> Sample:
        usable = usable_pairs([side.pair], excluded)
        file, other = side.image(images), replace(side, number=1 - side.number)
        with excluded_as("image_without_pair", ExcludedError):
            other.image(images)
        name = f"{side.record.id}-{side.number}"
        return replace(choice_sample(file, name, "winoground", usable), group=str(side.record.id))

    return usable_samples(
        (_Side(record, number) for record in _records(examples, excluded) for number in (0, 1)),
        build,
        excluded,
        what=f"image of {examples}",
        advice=f"Check that it is Winoground's file of the images in {images}",
    )


def _records(path: Path, excluded: Counter[str]) -> Iterator[_Record]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                with counting(excluded), excluded_as("row_malformed", msgspec.MsgspecError):
                    yield msgspec.json.decode(line, type=_Record)
