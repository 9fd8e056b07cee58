"""MS COCO (2014 and 2017), as its publishers ship it, with or without Karpathy's split; LVIS, and data of their form.

Captions come from `captions_*.json` (or `dataset_coco.json`), boxes from `instances_*.json`, images from a folder.
Where a caption names a class is found with the dictionary in `coco_classes`, and other classes by their names and a
file of synonyms (`own_classes`). Ids may be numbers or texts. What cannot be used is counted by reason, and the rest
goes on; only input that makes no sense at all (a missing file, broken JSON, unknown split) is an error.

Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (it leaves the images
  folder), `image_without_caption` (also where only the instances file has it), `image_without_record` (the instances
  file does not have it), `image_twice`, `size_mismatch` (it is not the image that was annotated);
- a caption: `caption_empty`, `caption_of_unknown_image`;
- an annotation: `annotation_of_unknown_image`, `annotation_twice` (the same id, image, class and box),
  `category_unknown`;
- only the box of a region, which still counts as an instance: `box_malformed` (or missing), `box_without_area`,
  `box_outside_image`;
- only the mask of a region that has a box: `mask_malformed`, `mask_size` (of another size than the image),
  `mask_empty` (no pixel of the image), `mask_off_its_box` (its own box and the annotated one share less than half of
  their union);
- a class in an image of LVIS that has more instances than were annotated, so that it is not measured there:
  `instances_not_exhaustive`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from pycocotools.coco import COCO
from typing_extensions import NotRequired, TypedDict

from lightning_xai.data.excluded import ExcludedError, counting
from lightning_xai.data.masks import Mask
from lightning_xai.data.phrase_finder import MentionFinder
from lightning_xai.data.sample import Box, Region, Sample, Span
from lightning_xai.data.sources.files import check_path, kept_captions, read_image_file, read_json, usable_samples
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy
from lightning_xai.data.sources.own_classes import class_finder, read_synonyms, shown
from lightning_xai.data.sources.segmentation import pack_segmentation, read_mask

_Pixels = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # neither NaN nor infinite
_RawId: TypeAlias = int | float | str
_Id: TypeAlias = int | str
_Key: TypeAlias = int | float | str | None  # of pycocotools's index, which nothing here looks up

_NO_CROWD = ("0", "0.0", "false", "none", "")  # as exporters write it

_log = logging.getLogger(__name__)


# Dictionaries, which pycocotools indexes; their ids are made alike before.
class _ListedImage(TypedDict):
    id: _RawId
    file_name: str
    width: NotRequired[_Pixels]
    height: NotRequired[_Pixels]


class _AnnotatedImage(TypedDict):
    # LVIS has no file names, and lists the classes of which it has not annotated all instances.
    id: _RawId
    width: _Pixels
    height: _Pixels
    not_exhaustive_category_ids: NotRequired[list[_RawId]]


class _Caption(TypedDict):
    image_id: _RawId
    caption: Any
    id: NotRequired[_Key]


class _Object(TypedDict):
    image_id: _RawId
    category_id: _RawId
    id: NotRequired[_Key]
    bbox: NotRequired[Any]
    iscrowd: NotRequired[Any]
    segmentation: NotRequired[Any]


class _Category(TypedDict):
    id: _RawId
    name: str
    synonyms: NotRequired[list[str]]


class _CaptionsFile(TypedDict):
    images: list[_ListedImage]
    annotations: list[_Caption]


class _InstancesFile(TypedDict):
    images: list[_AnnotatedImage]
    annotations: list[_Object]
    categories: list[_Category]


class _CocoKarpathyImage(KarpathyImage, frozen=True, kw_only=True):
    cocoid: _RawId


def read_coco(
    *,
    images: Path,
    captions: Path,
    instances: Path,
    split: str,
    karpathy: Path | None = None,
    synonyms: Path | None = None,
    masks: bool = True,
    excluded: Counter[str],
) -> Iterator[Sample]:
    """COCO 2014 or 2017: five captions an image, all boxes and masks; also LVIS, and own data of their form.

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
        synonyms: YAML or JSON file with further words for classes: a line for each, such as
            "helmet: [hard hat, headgear]". COCO's own classes have a dictionary; others are found by their name, in
            singular and plural. Classes that no caption names are listed at the end.
        masks: keep the segmentation of each object that has a box, as run lengths: shards grow by about 2 %.
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
    annotated = _index(
        read_json(instances, "instances", _InstancesFile, "COCO's instances_*.json as it was published"), masks=masks
    )
    words = {category["name"]: category.get("synonyms", []) for category in annotated.dataset["categories"]}
    found = class_finder(words, read_synonyms(synonyms, words) if synonyms is not None else None)
    files = {key: [image["file_name"]] for key, image in listed.imgs.items()}
    records: dict[_RawId, _AnnotatedImage] = annotated.imgs
    texts = {key: [caption["caption"] for caption in found] for key, found in listed.imgToAnns.items()}
    for reason, index, known in (("caption", listed, set(files)), ("annotation", annotated, files.keys() | records)):
        unknown = sum(len(found) for key, found in index.imgToAnns.items() if key not in known)
        excluded[f"{reason}_of_unknown_image"] += unknown
    if chosen is None:
        excluded["image_twice"] += len(listed.dataset["images"]) - len(files)
        excluded["image_without_caption"] += len(records.keys() - files.keys())
        entries = [(image, names, texts.get(image, ())) for image, names in files.items()]
    else:
        ids = [_id(image.cocoid) for image in chosen]
        entries = [
            (key, [*files.get(key, ()), *image.files], image.captions) for key, image in zip(ids, chosen, strict=True)
        ]
    labels = {key: category["name"] for key, category in annotated.cats.items()}
    reader = _CocoReader(images, f"coco/{split}", records, labels, annotated.imgToAnns, found.finder, excluded)
    samples = usable_samples(
        entries,
        reader.read,
        excluded,
        what=f"image of {split!r} in {images}",
        advice="Check that the images, captions and instances belong together (the same year and split)",
    )
    return _with_summary(samples, reader, found.ambiguous)


def _id(value: _RawId) -> _Id:
    """An id that is the same whether it was written as 7, 7.0 or "7"."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else str(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    return value


def _index(dataset: _CaptionsFile | _InstancesFile, *, masks: bool = False) -> COCO:
    """A file of COCO's form, indexed by pycocotools; ids are made alike."""
    parts: dict[str, list[Any]] = {key: [*entries] for key, entries in dataset.items()}  # type: ignore[misc]
    for entry in (*parts["images"], *parts.get("categories", ())):
        entry["id"] = _id(entry["id"])
    for annotation in parts["annotations"]:
        annotation |= {key: _id(annotation[key]) for key in ("image_id", "category_id") if key in annotation}
        annotation.setdefault("id", None)  # pycocotools asks for it
        # The outlines make up most of the file: as lists of numbers, 860,000 of them would fill memory.
        outline = annotation.pop("segmentation", None)
        if masks and outline is not None:
            annotation["segmentation"] = pack_segmentation(outline)
    index = COCO()
    index.dataset = parts
    with contextlib.redirect_stdout(io.StringIO()):  # and prints its progress
        index.createIndex()
    return index


def _with_summary(
    samples: Iterator[Sample], reader: _CocoReader, ambiguous: Mapping[str, Sequence[str]]
) -> Iterator[Sample]:
    """The samples; at their end it is said which classes no caption names."""
    yield from samples
    never = [label for label in reader.instances if label not in reader.named]
    if never:
        _log.warning(
            "No caption names %d of the %d classes; their objects (%d) are not measured: %s. "
            "--synonyms FILE gives them further words",
            len(never), len(reader.instances), sum(reader.instances[label] for label in never), shown(never),
        )  # fmt: skip
    if unclear := {phrase: names for phrase, names in ambiguous.items() if reader.instances.keys() & set(names)}:
        first, names = next(iter(unclear.items()))
        _log.warning(
            "%d words are not looked for, as they name several classes: %s (%r: %s). --synonyms FILE decides",
            len(unclear), shown(unclear), first, shown(names),
        )  # fmt: skip


@dataclass(frozen=True)
class _CocoReader:
    """Builds samples from entries; counts the captions and regions that it excludes, and what captions name."""

    images: Path
    source: str
    # By the id of the image, the category, the image.
    records: Mapping[_RawId, _AnnotatedImage]
    labels: Mapping[_RawId, str]
    objects: Mapping[_RawId, Sequence[_Object]]
    finder: MentionFinder
    excluded: Counter[str]
    instances: Counter[str] = field(default_factory=Counter)
    named: set[str] = field(default_factory=set)

    def read(self, entry: tuple[_Id, Sequence[str], Sequence[object]]) -> Sample:
        """The sample of an image id, its possible file names below the images folder, and its captions."""
        image, names, texts = entry
        captions = kept_captions(texts, self.excluded)
        if image not in self.records:
            raise ExcludedError("image_without_record")
        record = self.records[image]
        file = read_image_file(self.images, names)
        upright = file.from_annotated((int(record["width"]), int(record["height"])))
        mentions = [self.finder.find(caption) for caption in captions]
        self.named.update(*mentions)
        regions: list[Region] = []
        seen: set[str] = set()
        for thing in self.objects.get(image, ()):
            with counting(self.excluded):
                category = thing["category_id"]
                if category not in self.labels:
                    raise ExcludedError("category_unknown")
                written = repr((thing["id"], category, thing.get("bbox"), thing.get("iscrowd")))
                if thing["id"] is not None and written in seen:
                    raise ExcludedError("annotation_twice")
                seen.add(written)
                box = upright.counted(thing.get("bbox"), self.excluded)
                crowd = str(thing.get("iscrowd")).lower() not in _NO_CROWD
                mask = None
                if box is not None and "segmentation" in thing:
                    with counting(self.excluded):
                        mask = read_mask(thing["segmentation"], upright, box)
                regions.append(self._region(self.labels[category], box, mentions, crowd, mask))
        annotated = {region.label for region in regions}
        for category in map(_id, record.get("not_exhaustive_category_ids", ())):
            if (label := self.labels.get(category, "")) in annotated:
                self.excluded["instances_not_exhaustive"] += 1
                regions.append(self._region(label, None, mentions))
        self.instances.update(region.label for region in regions)
        key = f"{image:012d}" if isinstance(image, int) else image
        return file.sample(key, self.source, captions, regions)

    def _region(
        self,
        label: str,
        box: Box | None,
        mentions: Sequence[Mapping[str, tuple[Span, ...]]],
        crowd: bool = False,
        mask: Mask | None = None,
    ) -> Region:
        spans = {index: found[label] for index, found in enumerate(mentions) if label in found}
        return Region(label, box, spans, crowd=crowd, mask=mask)
