"""Heat maps of an evaluation to look at: the first ones, some of each class, and the worst.

Shape suffixes: H x W pixels, h x w patches.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.evaluation.rows import BOX_COLUMNS, places_of
from lightning_xai.results.examples import ExampleRecord, write_examples

__all__ = ["Candidate", "ExampleGallery", "Shown", "write_gallery"]

Pixels = NDArray[np.uint8]
_QUALITY = 92


@dataclass(frozen=True)
class Candidate:
    """A phrase whose map may be shown.

    Attributes:
        index: of the sample in its split.
        caption_index: which of its captions.
        label: the class that the phrase names.
        gamma: NaN where the map has nothing positive, which counts as the worst.
        record: what else an `ExampleRecord` holds but for why and image; plain values.
    """

    index: int
    caption_index: int
    label: str
    gamma: float
    record: dict[str, Any] = field(compare=False, hash=False)

    @classmethod
    def of(cls, target: Mapping[str, Any], gamma: float, hit: bool, heat: Sequence[Sequence[float]]) -> Candidate:
        """A phrase, given its row of the table of targets and what was measured."""
        record = {name: target[name] for name in ("key", "caption", "phrase")}
        record |= {"spans": places_of(target["caption"], target["phrase"]), "hit": hit, "heat": tuple(map(tuple, heat))}
        record |= {"box": tuple(target[side] for side in BOX_COLUMNS)}
        return cls(target["index"], target["caption_index"], target["label"], gamma, record)

    @property
    def place(self) -> tuple[int, int, str]:
        """Its place in the data."""
        return self.index, self.caption_index, self.label


@dataclass(frozen=True)
class Shown:
    """An example that was chosen: the reasons, the phrase, and its picture [H, W, 3]."""

    why: tuple[str, ...]
    candidate: Candidate
    pixels: Pixels


class ExampleGallery:
    """Keeps few candidates of many; which ones depends neither on the order in which they come nor on the rank.

    What is chosen of all is among what each process has kept of its part.

    Args:
        fixed: the first phrase of each of so many first images, whatever the model.
        per_class: the first so many phrases of each class, each of another image, whatever the model.
        failures: so many phrases of lowest gamma, each of another image.
    """

    def __init__(self, fixed: int, per_class: int, failures: int) -> None:
        self._numbers = (fixed, per_class, failures)
        self._kept: dict[tuple[int, int, str], Candidate] = {}
        self._pixels: dict[int, Pixels] = {}

    def add(self, candidates: Iterable[Candidate], pixels: Callable[[int], Pixels]) -> None:
        """Consider candidates.

        Args:
            candidates: of some samples.
            pixels: the index of one of these samples to its picture [H, W, 3]; called for what is kept only.
        """
        everything: dict[tuple[int, int, str], Candidate] = {}
        for candidate in sorted([*self._kept.values(), *candidates], key=_badness):
            # Of several phrases at one place (things of one class in one caption) the worst stands for all.
            everything.setdefault(candidate.place, candidate)
        chosen = self.choose(everything.values())
        self._kept = {place: everything[place] for place in chosen}
        indices = {candidate.index for candidate in self._kept.values()}
        self._pixels = {index: self._pixels[index] if index in self._pixels else pixels(index) for index in indices}

    @property
    def kept(self) -> list[tuple[Candidate, Pixels]]:
        """The candidates of this process with their pictures."""
        return [(candidate, self._pixels[candidate.index]) for candidate in self._kept.values()]

    def shown(self, parts: Iterable[Iterable[tuple[Candidate, Pixels]]]) -> list[Shown]:
        """Choose from what the galleries of all processes have `kept`."""
        by_place = {candidate.place: (candidate, pixels) for part in parts for candidate, pixels in part}
        chosen = self.choose(candidate for candidate, _ in by_place.values())
        return [Shown(why, *by_place[place]) for place, why in chosen.items()]

    def choose(self, candidates: Iterable[Candidate]) -> dict[tuple[int, int, str], tuple[str, ...]]:
        """Choose the places to show, each with its reasons ("fixed", "class", "failure"), in the order of the data."""
        fixed, per_class, failures = self._numbers
        in_order = sorted(candidates, key=lambda candidate: candidate.place)
        labels = dict.fromkeys(candidate.label for candidate in in_order)
        worst = sorted(in_order, key=_badness)
        groups = [("fixed", _first_of_each_image(in_order, fixed))]
        for label in labels:
            own = [candidate for candidate in in_order if candidate.label == label]
            groups.append(("class", _first_of_each_image(own, per_class)))
        groups.append(("failure", _first_of_each_image(worst, failures)))
        reasons: dict[tuple[int, int, str], tuple[str, ...]] = {}
        for why, group in groups:
            for candidate in group:
                reasons[candidate.place] = (*reasons.get(candidate.place, ()), why)
        return dict(sorted(reasons.items()))


def write_gallery(out: Path, shown: Mapping[str, Sequence[Shown]]) -> None:
    """Write `METHOD/examples.json` for each method, and all pictures.

    Args:
        out: the result folder.
        shown: label of a method -> examples.
    """
    for label, examples in shown.items():
        write_examples(out / label, [_record(example) for example in examples])
    pictures = {_picture(example): example.pixels for examples in shown.values() for example in examples}
    for name, pixels in pictures.items():
        # Always written again: an earlier run in this folder may have been of a model that sees another size.
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
        with replaced_at_once(out / name) as part:
            part.write_bytes(buffer.getvalue())


def _record(example: Shown) -> ExampleRecord:
    candidate = example.candidate
    return ExampleRecord(
        why=example.why,
        image=_picture(example),
        label=candidate.label,
        gamma=None if math.isnan(candidate.gamma) else candidate.gamma,
        **candidate.record,
    )


def _picture(example: Shown) -> str:
    """The file of a sample's picture; of its key only letters, digits, '_' and '-' stay."""
    return f"examples/{re.sub(r'[^A-Za-z0-9_-]', '_', example.candidate.record['key'])}.jpg"


def _badness(candidate: Candidate) -> float:
    """Smaller is worse."""
    return -1.0 if math.isnan(candidate.gamma) else candidate.gamma


def _first_of_each_image(candidates: Iterable[Candidate], most: int) -> list[Candidate]:
    chosen: dict[int, Candidate] = {}
    for candidate in candidates:
        if len(chosen) == most:
            break
        chosen.setdefault(candidate.index, candidate)
    return list(chosen.values())
