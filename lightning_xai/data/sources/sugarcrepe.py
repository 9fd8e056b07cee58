"""SugarCrepe, wrong captions of COCO's images, as its publishers ship it.

A file for each kind holds numbers -> an image of COCO's val2017, a true caption and a wrong one:

    swap_att.json: {"0": {"filename": "000000544519.jpg", "caption": "A girl with a green shirt brushing her ...",
                          "negative_caption": "A girl with a blue shirt brushing her ..."}, ...}

An image comes once, with its captions of all kinds. The same pair of captions counts as often as the files have it, as
in the publishers' evaluation.

Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the images
  folder), `image_without_choice` (no pair of captions can be used), `image_twice` (two names make one key);
- a pair of captions: `choice_malformed` (a field is missing or of another type), `choice_caption_empty`,
  `choice_captions_equal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lightning_xai.data.excluded import counting, excluded_as
from lightning_xai.data.sample import Sample
from lightning_xai.data.sources.choices import CaptionPair, choice_sample, usable_pairs
from lightning_xai.data.sources.files import check_path, joined_names, read_image_file, read_json, usable_samples

KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


class _Record(msgspec.Struct):
    filename: str
    caption: str
    negative_caption: str


def read_sugarcrepe(
    *, images: Path, annotations: Path, kinds: str = "+".join(KINDS), excluded: Counter[str]
) -> Iterator[Sample]:
    """SugarCrepe: wrong captions of COCO's val2017 images, of seven kinds.

    Args:
        images: folder of COCO's val2017 images.
        annotations: folder with the publishers' add_att.json, ..., swap_obj.json.
        kinds: of these files, those to read, joined by "+".
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation files are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken or of another form, a kind is unknown, or (at the end) no image could be used.
    """
    check_path(images, "images", "folder", "the folder that holds COCO's val2017 images")
    check_path(annotations, "annotations", "folder", "the folder that holds SugarCrepe's JSON files")
    chosen = joined_names(kinds, KINDS, "kinds: SugarCrepe has no kind")
    files = {kind: annotations / f"{kind}.json" for kind in dict.fromkeys(chosen)}
    records = {
        kind: read_json(path, "annotations", dict[str, Any], f"SugarCrepe's {path.name}")
        for kind, path in files.items()
    }

    def build(entry: tuple[str, list[CaptionPair]]) -> Sample:
        name, pairs = entry
        usable = usable_pairs(pairs, excluded)
        return choice_sample(read_image_file(images, [name]), name.removesuffix(".jpg"), "sugarcrepe", usable)

    return usable_samples(
        _by_image(records, excluded),
        build,
        excluded,
        what=f"image of SugarCrepe in {images}",
        advice=f"Check that these are COCO's val2017 images, and {annotations} holds SugarCrepe's files",
    )


def _by_image(
    records: Mapping[str, Mapping[str, Any]], excluded: Counter[str]
) -> Iterator[tuple[str, list[CaptionPair]]]:
    """The names of images, in the order of the files, with all pairs of captions."""
    found: dict[str, list[CaptionPair]] = {}
    for kind, entries in records.items():
        for entry in entries.values():
            with counting(excluded):
                with excluded_as("choice_malformed"):
                    record = msgspec.convert(entry, _Record)
                pair = CaptionPair(record.caption, record.negative_caption, kind)
                found.setdefault(record.filename, []).append(pair)
    yield from found.items()
