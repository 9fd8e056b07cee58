"""Which heat maps of an evaluation are kept to look at: the first ones, some of each class, and the worst.

Shape suffixes: H x W pixels, h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidate", "ExampleGallery"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Candidate:
    """A phrase whose map may be shown.

    Attributes:
        index: of the sample in its split.
        caption_index: which of its captions.
        label: the class that the phrase names.
        gamma: NaN where the map has nothing positive, which counts as the worst.
        record: what an `ExampleRecord` holds beside why and image; plain values.
    """

    index: int
    caption_index: int
    label: str
    gamma: float
    record: dict[str, Any] = field(compare=False, hash=False)

    @property
    def place(self) -> tuple[int, int, str]:
        """Where it stands in the data."""
        return self.index, self.caption_index, self.label


class ExampleGallery:
    """Keeps few candidates of many; which ones does not depend on the order in which they come, nor on the rank.

    What is chosen of all is among what each process has kept of its own part.

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
    def kept(self) -> list[Candidate]:
        """The candidates of this process."""
        return list(self._kept.values())

    def pixels(self, index: int) -> Pixels | None:
        """The picture of a sample, where this process has it."""
        return self._pixels.get(index)

    def choose(self, candidates: Iterable[Candidate]) -> dict[tuple[int, int, str], tuple[str, ...]]:
        """Which places are shown, and why: "fixed", "class" and "failure", in the order of the data."""
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
