"""ARO's Visual Genome Relation and Visual Genome Attribution, as their publishers ship them.

`visual_genome_relation.json` and `visual_genome_attribution.json` hold a list of test cases, about a part of an image:

    {"image_path": "2415036.jpg", "bbox_x": 90, "bbox_y": 40, "bbox_w": 210, "bbox_h": 150,
     "true_caption": "the man is to the left of the dog", "false_caption": "the dog is to the left of the man",
     "relation_name": "to the left of", ...}        (or "attributes": ["black", "white"])

The sample's image is that part, cut out of the image as the publishers' evaluation does and stored as PNG without loss
(many times the size of the photograph's bytes). The kind of a wrong caption is its relation, or both attributes joined
by "_". A part leaves the image where a box does: there it is cut at the image's edge, where the publishers add black.

ARO's COCO Order and Flickr30k Order are not read: their wrong captions are in no file, but drawn at random, with a
tagger of parts of speech, whenever the publishers' code runs.

Reasons for exclusion

- a part of an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the
  images folder), `image_without_choice` (no pair of captions can be used), `image_part_outside` (nothing of the part
  is in the image), `image_twice` (two parts make one key);
- a pair of captions: `choice_malformed` (a field is missing or of another type), `choice_caption_empty`,
  `choice_captions_equal`.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.sample import Sample, read_image
from lightning_xai.data.sources.choices import CaptionPair, choice_sample, usable_pairs
from lightning_xai.data.sources.files import ImageFile, check_path, read_image_file, read_json, usable_samples


class _Record(msgspec.Struct):
    image_path: str
    bbox_x: int
    bbox_y: int
    bbox_w: int
    bbox_h: int
    true_caption: str
    false_caption: str
    relation_name: str | None = None
    attributes: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Part:
    """A part of an image: where it begins, its width and its height, in pixels."""

    image: str
    x: int
    y: int
    width: int
    height: int


def read_aro(*, images: Path, annotations: Path, excluded: Counter[str]) -> Iterator[Sample]:
    """ARO: relations or attributes of Visual Genome's objects, exchanged in the wrong caption.

    Args:
        images: folder of the publishers' images (vgr_vga_images.zip), or of GQA's.
        annotations: visual_genome_relation.json or visual_genome_attribution.json.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation file is read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the file is broken or of another form, or (at the end) no image could be used.
    """
    check_path(images, "images", "folder", "the folder that holds the images of ARO")
    records = read_json(
        annotations, "annotations", list[Any], "ARO's visual_genome_relation.json or ..._attribution.json"
    )

    def build(entry: tuple[_Part, list[CaptionPair]]) -> Sample:
        part, pairs = entry
        usable = usable_pairs(pairs, excluded)
        file = _cut_out(read_image_file(images, [part.image]), part)
        name = f"{part.image.removesuffix('.jpg')}-{part.x}-{part.y}-{part.width}-{part.height}"
        return choice_sample(file, name, "aro", usable)

    return usable_samples(
        _by_part(records, excluded),
        build,
        excluded,
        what=f"image of {annotations}",
        advice=f"Check that it is ARO's file of the images in {images}",
    )


def _by_part(records: Sequence[Any], excluded: Counter[str]) -> Iterator[tuple[_Part, list[CaptionPair]]]:
    """The parts of images, in the order of the file, with all pairs of captions."""
    found: dict[_Part, list[CaptionPair]] = {}
    for entry in records:
        with counting(excluded):
            with excluded_as("choice_malformed"):
                record = msgspec.convert(entry, _Record)
            kind = record.relation_name or "_".join(record.attributes or ())
            part = _Part(record.image_path, record.bbox_x, record.bbox_y, record.bbox_w, record.bbox_h)
            found.setdefault(part, []).append(CaptionPair(record.true_caption, record.false_caption, kind))
    yield from found.items()


def _cut_out(file: ImageFile, part: _Part) -> ImageFile:
    """The part of an image, as a PNG file.

    Raises:
        ExcludedError: nothing of it is in the image (`image_part_outside`).
    """
    (width, height), right, lower = file.size, part.x + part.width, part.y + part.height
    box = (max(part.x, 0), max(part.y, 0), min(right, width), min(lower, height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ExcludedError("image_part_outside")
    buffer = io.BytesIO()
    cut = read_image(file.data, file.name).crop(box)
    cut.save(buffer, "PNG")
    return ImageFile(file.name, buffer.getvalue(), cut.size, orientation=1)
