"""Flickr30k with the boxes of Flickr30k Entities, as its publishers ship them.

The annotators marked in every sentence which words name something, and gave all words that name the same thing of an
image one number (a chain): `[/EN#283585/people A young white boy] with [/EN#283589/bodyparts short hair]`. Boxes belong
to chains. So a region's `entity` is its chain, and each chain with exactly one box is measured, also where the image
shows several of the same kind; its `label`, by which tables group, is the chain's type: people, bodyparts, clothing,
animals, vehicles, instruments, scene or other.

What cannot be used is counted by reason, and the rest goes on; only input that makes no sense at all (a missing folder,
an unknown split) is an error. Reasons for exclusion

- an image: `image_missing`, `image_unreadable`, `image_does_not_decode`, `image_name_unsafe` (its id leaves the
  folder), `image_without_caption`, `image_twice`, `sentences_missing`, `sentences_unreadable`, `size_mismatch` (it is
  not the image that was annotated);
- a caption: `caption_empty`, `caption_markup_malformed`, `caption_unrelated` (only where that is asked for);
- a phrase (its caption stays): `phrase_notvisual`, `phrase_scene` (the whole image), `phrase_no_box`,
  `phrase_not_annotated` (the annotation has no usable box of its chain and does not say why);
- a region: `box_of_unmentioned_chain`, `object_malformed` (it names no chain);
- only the box of a region, which still counts as an instance of its chain: `box_malformed` (or missing: also where
  the annotation says that a chain has none, and another object boxes it), `box_without_area`, `box_outside_image`;
- all regions of an image, which stays with its captions: `annotation_missing`, `annotation_unreadable`,
  `annotation_malformed` (no XML of this form; also any XML with a DTD, which could be a trap).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from lightning_xai.data.excluded import ExcludedError, counting, excluded_as
from lightning_xai.data.sample import Box, Region, Sample, Span
from lightning_xai.data.sources.boxes import BoxTransform, parse_box
from lightning_xai.data.sources.files import check_path, is_safe_name, joined_names, read_image_file, usable_samples
from lightning_xai.data.sources.karpathy import KarpathyImage, read_karpathy

# [/EN#<chain>/<type>/.../<type> <words>]
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\[\]]+)+)\s([^\[\]]*)\]")
_NOT_VISUAL = "notvisual"
_UNRELATED = "UNRELATED_CAPTIONS"


@dataclass(frozen=True)
class Phrase:
    """Words of a sentence that name something.

    Attributes:
        chain: number of what they name; "0" where that cannot be seen.
        types: its kinds, at least one.
        span: characters `(start, end)` of the sentence.
    """

    chain: str
    types: tuple[str, ...]
    span: Span


@dataclass
class _Annotation:
    """The content of one XML file: the annotated size, instances by chain, and the chains that have no box.

    The box of an instance is None where it cannot be used.
    """

    size: tuple[int, int] | None = None
    instances: list[tuple[str, Box | None]] = field(default_factory=list)
    scenes: set[str] = field(default_factory=set)
    without_box: set[str] = field(default_factory=set)


def read_flickr30k(
    *,
    images: Path,
    entities: Path,
    split: str,
    karpathy: Path | None = None,
    exclude_unrelated: bool = False,
    excluded: Counter[str],
) -> Iterator[Sample]:
    """Flickr30k with the boxes of Flickr30k Entities: five captions an image, phrases marked by hand.

    Images come in the order of the split list (or of Karpathy's file). Captions are the annotated sentences without
    their markup, as the publishers tokenised them ("a man 's arm"), also with Karpathy's split: the phrases are places
    in these. Every box becomes one region for each chain that it belongs to. Where the phrases of a chain have several
    types, the most frequent one is its label, of equals the first.

    Boxes count pixels from 1 and include both ends: `xmin` 1 and `xmax` 5 are the 5 pixels from x = 0. They are turned
    with the image where EXIF says that it lies on its side, and clipped to it.

    Args:
        images: folder of the image files (flickr30k-images).
        entities: folder of Flickr30k Entities: Sentences/ and Annotations/ (unpack annotations.zip there), with
            train.txt, val.txt and test.txt.
        split: train, val, test, or several joined by "+".
        karpathy: dataset_flickr30k.json of the Karpathy splits, instead of the lists; captions are those of Entities.
        exclude_unrelated: exclude the captions that UNRELATED_CAPTIONS lists.
        excluded: filled while iterated: reason (see the module's text) -> count.

    Returns:
        An iterator of samples; lists of images and captions are read and checked before it is returned.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken or of another kind, the split is unknown, or (at the end) no image could be used.
    """
    check_path(images, "images", "folder", "the folder that holds the image files")
    for name in ("Sentences", "Annotations"):
        what = f"the folder of Flickr30k Entities, with {name}/ (unpack annotations.zip there)"
        check_path(entities / name, "entities", "folder", what)
    if karpathy is None:
        ids = _listed(entities, split)
    else:
        ids = [image.filename.removesuffix(".jpg") for image in read_karpathy(karpathy, split, KarpathyImage)]
    unrelated = _read_unrelated(entities) if exclude_unrelated else frozenset()
    return usable_samples(
        ids,
        _Flickr30kReader(images, entities, f"flickr30k/{split}", unrelated, excluded).read,
        excluded,
        what=f"image of {split!r} in {images}",
        advice=f"Check that the images and the annotations in {entities} belong together",
    )


def parse_sentence(line: str) -> tuple[str, tuple[Phrase, ...]]:
    """A sentence without its markup, and the phrases that were marked in it.

    >>> text, phrases = parse_sentence("[/EN#1/people/other A boy] with [/EN#2/bodyparts short hair] .")
    >>> text
    'A boy with short hair .'
    >>> [(phrase.chain, phrase.types, text[slice(*phrase.span)]) for phrase in phrases]
    [('1', ('people', 'other'), 'A boy'), ('2', ('bodyparts',), 'short hair')]

    Raises:
        ValueError: a bracket is left over, or a phrase has no words: the markup is not as published.
    """
    line = line.strip()
    text, *marked = _PHRASE.split(line)
    phrases = []
    for chain, types, words, after in zip(*(marked[group::4] for group in range(4)), strict=True):
        words = words.strip()
        if not words:
            raise ValueError(f"the phrase of chain {chain} has no words in {line!r}")
        phrases.append(Phrase(chain, tuple(types[1:].split("/")), (len(text), len(text) + len(words))))
        text += words + after
    if "[" in text or "]" in text:
        raise ValueError(f"a bracket is left over in {line!r}")
    return text, tuple(phrases)


@dataclass(frozen=True)
class _Flickr30kReader:
    """Builds samples from image ids; counts the captions, phrases and regions that it excludes."""

    images: Path
    entities: Path
    source: str
    unrelated: frozenset[tuple[str, int]]
    excluded: Counter[str]

    def read(self, image_id: str) -> Sample:
        """The image's sample."""
        if not is_safe_name(image_id):
            raise ExcludedError("image_name_unsafe")
        sentences = self._sentences(image_id)
        file = read_image_file(self.images, (f"{image_id}.jpg",))
        annotation = _Annotation()
        with counting(self.excluded):
            annotation = self._parse(_read_xml(self.entities / "Annotations" / f"{image_id}.xml"))
        upright = file.from_annotated(annotation.size or file.size)
        captions, phrases = zip(*sentences, strict=True)
        return file.sample(image_id, self.source, captions, self._regions(annotation, phrases, upright))

    def _sentences(self, image_id: str) -> list[tuple[str, tuple[Phrase, ...]]]:
        path = self.entities / "Sentences" / f"{image_id}.txt"
        unreadable = excluded_as("sentences_unreadable", (OSError, ValueError))
        with unreadable, excluded_as("sentences_missing", FileNotFoundError):
            lines = path.read_bytes().decode().split("\n")
        while lines and not lines[-1].strip():  # the end of the file is no caption
            lines.pop()
        sentences = []
        for number, line in enumerate(lines, start=1):
            with counting(self.excluded):
                if not line.strip():
                    raise ExcludedError("caption_empty")
                if (image_id, number) in self.unrelated:
                    raise ExcludedError("caption_unrelated")
                with excluded_as("caption_markup_malformed"):
                    sentences.append(parse_sentence(line))
        if not sentences:
            raise ExcludedError("image_without_caption")
        return sentences

    def _parse(self, root: ElementTree.Element) -> _Annotation:
        with excluded_as("annotation_malformed"):
            size = int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))
        annotation = _Annotation(size)
        for thing in root.findall("object"):
            chains = [name.text.strip() for name in thing.findall("name") if name.text and name.text.strip()]
            self.excluded["object_malformed"] += not chains
            corners, is_flagged = thing.find("bndbox"), False
            for name, flagged in (("scene", annotation.scenes), ("nobndbox", annotation.without_box)):
                if thing.findtext(name, "").strip() == "1":
                    flagged.update(chains)
                    is_flagged = True
            if corners is not None or not is_flagged:
                box = None
                with counting(self.excluded):
                    box = _voc_box(corners)
                annotation.instances += [(chain, box) for chain in chains]
        return annotation

    def _regions(
        self, annotation: _Annotation, phrases: Sequence[Sequence[Phrase]], upright: BoxTransform
    ) -> list[Region]:
        instances = annotation.instances
        boxed = {chain for chain, box in instances if box is not None}
        # What has a box here and none there is seen more than once.
        unboxed = sorted(boxed & annotation.without_box)
        self.excluded["box_malformed"] += len(unboxed)
        instances = [*instances, *((chain, None) for chain in unboxed)]
        reasons = dict.fromkeys(annotation.without_box, "phrase_no_box")
        reasons |= dict.fromkeys(annotation.scenes, "phrase_scene")
        spans: dict[str, dict[int, tuple[Span, ...]]] = {}
        types: dict[str, Counter[str]] = {}  # of the chains that can be seen
        for caption, phrase in ((caption, phrase) for caption, found in enumerate(phrases) for phrase in found):
            places = spans.setdefault(phrase.chain, {})
            places[caption] = (*places.get(caption, ()), phrase.span)
            if not phrase.chain.strip("0") or _NOT_VISUAL in phrase.types:
                self.excluded["phrase_notvisual"] += 1
                continue
            types.setdefault(phrase.chain, Counter()).update(phrase.types)
            if phrase.chain not in boxed:
                self.excluded[reasons.get(phrase.chain, "phrase_not_annotated")] += 1
        regions = []
        for chain, box in instances:
            with counting(self.excluded):
                if chain not in types:
                    raise ExcludedError("box_of_unmentioned_chain")
                # The most frequent type; of equals the one that comes first.
                label = types[chain].most_common(1)[0][0]
                usable = None if box is None else upright.counted(box, self.excluded)
                regions.append(Region(label, usable, spans[chain], entity=chain))
        return regions


# Annotations


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a document type: it could define entities that grow without end, or name other files."""

    def doctype(self, *args: object) -> NoReturn:
        raise ExcludedError("annotation_malformed")


def _read_xml(path: Path) -> ElementTree.Element:
    with excluded_as("annotation_unreadable", OSError), excluded_as("annotation_missing", FileNotFoundError):
        data = path.read_bytes()
    parser = ElementTree.XMLParser(target=_WithoutDoctype())  # noqa: S314 - without document type, so without entities
    # LookupError: an encoding that does not exist.
    with excluded_as("annotation_malformed", (ElementTree.ParseError, ValueError, LookupError)):
        parser.feed(data)
        root: ElementTree.Element = parser.close()
    return root


def _voc_box(corners: ElementTree.Element | None) -> Box:
    """`(x, y, width, height)` of a box whose corners are pixels counted from 1, both included."""
    if corners is None:
        raise ExcludedError("box_malformed")
    with excluded_as("box_malformed"):
        left, top, right, bottom = (float(corners.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
    return parse_box((left - 1, top - 1, right - left + 1, bottom - top + 1))


# Lists


def _listed(entities: Path, split: str) -> list[str]:
    """The image ids of the publishers' lists."""
    there = {path.stem for path in entities.glob("*.txt")}
    advice = ". Flickr30k Entities comes with train.txt, val.txt and test.txt"
    names = joined_names(split, there, f"split: {entities} has no .txt list of the image ids of", advice)
    return [image_id for name in names for image_id in _lines(entities / f"{name}.txt")]


def _read_unrelated(entities: Path) -> frozenset[tuple[str, int]]:
    """Image ids and sentence numbers (from 1) of the captions that the publishers found to be of another image."""
    path = entities / _UNRELATED
    check_path(path, "entities", "file", "the file that lists the captions to exclude")
    found = set()
    for line in _lines(path):
        if not line.startswith("#"):
            image_id, _, number = line.partition(" ")
            if not number.strip().isdecimal():
                raise ValueError(f"{path}: {line!r} is no image id with a sentence number; download the file again")
            found.add((image_id, int(number)))
    return frozenset(found)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); download it again") from error
    return [line.strip() for line in text.split("\n") if line.strip()]
