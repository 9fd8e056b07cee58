"""MS-CXR, chest radiographs with phrases of their reports and the boxes that radiologists drew, as it is published.

`MS_CXR_Local_Alignment_v1.1.0.json` (of COCO's form) and the `.csv` next to it hold the same annotations: a phrase, the
finding that it states and one box each. The images are MIMIC-CXR-JPG's, by their paths there.

Several boxes of one phrase are one target. So a caption is a phrase of the image, and each of its boxes is a region
that the whole caption names: the boxes that a caption names are together what its map should show. The region's label
is the finding; its `entity` is the phrase, as an image may have two phrases with the same finding. Where a box of a
phrase cannot be used, the whole phrase is excluded, as the rest would be another target.

Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (its path leaves the
  images folder, or is no text), `image_without_caption` (no phrase is left, or the .json has none), `image_twice` (the
  annotations of both count), `size_malformed` (no whole numbers, or its annotations contradict each other),
  `size_mismatch` (it is not the image that was annotated: it was made smaller);
- an annotation: `annotation_malformed` (a row with too few or too many fields; with too few, its phrase is incomplete),
  `annotation_of_unknown_image`, `annotation_without_split` (only where a split is asked for), `annotation_twice` (the
  same phrase, finding and box), `phrase_empty`;
- a phrase with all its boxes: `phrase_incomplete`, in addition to the reason for each box that could not be used:
  `category_unknown`, `box_malformed`, `box_without_area`, `box_outside_image`.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.sample import Region, Sample
from lightning_xai.data.sources.boxes import BoxTransform
from lightning_xai.data.sources.files import (
    check_path,
    joined_names,
    read_image_file,
    read_json,
    text_of,
    usable_samples,
)

_COLUMNS = ("path", "category_name", "label_text", "x", "y", "w", "h", "image_width", "image_height")
_ROOT = "files/"


@dataclass(frozen=True)
class _Annotation:
    """One box, as either file gives it; nothing but the path has been checked."""

    path: str
    size: tuple[Any, Any]
    phrase: object
    finding: object
    box: object
    split: object


def read_ms_cxr(
    *, images: Path, annotations: Path, split: str | None = None, excluded: Counter[str]
) -> Iterator[Sample]:
    """MS-CXR: phrases of radiology reports and the boxes that radiologists drew for each.

    Images come in the order of their first annotations. White space in phrases becomes single spaces: reports break
    lines within sentences. The .json and the .csv file give the same samples.

    Args:
        images: folder of MIMIC-CXR-JPG that holds files/ (or that folder itself), in the original resolution; other
            images are not the ones that were annotated, and are excluded.
        annotations: MS_CXR_Local_Alignment_v1.1.0.json or .csv.
        split: train, val, test, or several joined by "+" (from version 1.1.0 on); all annotations by default.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation files are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the file is broken or of another kind, the split is unknown, or (at the end) no image could be used.
    """
    check_path(images, "images", "folder", "the folder that holds MIMIC-CXR-JPG's files/")
    check_path(annotations, "annotations", "file", "the path of MS_CXR_Local_Alignment_v1.1.0.json or .csv")
    read = {".json": _read_json, ".csv": _read_csv}.get(annotations.suffix.lower())
    if read is None:
        raise ValueError(f"annotations: {annotations} is neither a .json nor a .csv file; give one of MS-CXR's two")
    found = read(annotations, excluded)
    if split is not None:
        there = {annotation.split for annotation in found if isinstance(annotation.split, str)}
        none = "" if there else " (it names none, as versions before 1.1.0)"
        advice = f"{none}; leave split out to take all of them"
        wanted = joined_names(split, there, f"annotations: {annotations} has no split", advice)
        paths = {annotation.path for annotation in found if annotation.split in wanted}
        unknown = [annotation for annotation in found if not isinstance(annotation.split, str)]
        excluded["annotation_without_split"] += len(unknown)
        # A phrase of these images that lacks the split has one box more than the others tell.
        found = [a for a in found if a.split in wanted or (a.path in paths and not isinstance(a.split, str))]
        found = [replace(a, box=None) if not isinstance(a.split, str) else a for a in found]
    by_image: dict[str, list[_Annotation]] = {}
    for annotation in found:
        by_image.setdefault(annotation.path, []).append(annotation)
    return usable_samples(
        by_image.values(),
        partial(_sample, images=images, source="ms-cxr" if split is None else f"ms-cxr/{split}", excluded=excluded),
        excluded,
        what=f"image of {annotations}",
        advice=f"Check that {images} holds MIMIC-CXR-JPG's images in their original resolution, by the paths that the "
        "file gives (files/p10/...)",
    )


# An image


def _sample(annotations: Sequence[_Annotation], images: Path, source: str, excluded: Counter[str]) -> Sample:
    path = annotations[0].path
    size = _annotated_size(annotations)
    file = read_image_file(images, (path, path.removeprefix(_ROOT)))
    upright = file.from_annotated(size)
    phrases: dict[str, list[_Annotation]] = {}
    for annotation in annotations:
        with counting(excluded):
            phrase = " ".join(text_of(annotation.phrase, "phrase_empty").split())
            phrases.setdefault(phrase, []).append(annotation)
    captions: list[str] = []
    regions: list[Region] = []
    for phrase, boxes in phrases.items():
        with counting(excluded):
            regions += _target(phrase, len(captions), boxes, upright, excluded)
            captions.append(phrase)
    if not captions:
        raise ExcludedError("image_without_caption")
    return file.sample(PurePosixPath(path).name.removesuffix(".jpg"), source, captions, regions)


def _annotated_size(annotations: Sequence[_Annotation]) -> tuple[int, int]:
    with excluded_as("size_malformed", (TypeError, ValueError, OverflowError)):
        stated = [found.size for found in annotations if None not in found.size]
        sizes = {(float(width), float(height)) for width, height in stated or [annotations[0].size]}
    width, height = sizes.pop()
    if sizes or not width.is_integer() or not height.is_integer():
        raise ExcludedError("size_malformed")
    return int(width), int(height)


def _target(
    phrase: str, caption: int, annotations: Sequence[_Annotation], upright: BoxTransform, excluded: Counter[str]
) -> list[Region]:
    """A region for each box of a phrase, which is the caption of that index."""
    spans = {caption: ((0, len(phrase)),)}
    regions: list[Region] = []
    for annotation in annotations:
        with counting(excluded):
            box = upright(annotation.box)
            regions.append(Region(text_of(annotation.finding, "category_unknown"), box, spans, entity=phrase))
    if len(regions) < len(annotations):
        raise ExcludedError("phrase_incomplete")
    distinct = [region for index, region in enumerate(regions) if region not in regions[:index]]
    excluded["annotation_twice"] += len(regions) - len(distinct)
    return distinct


# The two files


class _Image(msgspec.Struct):
    id: Any
    path: Any
    width: Any
    height: Any


class _Finding(msgspec.Struct):
    id: Any
    name: Any


class _Box(msgspec.Struct):
    image_id: Any
    category_id: Any
    bbox: Any
    label_text: Any
    split: Any = None


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Box]
    categories: list[_Finding]


def _read_json(path: Path, excluded: Counter[str]) -> list[_Annotation]:
    file = read_json(path, "annotations", _File, "MS-CXR's .json file")
    # Ids may be anything, also what has no hash.
    images = {repr(image.id): image for image in file.images if isinstance(image.path, str)}
    paths = {image.path for image in images.values()}
    used = {images[key].path for box in file.annotations if (key := repr(box.image_id)) in images}
    named = sum(isinstance(image.path, str) for image in file.images)
    excluded["image_name_unsafe"] += len(file.images) - named
    excluded["image_twice"] += named - len(paths)
    excluded["image_without_caption"] += len(paths - used)
    findings = {repr(finding.id): finding.name for finding in file.categories}
    annotations = []
    for box in file.annotations:
        image = images.get(repr(box.image_id))
        if image is None:
            excluded["annotation_of_unknown_image"] += 1
            continue
        finding, size = findings.get(repr(box.category_id)), (image.width, image.height)
        annotations.append(_Annotation(image.path, size, box.label_text, finding, box.bbox, box.split))
    return annotations


def _read_csv(path: Path, excluded: Counter[str]) -> list[_Annotation]:
    annotations = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"annotations: {path} has no column {missing[0]!r}; is it MS-CXR's .csv file? It has "
                    f"{rows.fieldnames}"
                )
            for row in rows:
                if None in row or None in row.values():  # more fields than the header, or fewer
                    excluded["annotation_malformed"] += 1
                    if None in row or row["path"] is None:
                        continue
                size = (row["image_width"], row["image_height"])
                box = [row[side] for side in "xywh"]
                split = row.get("split") or None
                annotations.append(_Annotation(row["path"], size, row["label_text"], row["category_name"], box, split))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"annotations: {path} is no CSV text ({error}); download it again") from error
    return annotations
