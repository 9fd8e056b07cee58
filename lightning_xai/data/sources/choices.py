"""Pairs of a true and a wrong caption, as benchmarks of compositionality have them, and samples with some.

Reasons for exclusion, of sources that use this

- a pair of captions: `choice_malformed` (a field is missing or of another type), `choice_caption_empty`,
  `choice_captions_equal`;
- an image: `image_without_choice`, and those of `read_image_file`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_xai.data.excluded import ExcludedError, counting
from lightning_xai.data.sample import Sample, WrongCaption
from lightning_xai.data.sources.files import ImageFile, text_of

__all__ = ["CaptionPair", "choice_sample", "usable_pairs"]


@dataclass(frozen=True)
class CaptionPair:
    """A true and a wrong caption of an image, and what is wrong."""

    true: str
    wrong: str
    kind: str


def usable_pairs(pairs: Iterable[CaptionPair], excluded: Counter[str]) -> list[CaptionPair]:
    """The pairs of an image without white space around captions; those that cannot be used are counted.

    Raises:
        ExcludedError: none is left (`image_without_choice`).
    """
    usable = []
    for pair in pairs:
        with counting(excluded):
            true, wrong = (text_of(text, "choice_caption_empty") for text in (pair.true, pair.wrong))
            if true == wrong:
                raise ExcludedError("choice_captions_equal")
            usable.append(CaptionPair(true, wrong, pair.kind))
    if not usable:
        raise ExcludedError("image_without_choice")
    return usable


def choice_sample(file: ImageFile, name: str, source: str, pairs: Sequence[CaptionPair]) -> Sample:
    """The sample of an image and its pairs, whose true captions become the sample's, each once."""
    captions = list(dict.fromkeys(pair.true for pair in pairs))
    wrong = tuple(WrongCaption(pair.wrong, captions.index(pair.true), pair.kind) for pair in pairs)
    return replace(file.sample(name, source, captions), wrong_captions=wrong)
