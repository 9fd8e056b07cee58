"""Entries of any data set that cannot be used are counted by reason, and the rest goes on.

A function that finds something unusable raises `ExcludedError(reason)`; the caller that can go on without it (without
the region, the caption or the whole image) counts it. Reasons are words joined by `_` that begin with what is excluded,
and each source's module text lists its reasons.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lightning_xai.data.excluded import ExcludedError, counting
from lightning_xai.data.sample import Sample

Entry = TypeVar("Entry")

_UNSAFE_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_KEY = 200
_HASH_DIGITS = 16


def usable_samples(
    entries: Iterable[Entry], build: Callable[[Entry], Sample], excluded: Counter[str], *, what: str, advice: str
) -> Iterator[Sample]:
    """The samples of all entries that can be used, in order; the others are counted.

    Args:
        entries: a data set's own description of its images, whatever it is.
        build: makes an entry's sample, or raises `ExcludedError`.
        excluded: reason -> count; filled while iterated. An entry with the key of an earlier sample is an
            `image_twice`.
        what: what an entry is, for the error where not one can be used ("image of 'val' in coco/val2014").
        advice: what to check in that case, as a sentence without full stop.

    Raises:
        ValueError: (at the end) no entry could be used.
    """
    keys: set[str] = set()
    for entry in entries:
        with counting(excluded):
            sample = build(entry)
            if sample.key in keys:
                raise ExcludedError("image_twice")
            keys.add(sample.key)
            yield sample
    if not keys:
        raise ValueError(f"no {what} could be used; excluded: {dict(+excluded) or 'nothing'}. {advice}")


def kept_captions(texts: Iterable[object], excluded: Counter[str]) -> tuple[str, ...]:
    """The captions without white space around them; those that are empty or no text count as `caption_empty`.

    Raises:
        ExcludedError: none is left (`image_without_caption`).
    """
    stripped = [text.strip() if isinstance(text, str) else "" for text in texts]
    captions = tuple(text for text in stripped if text)
    excluded["caption_empty"] += len(stripped) - len(captions)
    if not captions:
        raise ExcludedError("image_without_caption")
    return captions


def key_from(name: str) -> str:
    """A sample's key from any name of its image: the name itself where it is a key, else one that stays distinct.

    >>> key_from("p10_s50414267-a")
    'p10_s50414267-a'
    >>> key_from("airport/1.tif")
    'airport_1_tif-af4ce3b6e153838e'
    """
    key = _UNSAFE_IN_KEYS.sub("_", name)
    if key == name and 0 < len(name) <= _LONGEST_KEY:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{key[: _LONGEST_KEY - _HASH_DIGITS - 1]}-{digest}"
