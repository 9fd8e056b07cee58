"""Entries and their explanations as the explorer shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.commands.explain_pair import Explanation, PreparedEntry, frame_and_box, not_shown
from lightning_xai.commands.outputs import sums_of
from lightning_xai.report.explorer import ExplorerCaption, ExplorerItem, ExplorerReading

if TYPE_CHECKING:
    from lightning_xai.report.explorer.items import Frame

_OF_MANY = 512  # pixels of the longer side of a photo on a page of many


def explorer_item(prepared: PreparedEntry, explanations: Sequence[Explanation], *, small: bool = False) -> ExplorerItem:
    """Return an entry for `explorer_page`: its photo, its caption and those that it is compared with.

    Args:
        prepared: the entry.
        explanations: of it, at least one; each is a reading.
        small: reduce the photo, for a page of many.
    """
    frame, box = frame_and_box(prepared)
    photo, reduced = prepared.photo, 1.0
    if small and max(photo.shape) > _OF_MANY:
        reduced = _OF_MANY / max(photo.shape)
        size = max(1, round(reduced * photo.shape[1])), max(1, round(reduced * photo.shape[0]))
        photo = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
    captions = [
        ExplorerCaption(prepared.entry.caption, prepared.shown, [_own(prepared, each) for each in explanations])
    ]
    captions += [
        ExplorerCaption(other.text, other.shown, [_other(prepared, each, place) for each in explanations])
        for place, other in enumerate(prepared.against)
    ]
    return ExplorerItem(
        prepared.entry.image.name,
        photo,
        captions,
        frame=_times(frame, reduced),
        box=_times(box, reduced),
        asks_box=box is not None,
    )


def _times(edges: Frame | None, factor: float) -> Frame | None:
    if edges is None:
        return None
    x0, y0, x1, y1 = (factor * edge for edge in edges)
    return x0, y0, x1, y1


def _own(prepared: PreparedEntry, explanation: Explanation) -> ExplorerReading:
    """What a method says of the caption."""
    arrays, saliency = explanation.arrays, explanation.saliency
    target, text = explanation.record.get("target"), sums_of(arrays["text"], prepared.content)
    notes = [] if target is None else [f"{target['name']} {target['value']:+.3f}"]
    if "interactions" in arrays:  # why the sum of the map is not that of the words
        notes.append(not_shown(arrays, arrays["text"].sum() - text.sum()).rstrip("."))
    return ExplorerReading(
        saliency.method,
        saliency.where,
        sums_of(arrays["interactions"], prepared.content) if "interactions" in arrays else None,
        arrays["image"],
        text,
        saliency.similarity,
        saliency.completeness_error,
        saliency.scale,
        note=" \u00b7 ".join(notes),
    )


def _other(prepared: PreparedEntry, explanation: Explanation, place: int) -> ExplorerReading:
    """What a method says of the words of a caption that is compared with: what they add to the target."""
    arrays, saliency, other = explanation.arrays, explanation.saliency, prepared.against[place]
    pairs: NDArray[Any] | None = None
    image = arrays["image"]
    if "against_interactions" in arrays:
        image = arrays["against_interactions"][place].sum(axis=0)
        pairs = sums_of(arrays["against_interactions"][place], other.content)
    return ExplorerReading(
        saliency.method,
        saliency.where,
        pairs,
        image,
        sums_of(arrays["against_text"][place], other.content),
        arrays["against_similarity"][place].item(),
        scale=saliency.scale,
    )
