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

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lightning_xai.data.excluded import ExcludedError, counting
from lightning_xai.data.phrase_finder import MentionFinder
from lightning_xai.data.sample import Region, Sample
from lightning_xai.data.sources.coco_classes import read_classes
from lightning_xai.data.sources.files import check_path, kept_captions, read_image_file, read_json, usable_samples
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy

_Pixels = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # neither NaN nor infinite


class _Image(msgspec.Struct):
    id: int
    file_name: str
    width: _Pixels
    height: _Pixels


class _Caption(msgspec.Struct):
    image_id: int
    caption: Any


class _Object(msgspec.Struct):
    # Without the outlines, which make up most of the file: 860,000 of them would fill memory.
    image_id: int
    category_id: int
    bbox: Any = None
    iscrowd: Any = 0


class _Category(msgspec.Struct):
    id: int
    name: str


class _CaptionsFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Caption]


class _InstancesFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


class _CocoKarpathyImage(KarpathyImage, frozen=True, kw_only=True):
    cocoid: int


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
    check_path(images, "images", "folder", "the folder that holds the image files")
    chosen = None if karpathy is None else read_karpathy(karpathy, split, _CocoKarpathyImage)
    listed = read_json(captions, "captions", _CaptionsFile, "COCO's captions_*.json as it was published")
    annotated = read_json(instances, "instances", _InstancesFile, "COCO's instances_*.json as it was published")
    files = {image.id: [image.file_name] for image in listed.images}
    sizes = {image.id: (int(image.width), int(image.height)) for image in annotated.images}
    texts: dict[int, list[object]] = defaultdict(list)
    for text in listed.annotations:
        texts[text.image_id].append(text.caption)
    objects: dict[int, list[_Object]] = defaultdict(list)
    for thing in annotated.annotations:
        objects[thing.image_id].append(thing)
    excluded["caption_of_unknown_image"] += sum(text.image_id not in files for text in listed.annotations)
    known = files.keys() | sizes.keys()
    excluded["annotation_of_unknown_image"] += sum(thing.image_id not in known for thing in annotated.annotations)
    if chosen is None:
        entries = [(image, names, texts[image]) for image, names in files.items()]
    else:
        entries = [(image.cocoid, [*files.get(image.cocoid, ()), *image.files], image.captions) for image in chosen]
    labels = {category.id: category.name for category in annotated.categories}
    return usable_samples(
        entries,
        _CocoReader(images, f"coco/{split}", sizes, labels, objects, excluded).read,
        excluded,
        what=f"image of {split!r} in {images}",
        advice="Check that the images, captions and instances belong together (the same year and split)",
    )


@dataclass(frozen=True)
class _CocoReader:
    """Builds samples from entries; counts the captions and regions that it excludes."""

    images: Path
    source: str
    # By the id of the image, the category, the image.
    sizes: Mapping[int, tuple[int, int]]
    labels: Mapping[int, str]
    objects: Mapping[int, Sequence[_Object]]
    excluded: Counter[str]
    finder: MentionFinder = field(default_factory=lambda: MentionFinder(*read_classes()))

    def read(self, entry: tuple[int, Sequence[str], Sequence[object]]) -> Sample:
        """The sample of an image id, its possible file names below the images folder, and its captions."""
        image, names, texts = entry
        captions = kept_captions(texts, self.excluded)
        if image not in self.sizes:
            raise ExcludedError("image_without_record")
        file = read_image_file(self.images, names)
        upright = file.from_annotated(self.sizes[image])
        mentions = [self.finder.find(caption) for caption in captions]
        regions = []
        for thing in self.objects.get(image, ()):
            with counting(self.excluded):
                if thing.category_id not in self.labels:
                    raise ExcludedError("category_unknown")
                label = self.labels[thing.category_id]
                spans = {index: found[label] for index, found in enumerate(mentions) if label in found}
                regions.append(Region(label, upright(thing.bbox), spans, crowd=bool(thing.iscrowd)))
        return file.sample(f"{image:012d}", self.source, captions, regions)
