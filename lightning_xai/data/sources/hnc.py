"""HNC, the Hard Negative Captions of GQA's images, as its publishers ship them.

A file holds image ids -> `captions`: caption ids -> one caption made from the image's scene graph:

    "2370799": {"captions": {
      "0": {"caption": "The man is near the car.", "label": 1, "type": "relation_obj", "cpt_p_id": null,
            "replaced": null, "bboxes": {"1058498": {"name": "man", "bbox": {"x": 9, "y": 4, "w": 50, "h": 90}}, ...}},
      "1": {"caption": "The man is near the tree.", "label": 0, "type": "relation_obj", "cpt_p_id": 0,
            "replaced": ["car", "tree"], "bboxes": {...}}}}

True captions (label 1) become the sample's captions, and each object a region. Its name stands in them word for word,
so that its places are found by looking for whole words; of names within each other ("car", "car door") the longest
counts. Hard negatives (label 0) that replace one object's name become `HardNegative`s of their true caption.

Every object that any caption of the image mentions is a region, also where the caption itself is not taken: two of one
name are several instances. Objects that no caption mentions are known only from GQA's own scene graphs.

Accepted in addition to the published form, because versions of the data differ: the captions without `captions`
around them; `bboxes` as a list of `{"name", "bbox"}` or as names -> boxes; a box as `[x, y, w, h]` or with `width` and
`height`; numbers as text; `label` as true and false.

What cannot be used is counted by reason, and the rest goes on. Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (its id leaves the
  folder), `image_record_malformed`, `image_without_caption`, `size_mismatch` (it is not the image of the scene graph);
- a caption: `caption_malformed` (no text, label or type), `caption_of_other_type` (not one of those asked for);
- an object: `object_malformed` (no name);
- only the box of an object, which still counts as an instance of its name: `box_malformed` (or missing),
  `box_without_area`, `box_outside_image`;
- a hard negative: `negative_malformed` (without `replaced`), `negative_without_positive` (the true caption is not
  there), `negative_of_no_object` (it replaces an attribute, a relation or a number), `negative_of_several_objects`
  (the true caption names two by the replaced word), `negative_without_box`, `negative_differs_elsewhere` (the captions
  differ by more than the replacement and "is" or "are", which agree with it);
- only the other objects of an image: `scene_graph_missing` (it has none in the file).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.phrase_finder import find_phrases
from lightning_xai.data.sample import HardNegative, Region, Sample, Span
from lightning_xai.data.sources.boxes import BoxTransform
from lightning_xai.data.sources.files import (
    check_path,
    joined_names,
    read_image_file,
    read_json,
    text_of,
    usable_samples,
)

TRIPLETS = "relation_subj+relation_obj+relation_pred"
"""The types of "The <subject> is <predicate> the <object>." captions, which the papers use."""

# Where Visual Genome keeps its images, if they are not all in one folder as GQA ships them.
_SUBFOLDERS = ("", "VG_100K/", "VG_100K_2/")
_LABELS = {"1": True, "True": True, "0": False, "False": False}
_VERB = re.compile(r"\b(?:is|are)\b")


@dataclass(frozen=True)
class _Object:
    """A thing of an image: its key, its name, and the raw value of its box."""

    key: str
    name: str
    box: Any


class _Caption(msgspec.Struct):
    """A caption as the file has it; `bboxes` become `_Object`s."""

    caption: str
    type: str
    label: Any = None
    cpt_p_id: Any = None
    replaced: Any = None
    bboxes: Any = None

    @property
    def is_true(self) -> bool:
        return _LABELS[str(self.label)]


def read_hnc(
    *,
    images: Path,
    captions: Path,
    split: str,
    types: str = TRIPLETS,
    scene_graphs: Path | None = None,
    excluded: Counter[str],
) -> Iterator[Sample]:
    """HNC: captions made from GQA's scene graphs, and hard negatives that are wrong about one object.

    Images come in the order of the file, which is held in memory. Boxes are clipped to the image. With scene graphs,
    which state the annotated size, they are turned with an image that lies on its side by EXIF; without, they are taken
    as drawn on the upright image.

    Args:
        images: folder of GQA's image files (or of Visual Genome's, with its sub-folders).
        captions: the split's JSON file (hnc_clean_strict_val.json).
        split: name of the split.
        types: caption types to take, joined by "+", or all; the default are the "<subject> <predicate> <object>"
            captions of the papers. Hard negatives have the type of their true caption.
        scene_graphs: GQA's train_sceneGraphs.json or val_sceneGraphs.json. Only objects that are the single one of
            their class are measured; without this file, those that no caption mentions are not counted.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; the annotation files are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken or of another kind, a type does not occur in it, or (at the end) no image
            could be used.
    """
    check_path(images, "images", "folder", "the folder that holds the image files")
    records = read_json(captions, "captions", dict[str, Any], "HNC's JSON file of this split")
    graphs: dict[str, Any] = {}
    if scene_graphs is not None:
        graphs = read_json(scene_graphs, "scene_graphs", dict[str, Any], "GQA's JSON file of scene graphs")
    return usable_samples(
        records.items(),
        _HncReader(images, f"hnc/{split}", graphs, _wanted_types(records, types, captions), excluded).read,
        excluded,
        what=f"image of {captions}",
        advice=f"Check that it is HNC's file of the images in {images}",
    )


@dataclass(frozen=True)
class _HncReader:
    """Builds samples from the records of images; counts the captions, objects and negatives that it excludes."""

    images: Path
    source: str
    graphs: Mapping[str, Any]  # by image id; empty without a file of them
    types: Collection[str]
    excluded: Counter[str]

    def read(self, entry: tuple[str, Any]) -> Sample:
        """The sample of an image id and its record."""
        image_id, record = entry
        mentioned: dict[str, _Object] = {}
        found = self._captions(record, mentioned)
        taken = {key: caption for key, caption in found.items() if caption.type in self.types}
        self.excluded["caption_of_other_type"] += len(found) - len(taken)
        positives = {key: caption for key, caption in taken.items() if caption.is_true}
        if not positives:
            raise ExcludedError("image_without_caption")
        file = read_image_file(self.images, [f"{folder}{image_id}.jpg" for folder in _SUBFOLDERS])
        graph = self.graphs.get(image_id)
        if not isinstance(graph, Mapping):
            self.excluded["scene_graph_missing"] += bool(self.graphs)
            graph = {}
        things = {thing.key: thing for thing in self._objects(graph.get("objects"))}
        things |= {key: thing for key, thing in mentioned.items() if key not in things}
        captions = [caption.caption for caption in positives.values()]
        size: Any = (graph.get("width"), graph.get("height"))
        upright = file.from_annotated(size if all(isinstance(side, int) for side in size) else file.size)
        regions = self._regions(tuple(things.values()), captions, upright)
        negatives = self._negatives(taken, positives, regions)
        return file.sample(image_id, self.source, captions, regions.values(), negatives)

    def _captions(self, record: Any, things: dict[str, _Object]) -> dict[str, _Caption]:
        """The captions that can be used; `things` takes the objects of all of them, by key."""
        captions = _captions_of(record)
        if captions is None:
            raise ExcludedError("image_record_malformed")
        found = {}
        for key, value in captions.items():
            boxes = self._objects(value.get("bboxes")) if isinstance(value, Mapping) else []
            things.update({thing.key: thing for thing in boxes if thing.key not in things})
            with counting(self.excluded):
                with excluded_as("caption_malformed"):
                    caption = msgspec.convert(value, _Caption)
                if str(caption.label) not in _LABELS:
                    raise ExcludedError("caption_malformed")
                caption.caption = text_of(caption.caption, "caption_malformed")
                caption.bboxes = boxes
                found[key] = caption
        return found

    def _objects(self, boxes: Any) -> list[_Object]:
        things = []
        for key, value in _keyed(boxes):
            with counting(self.excluded):
                things.append(_object(key, value))
        return things

    def _regions(self, things: Sequence[_Object], captions: Sequence[str], upright: BoxTransform) -> dict[str, Region]:
        """Regions by the key of their object."""
        spans = _mentions({thing.name for thing in things}, captions)
        regions = {}
        for thing in things:
            box = upright.counted(_sides(thing.box), self.excluded)
            regions[thing.key] = Region(thing.name, box, spans.get(thing.name, {}))
        return regions

    def _negatives(
        self, taken: Mapping[str, _Caption], positives: Mapping[str, _Caption], regions: Mapping[str, Region]
    ) -> list[HardNegative]:
        """The wrong ones of `taken`; `regions` are the sample's, by key."""
        keys = list(positives)
        negatives = []
        for caption in taken.values():
            if not caption.is_true:
                with counting(self.excluded):
                    positive = str(caption.cpt_p_id)
                    if positive not in positives:
                        raise ExcludedError("negative_without_positive")
                    negatives.append(_negative(caption, positives[positive], keys.index(positive), regions))
        return negatives


def _negative(caption: _Caption, positive: _Caption, number: int, regions: Mapping[str, Region]) -> HardNegative:
    """The hard negative of a true caption, the sample's `number`-th."""
    with excluded_as("negative_malformed"):
        pair = msgspec.convert(caption.replaced, tuple[str, str])
    original, replacement = (text_of(word, "negative_malformed") for word in pair)
    if original == replacement:
        raise ExcludedError("negative_malformed")
    named = {thing.key for thing in positive.bboxes if thing.name == original}
    if len(named) != 1:
        raise ExcludedError("negative_of_several_objects" if named else "negative_of_no_object")
    (key,) = named
    if regions[key].box is None:
        raise ExcludedError("negative_without_box")
    true_span, span = _swapped(positive.caption, original, caption.caption, replacement)
    return HardNegative(caption.caption, span, number, true_span, list(regions).index(key))


def _swapped(true: str, original: str, wrong: str, replacement: str) -> tuple[Span, Span]:
    """The spans of the original and the replacement, if all else is the same but for "is" and "are".

    >>> _swapped("The man is near the car.", "man", "The men are near the car.", "men")
    ((4, 7), (4, 7))
    """
    for start, end in find_phrases(true, [original]):
        for other_start, other_end in find_phrases(wrong, [replacement]):
            before = _VERB.sub("is", true[:start]) == _VERB.sub("is", wrong[:other_start])
            if before and _VERB.sub("is", true[end:]) == _VERB.sub("is", wrong[other_end:]):
                return (start, end), (other_start, other_end)
    raise ExcludedError("negative_differs_elsewhere")


def _mentions(names: set[str], captions: Sequence[str]) -> dict[str, dict[int, tuple[Span, ...]]]:
    """The spans of each name, by the index of the caption."""
    found: dict[str, dict[int, tuple[Span, ...]]] = {}
    if names:
        for index, caption in enumerate(captions):
            for start, end in find_phrases(caption, sorted(names, key=len, reverse=True)):
                places = found.setdefault(caption[start:end], {})
                places[index] = (*places.get(index, ()), (start, end))
    return found


# Records


def _captions_of(record: Any) -> Mapping[str, Any] | None:
    captions = record.get("captions", record) if isinstance(record, Mapping) else None
    return captions if isinstance(captions, Mapping) else None


def _wanted_types(records: Mapping[str, Any], types: str, path: Path) -> Collection[str]:
    captions = (caption for record in records.values() for caption in (_captions_of(record) or {}).values())
    kinds = (caption.get("type") for caption in captions if isinstance(caption, Mapping))
    there = frozenset(kind for kind in kinds if isinstance(kind, str))
    if types == "all":
        return there
    advice = " ('all' takes every one). Is it HNC's file?"
    return joined_names(types, there, f"types: {path} has no captions of type", advice)


def _keyed(boxes: Any) -> Sequence[tuple[str | None, Any]]:
    if isinstance(boxes, Mapping):
        return list(boxes.items())
    if isinstance(boxes, list):
        return [(None, value) for value in boxes]
    return [] if boxes is None else [(None, boxes)]


def _object(key: str | None, value: Any) -> _Object:
    """An object from an entry of `bboxes`, or of a scene graph, where the box stands next to the name."""
    if isinstance(value, Mapping) and "name" in value:
        name, box = value["name"], value.get("bbox", value)
    else:
        name, box, key = key, value, None
    label = text_of(name, "object_malformed")
    # Without an id, the same name and box are the same object.
    return _Object(f"{name} {box}" if key is None else key, label, box)


def _sides(box: Any) -> Any:
    if isinstance(box, Mapping):
        return [box.get("x"), box.get("y"), box.get("w", box.get("width")), box.get("h", box.get("height"))]
    return box
