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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from pycocotools.coco import COCO
from typing_extensions import NotRequired, TypedDict

from lightning_xai.data.excluded import ExcludedError, counting
from lightning_xai.data.phrase_finder import MentionFinder
from lightning_xai.data.sample import Region, Sample
from lightning_xai.data.sources.coco_classes import read_classes
from lightning_xai.data.sources.files import check_path, kept_captions, read_image_file, read_json, usable_samples
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy

_Pixels = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # neither NaN nor infinite


# Dictionaries, which pycocotools indexes.
class _Image(TypedDict):
    id: int
    file_name: str
    width: _Pixels
    height: _Pixels


class _Caption(TypedDict):
    id: int | float | str | None  # a key of pycocotools's index, which nothing here looks up
    image_id: int
    caption: Any


class _Object(TypedDict):
    # Without the outlines, which make up most of the file: 860,000 of them would fill memory.
    id: int | float | str | None
    image_id: int
    category_id: int
    bbox: NotRequired[Any]
    iscrowd: NotRequired[Any]


class _Category(TypedDict):
    id: int
    name: str


class _CaptionsFile(TypedDict):
    images: list[_Image]
    annotations: list[_Caption]


class _InstancesFile(TypedDict):
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
    listed = _index(read_json(captions, "captions", _CaptionsFile, "COCO's captions_*.json as it was published"))
    annotated = _index(read_json(instances, "instances", _InstancesFile, "COCO's instances_*.json as it was published"))
    files = {key: [image["file_name"]] for key, image in listed.imgs.items()}
    sizes = {key: (int(image["width"]), int(image["height"])) for key, image in annotated.imgs.items()}
    known = files.keys() | sizes.keys()
    for reason, index, images_known in (("caption", listed, files), ("annotation", annotated, known)):
        unknown = sum(len(found) for image, found in index.imgToAnns.items() if image not in images_known)
        excluded[f"{reason}_of_unknown_image"] += unknown
    if chosen is None:
        texts = {image: [text["caption"] for text in found] for image, found in listed.imgToAnns.items()}
        entries = [(image, names, texts.get(image, ())) for image, names in files.items()]
    else:
        entries = [(image.cocoid, [*files.get(image.cocoid, ()), *image.files], image.captions) for image in chosen]
    labels = {key: category["name"] for key, category in annotated.cats.items()}
    return usable_samples(
        entries,
        _CocoReader(images, f"coco/{split}", sizes, labels, annotated.imgToAnns, excluded).read,
        excluded,
        what=f"image of {split!r} in {images}",
        advice="Check that the images, captions and instances belong together (the same year and split)",
    )


def _index(dataset: _CaptionsFile | _InstancesFile) -> COCO:
    """A file of COCO's, indexed by pycocotools."""
    index = COCO()
    index.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        index.createIndex()
    return index


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
                if thing["category_id"] not in self.labels:
                    raise ExcludedError("category_unknown")
                label = self.labels[thing["category_id"]]
                spans = {index: found[label] for index, found in enumerate(mentions) if label in found}
                regions.append(Region(label, upright(thing.get("bbox")), spans, crowd=bool(thing.get("iscrowd"))))
        return file.sample(f"{image:012d}", self.source, captions, regions)
