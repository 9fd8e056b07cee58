"""MS COCO (2014 and 2017), as its publishers ship it, with or without Karpathy's split.

Captions come from `captions_*.json` (or `dataset_coco.json`), boxes from `instances_*.json`, images from a folder.
Where a caption names a class is found with the dictionary in `coco_classes`. What cannot be used is counted by reason,
and the rest goes on; only input that makes no sense at all (a missing file, broken JSON, unknown split) is an error.

Reasons for leaving out

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the images
  folder), `image_without_caption`, `image_without_record` (the instances file does not have it), `image_twice`,
  `size_mismatch` (it is not the image that was annotated);
- a caption: `caption_empty`, `caption_of_unknown_image`;
- a region: `annotation_of_unknown_image`, `category_unknown`, `box_malformed`, `box_without_area`, `box_outside_image`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from pycocotools.coco import COCO

from lightning_xai.data.sample import Box, RecordError, Region, Sample, Span, exif_orientation, read_image
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.data.sources.coco_classes import COCO_BLOCKED, COCO_SYNONYMS
from lightning_xai.data.spans import MentionFinder


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


def prepare_coco(
    images: Path,
    captions: Path,
    instances: Path,
    out: Path,
    split: str,
    karpathy: Path | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> Manifest:
    """Convert native COCO files to shards.

    Args:
        images: folder with the image files.
        captions: `captions_{split}.json`.
        instances: `instances_{split}.json`.
        out: folder to make for the shards.
        split: the split's name; with `karpathy`, which of its splits to take ("train", "restval", "val", "test", or
            several joined by "+").
        karpathy: Karpathy's `dataset_coco.json`, for his split and its captions.
        samples_per_shard: size of all shards but the last.
        overwrite: replace shards that are already in `out`.

    Returns:
        The manifest; its `left_out` counts, by reason, what could not be used.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken or of another kind, the split is unknown, or not one image could be used.
    """
    left_out: Counter[str] = Counter()
    samples = read_coco(images, captions, instances, split, karpathy, left_out)
    return write_shards(
        samples,
        out,
        name=f"coco/{split}",
        samples_per_shard=samples_per_shard,
        left_out=left_out,
        overwrite=overwrite,
    )


def read_coco(
    images: Path,
    captions: Path,
    instances: Path,
    split: str,
    karpathy: Path | None = None,
    left_out: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Read COCO's images one after the other, in the order of the captions file (or of Karpathy's).

    Every annotated object becomes a region, `iscrowd` ones as `crowd`. Every region of a class carries all mentions of
    that class in all captions of its image. Boxes are clipped to the image.

    Boxes are in pixels of the upright image. COCO's annotated width and height tell which image was annotated where
    EXIF orientation swaps the sides (5 to 8): boxes drawn on the stored pixels are turned with them. Orientations 2 to
    4 (and square images) keep the size; there the boxes are taken as drawn on the upright image.

    Args:
        images: folder with the image files. With `karpathy`, files may also lie in its sub-folders (`val2014/...`).
        captions: `captions_{split}.json`.
        instances: `instances_{split}.json`; with `karpathy`, images that are not in it are left out and counted.
        split: name of the split, used in `Sample.source`; with `karpathy`, which of its splits to take, several joined
            by "+" ("train+restval" is what papers usually fine-tune on).
        karpathy: Karpathy's `dataset_coco.json`; the captions are then its sentences.
        left_out: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation files are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken or of another kind, the split is unknown, or (at the end) no image could be used.
    """
    left_out = Counter() if left_out is None else left_out
    _check_paths(images, captions, instances, karpathy)
    caption_index = _load_coco(captions, "captions", ("images", "annotations"))
    instance_index = _load_coco(instances, "instances", ("images", "annotations", "categories"))
    objects = _read_instances(instance_index, instances)
    entries = _caption_entries(caption_index, captions, left_out)
    known = {entry.image_id for entry in entries} | set(objects.sizes)
    _count_unknown(objects, known, left_out)
    if karpathy is not None:
        names = {entry.image_id: entry.files for entry in entries}
        entries = _karpathy_entries(karpathy, split, names)
    return _samples(images, entries, objects, split, left_out)


def _samples(
    images: Path, entries: Iterable[_Entry], objects: _Instances, split: str, left_out: Counter[str]
) -> Iterator[Sample]:
    reader = _Reader(images, objects, split, left_out)
    count = 0
    for entry in entries:
        sample = reader.read(entry)
        if sample is not None:
            yield sample
            count += 1
    if not count:
        raise ValueError(
            f"no image of {split!r} in {images} could be used; left out: {dict(left_out)}. Check that the images, "
            "captions and instances belong together (the same year and split)"
        )


class _LeftOutError(Exception):
    """An image is left out; the message is the reason under which it is counted."""


class _Reader:
    """Builds samples from entries; counts what it leaves out."""

    def __init__(self, images: Path, objects: _Instances, split: str, left_out: Counter[str]) -> None:
        self._images = images
        self._objects = objects
        self._split = split
        self._left_out = left_out
        self._finder = MentionFinder(COCO_SYNONYMS, COCO_BLOCKED)
        self._seen: set[int] = set()

    def read(self, entry: _Entry) -> Sample | None:
        """The entry's sample; None where it was left out and counted."""
        try:
            return self._read(entry)
        except _LeftOutError as reason:
            self._left_out[str(reason)] += 1
            return None

    def _read(self, entry: _Entry) -> Sample:
        if entry.image_id in self._seen:
            raise _LeftOutError("image_twice")
        self._seen.add(entry.image_id)
        captions = tuple(caption.strip() for caption in entry.captions if caption.strip())
        self._left_out["caption_empty"] += len(entry.captions) - len(captions)
        if not captions:
            raise _LeftOutError("image_without_caption")
        if entry.image_id not in self._objects.sizes:
            raise _LeftOutError("image_without_record")
        name, data = _read_file(self._images, entry.files)
        source = f"coco/{self._split}/{name}"
        size, orientation = _measure(data, source)
        to_upright = _box_transform(self._objects.sizes[entry.image_id], size, orientation)
        mentions = [self._finder.find(caption) for caption in captions]
        regions = (
            self._region(annotation, to_upright, size, mentions)
            for annotation in self._objects.annotations.get(entry.image_id, ())
        )
        kept = tuple(region for region in regions if region is not None)
        return Sample(f"{entry.image_id:012d}", data, size, captions, kept, source)

    def _region(
        self,
        annotation: Mapping[str, Any],
        to_upright: _BoxTransform,
        size: tuple[int, int],
        mentions: Sequence[Mapping[str, tuple[Span, ...]]],
    ) -> Region | None:
        try:
            label = _label(annotation, self._objects)
            box = _clip(to_upright(_box(annotation)), size)
        except _LeftOutError as reason:
            self._left_out[str(reason)] += 1
            return None
        spans = {index: found[label] for index, found in enumerate(mentions) if label in found}
        return Region(label, box, spans, crowd=bool(annotation.get("iscrowd", 0)))


# Images


def _read_file(images: Path, names: Iterable[str]) -> tuple[str, bytes]:
    """The first file of `names` below `images` that is there: its name and bytes."""
    unsafe = False
    for name in names:
        path = PurePosixPath(name)
        # Only the name is judged: a link below the folder that leads elsewhere was put there by its owner.
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            unsafe = True
            continue
        file = images / path
        if file.is_file():
            try:
                return name, file.read_bytes()
            except OSError as error:
                raise _LeftOutError("image_unreadable") from error
    raise _LeftOutError("image_name_unsafe" if unsafe else "image_missing")


def _measure(data: bytes, origin: str) -> tuple[tuple[int, int], int]:
    """Size of the upright image, and the file's EXIF orientation; the whole image is decoded to be sure that it can."""
    try:
        size = read_image(data, origin).size
    except RecordError as error:
        raise _LeftOutError("image_does_not_decode") from error
    with Image.open(io.BytesIO(data)) as opened:
        return size, exif_orientation(opened)


@dataclass(frozen=True)
class _BoxTransform:
    """Turns boxes of the stored pixels (`stored` wide and high) by an EXIF orientation of 5 to 8; others stay."""

    orientation: int
    stored: tuple[int, int]

    def __call__(self, box: Box) -> Box:
        x, y, width, height = box
        right, below = self.stored[0] - x - width, self.stored[1] - y - height
        if self.orientation == 5:
            return y, x, height, width
        if self.orientation == 6:
            return below, x, height, width
        if self.orientation == 7:
            return below, right, height, width
        if self.orientation == 8:
            return y, right, height, width
        return box


def _box_transform(annotated: tuple[int, int], upright: tuple[int, int], orientation: int) -> _BoxTransform:
    if annotated == upright:
        return _BoxTransform(1, annotated)
    if orientation >= 5 and annotated == upright[::-1]:
        return _BoxTransform(orientation, annotated)
    raise _LeftOutError("size_mismatch")


# Regions


def _label(annotation: Mapping[str, Any], objects: _Instances) -> str:
    category = annotation["category_id"]
    if category not in objects.categories:
        raise _LeftOutError("category_unknown")
    return objects.categories[category]


def _box(annotation: Mapping[str, Any]) -> Box:
    try:
        x, y, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise _LeftOutError("box_malformed") from error
    if not all(map(math.isfinite, (x, y, width, height))):
        raise _LeftOutError("box_malformed")
    if width <= 0 or height <= 0:
        raise _LeftOutError("box_without_area")
    return x, y, width, height


def _clip(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box inside an image of `size` (width, height).

    >>> _clip((-2.0, 3.0, 5.0, 4.0), (10, 5))
    (0.0, 3.0, 3.0, 2.0)
    """
    x, y, width, height = box
    # A side that lies inside is kept as it is: left + width - left is not always width.
    left, top = max(x, 0.0), max(y, 0.0)
    width = width if x >= 0 and x + width <= size[0] else min(x + width, float(size[0])) - left
    height = height if y >= 0 and y + height <= size[1] else min(y + height, float(size[1])) - top
    if width <= 0 or height <= 0:
        raise _LeftOutError("box_outside_image")
    return left, top, width, height


def _count_unknown(objects: _Instances, known: set[int], left_out: Counter[str]) -> None:
    left_out["annotation_of_unknown_image"] += sum(
        len(annotations) for image, annotations in objects.annotations.items() if image not in known
    )


# Annotation files


def _check_paths(images: Path, captions: Path, instances: Path, karpathy: Path | None) -> None:
    if not images.is_dir():
        raise FileNotFoundError(f"images: {images} is not a folder; give the folder that holds the image files")
    for name, path in (("captions", captions), ("instances", instances), ("karpathy", karpathy)):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{name}: {path} is not a file; give the path of the JSON file as it was published")


def _load_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: {path} is broken JSON at line {error.lineno} column {error.colno} (character {error.pos}: "
            f"{error.msg}); download it again"
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: {path} is no JSON text ({error}); download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name}: {path} holds a {type(data).__name__}, expected an object; is it the right file?")
    return data


def _load_coco(path: Path, name: str, parts: tuple[str, ...]) -> COCO:
    """A file of COCO's, indexed by pycocotools."""
    data = _load_json(path, name)
    needed = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "caption" if name == "captions" else "category_id"),
        "categories": ("id", "name"),
    }
    for part in parts:
        if not isinstance(data.get(part), list):
            raise ValueError(f"{name}: {path} has no list {part!r}; is it COCO's {name} file? It has {sorted(data)}")
        for index, record in enumerate(data[part]):
            missing = [key for key in needed[part] if not isinstance(record, dict) or key not in record]
            if missing:
                raise ValueError(f"{name}: {path}: {part}[{index}] has no {missing[0]!r}; is it COCO's {name} file?")
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


def _caption_entries(index: COCO, path: Path, left_out: Counter[str]) -> list[_Entry]:
    left_out["caption_of_unknown_image"] += sum(
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


def _karpathy_entries(path: Path, split: str, names: Mapping[int, tuple[str, ...]]) -> list[_Entry]:
    """The images of one or several of Karpathy's splits; `names` are COCO's file names by image id."""
    records = _load_json(path, "karpathy").get("images")
    if not isinstance(records, list):
        raise ValueError(f"karpathy: {path} has no list 'images'; is it dataset_coco.json?")
    for index, record in enumerate(records):
        for key, kind in (("split", str), ("filename", str), ("cocoid", int), ("sentences", list)):
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise ValueError(f"karpathy: {path}: images[{index}] has no valid {key!r}; is it dataset_coco.json?")
    wanted = split.split("+")
    there = sorted({record["split"] for record in records})
    for name in wanted:
        if name not in there:
            raise ValueError(f"karpathy: {path} has no split {name!r}; it has {there}, which '+' joins")
    return [_karpathy_entry(record, names) for record in records if record["split"] in wanted]


def _karpathy_entry(record: Mapping[str, Any], names: Mapping[int, tuple[str, ...]]) -> _Entry:
    filename = record["filename"]
    files = [f"{record['filepath']}/{filename}"] if isinstance(record.get("filepath"), str) else []
    raws = (sentence.get("raw") if isinstance(sentence, dict) else None for sentence in record["sentences"])
    return _Entry(
        image_id=record["cocoid"],
        files=(*names.get(record["cocoid"], ()), filename, *files),
        captions=tuple(raw if isinstance(raw, str) else "" for raw in raws),
    )
