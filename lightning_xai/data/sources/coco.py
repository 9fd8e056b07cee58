"""MS COCO (2014 and 2017), as its publishers ship it, with or without Karpathy's split.

Captions come from `captions_*.json` (or `dataset_coco.json`), boxes from `instances_*.json`, images from a folder.
Where a caption names a class is found with the dictionary in `coco_classes`. What cannot be used is counted by reason,
and the rest goes on; only input that makes no sense at all (a missing file, broken JSON, unknown split) is an error.

Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the images
  folder), `image_without_caption`, `image_without_record` (the instances file does not have it), `image_twice`,
  `size_mismatch` (it is not the image that was annotated);
- a caption: `caption_empty`, `caption_of_unknown_image`;
- a region: `annotation_of_unknown_image`, `category_unknown`, `box_malformed`, `box_without_area`, `box_outside_image`.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from lightning_xai.data.excluded import ExcludedError, counting
from lightning_xai.data.phrase_finder import MentionFinder
from lightning_xai.data.sample import Region, Sample, Span
from lightning_xai.data.sources.boxes import BoxTransform, clip_box, parse_box
from lightning_xai.data.sources.coco_classes import read_classes
from lightning_xai.data.sources.files import (
    check_file,
    check_folder,
    kept_captions,
    listed_records,
    load_json,
    read_image_file,
    usable_samples,
)
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy


@dataclass(frozen=True)
class _Entry:
    """One image of the split: its id, its possible file names below the images folder, its captions."""

    image_id: int
    files: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Instances:
    """The instances file: annotated image sizes, category names, and (from pycocotools) annotations by image."""

    sizes: Mapping[int, tuple[int, int]]
    categories: Mapping[int, str]
    annotations: Mapping[int, list[dict[str, Any]]]


def read_coco(
    *,
    images: Path,
    captions: Path,
    instances: Path,
    split: str,
    karpathy: Path | None = None,
    excluded: Counter[str],
) -> Iterator[Sample]:
    """COCO 2014 or 2017: five captions an image, all boxes, and where captions name their classes.

    Images come in the order of the captions file (or of Karpathy's). Every annotated object becomes a region, `iscrowd`
    ones as `crowd`. Every region of a class carries all mentions of that class in all captions of its image. Boxes are
    clipped to the image.

    Boxes are in pixels of the upright image. COCO's annotated width and height show which image was annotated where
    EXIF orientation swaps the sides (5 to 8): boxes drawn on the stored pixels are turned with them. Orientations 2 to
    4 (and square images) keep the size; there the boxes are taken as drawn on the upright image.

    Args:
        images: folder of the image files; with `karpathy`, also in its sub-folders (val2014/...).
        captions: annotations/captions_*.json.
        instances: annotations/instances_*.json; with `karpathy`, images that are not in it are excluded.
        split: name of the split; with `karpathy` the split to take: train, restval, val, test, or several
            joined by "+" (COCO 2014 keeps restval among the images and annotations of val2014).
        karpathy: dataset_coco.json of the Karpathy splits; the captions are then its sentences.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation files are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken or of another kind, the split is unknown, or (at the end) no image could be used.
    """
    _check_paths(images, captions, instances)
    chosen = None if karpathy is None else read_karpathy(karpathy, split, need_cocoid=True)
    caption_index = _load_coco(captions, "captions", ("images", "annotations"))
    instance_index = _load_coco(instances, "instances", ("images", "annotations", "categories"))
    objects = _read_instances(instance_index, instances)
    entries = _caption_entries(caption_index, captions, excluded)
    known = {entry.image_id for entry in entries} | set(objects.sizes)
    _count_unknown(objects, known, excluded)
    if chosen is not None:
        names = {entry.image_id: entry.files for entry in entries}
        entries = [_karpathy_entry(image, names) for image in chosen]
    return usable_samples(
        entries,
        _CocoReader(images, objects, split, excluded).read,
        excluded,
        what=f"image of {split!r} in {images}",
        advice="Check that the images, captions and instances belong together (the same year and split)",
    )


class _CocoReader:
    """Builds samples from entries; counts the captions and regions that it excludes."""

    def __init__(self, images: Path, objects: _Instances, split: str, excluded: Counter[str]) -> None:
        self._images = images
        self._objects = objects
        self._split = split
        self._excluded = excluded
        self._finder = MentionFinder(*read_classes())

    def read(self, entry: _Entry) -> Sample:
        """The entry's sample."""
        captions = kept_captions(entry.captions, self._excluded)
        if entry.image_id not in self._objects.sizes:
            raise ExcludedError("image_without_record")
        file = read_image_file(self._images, entry.files)
        to_upright = file.from_annotated(self._objects.sizes[entry.image_id])
        mentions = [self._finder.find(caption) for caption in captions]
        regions = []
        for annotation in self._objects.annotations.get(entry.image_id, ()):
            with counting(self._excluded):
                regions.append(self._region(annotation, to_upright, file.size, mentions))
        source = f"coco/{self._split}/{file.name}"
        return Sample(f"{entry.image_id:012d}", file.data, file.size, captions, tuple(regions), source)

    def _region(
        self,
        annotation: Mapping[str, Any],
        to_upright: BoxTransform,
        size: tuple[int, int],
        mentions: Sequence[Mapping[str, tuple[Span, ...]]],
    ) -> Region:
        label = _label(annotation, self._objects)
        box = clip_box(to_upright(parse_box(annotation.get("bbox"))), size)
        spans = {index: found[label] for index, found in enumerate(mentions) if label in found}
        return Region(label, box, spans, crowd=bool(annotation.get("iscrowd", 0)))


def _label(annotation: Mapping[str, Any], objects: _Instances) -> str:
    category = annotation["category_id"]
    if category not in objects.categories:
        raise ExcludedError("category_unknown")
    return objects.categories[category]


def _count_unknown(objects: _Instances, known: set[int], excluded: Counter[str]) -> None:
    excluded["annotation_of_unknown_image"] += sum(
        len(annotations) for image, annotations in objects.annotations.items() if image not in known
    )


# Annotation files


def _check_paths(images: Path, captions: Path, instances: Path) -> None:
    check_folder(images, "images", "the image files")
    for name, path in (("captions", captions), ("instances", instances)):
        check_file(path, name, "the JSON file as it was published")


def _load_coco(path: Path, name: str, parts: tuple[str, ...]) -> COCO:
    """A file of COCO's, indexed by pycocotools."""
    data = load_json(path, name)
    needed = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "caption" if name == "captions" else "category_id"),
        "categories": ("id", "name"),
    }
    for part in parts:
        for record in listed_records(data, part, needed[part], origin=f"{name}: {path}", kind=f"COCO's {name} file"):
            # Outlines make up most of the file and are not used; 860,000 of them would fill memory.
            record.pop("segmentation", None)
    index = COCO()
    index.dataset = data
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            index.createIndex()
    except TypeError as error:
        raise ValueError(f"{name}: {path}: an id is no number ({error}); is it COCO's {name} file?") from error
    return index


def _read_instances(index: COCO, path: Path) -> _Instances:
    return _Instances(
        sizes={image: _annotated_size(record, path) for image, record in index.imgs.items()},
        categories={key: str(record["name"]) for key, record in index.cats.items()},
        annotations=dict(index.imgToAnns),
    )


def _annotated_size(record: Mapping[str, Any], path: Path) -> tuple[int, int]:
    try:
        return int(record["width"]), int(record["height"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"instances: {path}: image {record['id']!r} has no whole width and height ({error})"
        ) from error


def _caption_entries(index: COCO, path: Path, excluded: Counter[str]) -> list[_Entry]:
    excluded["caption_of_unknown_image"] += sum(
        len(annotations) for image, annotations in index.imgToAnns.items() if image not in index.imgs
    )
    entries = []
    for image, record in index.imgs.items():
        if not isinstance(image, int):
            raise ValueError(f"captions: {path}: image id {image!r} is no whole number")
        texts = (annotation["caption"] for annotation in index.imgToAnns.get(image, ()))
        captions = tuple(text if isinstance(text, str) else "" for text in texts)
        entries.append(_Entry(image, (str(record["file_name"]),), captions))
    return entries


def _karpathy_entry(image: KarpathyImage, names: Mapping[int, tuple[str, ...]]) -> _Entry:
    """An image of Karpathy's; `names` are COCO's file names by image id."""
    assert image.cocoid is not None  # read_karpathy was asked for it
    return _Entry(image.cocoid, (*names.get(image.cocoid, ()), *image.files), image.captions)
