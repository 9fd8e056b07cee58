"""Heat maps of an evaluation to look at: the first ones, some of each class, and the worst."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.evaluation.rows import BOX_COLUMNS, places_of
from lightning_xai.results.examples import ExampleRecord

__all__ = ["Place", "choose_examples", "example_of", "jpeg_of"]

_QUALITY = 92

Place = tuple[int, int, str]
"""Index of a sample in its split, which of its captions, and the class that a phrase of it names."""


def example_of(
    target: Mapping[str, Any], gamma: float, hit: bool, heat: Sequence[Sequence[float]]
) -> tuple[Place, ExampleRecord]:
    """A phrase whose map may be shown, given its row of the table of targets and what was measured."""
    record = ExampleRecord(
        why=(),
        # Of a key only letters, digits, '_' and '-' stay.
        image=f"examples/{re.sub(r'[^A-Za-z0-9_-]', '_', target['key'])}.jpg",
        spans=places_of(target["caption"], target["phrase"]),
        box=tuple(target[side] for side in BOX_COLUMNS),
        gamma=None if math.isnan(gamma) else gamma,
        hit=hit,
        heat=tuple(map(tuple, heat)),
        **{name: target[name] for name in ("key", "caption", "phrase", "label")},
    )
    return (target["index"], target["caption_index"], target["label"]), record


def choose_examples(
    candidates: Iterable[tuple[Place, ExampleRecord]], fixed: int, per_class: int, failures: int
) -> dict[Place, ExampleRecord]:
    """Choose few of many, with the reasons ("fixed", "class", "failure"), in the order of the data.

    What is chosen of all is among what is chosen of any part: the parts can come in any order, from any process.

    Args:
        candidates: of several phrases at one place (things of one class in one caption) the worst stands for all.
        fixed: the first phrase of each of so many first images, whatever the model.
        per_class: the first so many phrases of each class, each of another image, whatever the model.
        failures: so many phrases of lowest gamma, each of another image.
    """
    at: dict[Place, ExampleRecord] = {}
    for place, record in sorted(candidates, key=_worst_first):
        at.setdefault(place, record)
    in_order = sorted(at)
    by_class: dict[str, list[Place]] = {}
    for place in in_order:
        by_class.setdefault(place[2], []).append(place)
    groups = [("fixed", fixed, in_order), *(("class", per_class, own) for own in by_class.values())]
    groups.append(("failure", failures, list(at)))
    reasons: dict[Place, tuple[str, ...]] = {}
    for why, most, places in groups:
        of_image: dict[int, Place] = {}
        for place in places:
            if len(of_image) < most:
                of_image.setdefault(place[0], place)
        for place in of_image.values():
            reasons[place] = (*reasons.get(place, ()), why)
    return {place: msgspec.structs.replace(at[place], why=reasons[place]) for place in sorted(reasons)}


def jpeg_of(picture: NDArray[np.floating]) -> bytes:
    """A picture as the model saw it, [h, w, 3] in [0, 1], as a JPEG file."""
    buffer = io.BytesIO()
    levels = (picture * 255).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def _worst_first(candidate: tuple[Place, ExampleRecord]) -> tuple[float, Place]:
    """Sorts by gamma, of which none (nothing positive in the map) is the worst, and at equal gammas by place."""
    place, record = candidate
    return -1.0 if record.gamma is None else record.gamma, place
