"""What every data set does alike with rows that cannot be used: they are counted by reason, and the rest goes on.

A function that finds something unusable raises `ExcludedError(reason)`; whoever can go on without it (without the
region, the caption or the whole image) catches and counts it. Reasons are words joined by `_` that begin with what is
left out, and each source's module text lists its own.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lightning_xai.data.sample import Sample

Entry = TypeVar("Entry")

_UNSAFE_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_KEY = 200
_HASH_DIGITS = 16


class ExcludedError(Exception):
    """A region, a caption or an image is left out; the message is the reason under which it is counted."""


@contextmanager
def counting(left_out: Counter[str]) -> Iterator[None]:
    """Go on behind a `ExcludedError`, and count its reason.

    >>> left_out = Counter()
    >>> for side in (2, 0):
    ...     with counting(left_out):
    ...         if not side:
    ...             raise ExcludedError("box_without_area")
    >>> left_out
    Counter({'box_without_area': 1})
    """
    try:
        yield
    except ExcludedError as reason:
        left_out[str(reason)] += 1


def usable_samples(
    entries: Iterable[Entry], build: Callable[[Entry], Sample], left_out: Counter[str], *, what: str, advice: str
) -> Iterator[Sample]:
    """The samples of all entries that can be used, in order; the others are counted.

    Args:
        entries: a data set's own description of its images, whatever it is.
        build: makes an entry's sample, or raises `ExcludedError`.
        left_out: reason -> count; filled while iterated. An entry with the key of an earlier sample is an
            `image_twice`.
        what: what an entry is, for the error where not one can be used ("image of 'val' in coco/val2014").
        advice: what to check in that case, as a sentence without full stop.

    Raises:
        ValueError: (at the end) no entry could be used.
    """
    keys: set[str] = set()
    for entry in entries:
        try:
            sample = build(entry)
        except ExcludedError as reason:
            left_out[str(reason)] += 1
            continue
        if sample.key in keys:
            left_out["image_twice"] += 1
            continue
        keys.add(sample.key)
        yield sample
    if not keys:
        raise ValueError(f"no {what} could be used; left out: {dict(+left_out) or 'nothing'}. {advice}")


def kept_captions(texts: Iterable[object], left_out: Counter[str]) -> tuple[str, ...]:
    """The captions without white space around them; those that are empty or no text count as `caption_empty`.

    Raises:
        ExcludedError: none is left (`image_without_caption`).
    """
    stripped = [text.strip() if isinstance(text, str) else "" for text in texts]
    captions = tuple(text for text in stripped if text)
    left_out["caption_empty"] += len(stripped) - len(captions)
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
