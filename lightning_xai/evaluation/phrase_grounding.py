"""Gamma and rho of a batch's phrases, and the table rows that tell of each phrase.

Shape suffixes: R phrases of the batch, M of them that can be measured, H x W the patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai.data.batch import Batch
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import GroundingSummary, gamma, measurable, patch_mask, rho

__all__ = [
    "BOX",
    "PhraseGrounding",
    "class_rows",
    "ground_phrases",
    "grounding_rows",
    "image_size",
    "measurable_rows",
    "places_of",
]

BOX = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class PhraseGrounding:
    """What was measured of a batch's phrases.

    Attributes:
        reason: [R] int64, `Exclusion`, on the CPU.
        rows: [M] int64, the phrases whose data allow to measure, on the CPU.
        maps: [M, H, W], their maps.
        masks: [M, H, W] bool, the patches of their boxes.
        gammas: [R] float64 on the CPU; NaN where not measured.
        hits: [R] bool on the CPU; False where not measured.
    """

    reason: Tensor
    rows: Tensor
    maps: Tensor
    masks: Tensor
    gammas: Tensor
    hits: Tensor


def measurable_rows(batch: Batch, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The reason of each phrase [R], with the size of its box considered, and the rows that can be measured [M]."""
    reason = measurable(batch.phrases.reason, batch.phrases.boxes, grid, image_size(batch))
    return reason, (reason == Exclusion.MEASURED).nonzero()[:, 0]


def ground_phrases(batch: Batch, grid: tuple[int, int], maps_of: Callable[[Tensor], Tensor]) -> PhraseGrounding:
    """Measure the phrases of a batch.

    Args:
        batch: of an evaluation.
        grid: (H, W).
        maps_of: rows of phrases [M] to their maps [M, H, W]; not called where there are none.

    Raises:
        ValueError: an attribution is not finite.
    """
    reason, rows = measurable_rows(batch, grid)
    gammas = torch.full(reason.shape, math.nan, dtype=torch.float64)
    hits = torch.zeros(reason.shape, dtype=torch.bool)
    maps = maps_of(rows) if len(rows) else torch.zeros(0, *grid, device=reason.device)
    masks = patch_mask(batch.phrases.boxes[rows], grid, image_size(batch))
    if len(rows):
        gammas[rows.cpu()] = gamma(maps, masks).to(gammas)
        hits[rows.cpu()] = rho(maps, masks).cpu()
    return PhraseGrounding(reason.cpu(), rows.cpu(), maps, masks, gammas, hits)


def image_size(batch: Batch) -> tuple[int, int]:
    """(height, width) in pixels of the batch's images."""
    return batch.images.shape[2], batch.images.shape[3]


def grounding_rows(batch: Batch, found: PhraseGrounding) -> list[dict[str, object]]:
    """One table row for each phrase: where it stands, gamma and hit or why there are none, and its box."""
    phrases = batch.phrases
    no_positive = (found.reason == Exclusion.MEASURED) & found.gammas.isnan()
    reasons = found.reason.masked_fill(no_positive, int(Exclusion.NO_POSITIVE)).tolist()
    caption_index = [*batch.caption_index.tolist(), -1]
    index = batch.index.tolist()
    columns = zip(
        phrases.image_row.tolist(),
        phrases.caption_row.tolist(),
        phrases.text,
        phrases.label.tolist(),
        reasons,
        found.gammas.tolist(),
        found.hits.tolist(),
        phrases.boxes.tolist(),
        strict=True,
    )
    rows: list[dict[str, object]] = []
    for image, caption, text, label, why, share, hit, box in columns:
        measured = why == Exclusion.MEASURED
        rows.append(
            {
                "index": index[image],
                "key": batch.keys[image],
                "caption_index": caption_index[caption],
                "caption": batch.captions[caption] if caption >= 0 else None,
                "phrase": text,
                "label": batch.label_names[label],
                "reason": Exclusion(why).name.lower(),
                "gamma": share if measured else None,
                "hit": hit if measured else None,
                **dict(zip(BOX, box, strict=True)),
            }
        )
    return rows


def class_rows(summary: GroundingSummary) -> list[dict[str, object]]:
    """One table row for each class: its grounding, and a column for each reason of what was left out."""
    return [
        {"label": label}
        | {name: value for name, value in vars(found).items() if name != "left_out"}
        | {f"left_out_{why}": count for why, count in found.left_out.items()}
        for label, found in summary.per_class.items()
    ]


def places_of(caption: str, phrase: str) -> tuple[tuple[int, int], ...]:
    """Where the words of a phrase (several mentions joined by a comma) stand in a caption, to highlight them.

    >>> places_of("a dog and a dog", "dog, dog")
    ((2, 5), (12, 15))
    """
    places, start = [], 0
    for words in phrase.split(", "):
        at = caption.find(words, start)
        if at >= 0:
            places.append((at, at + len(words)))
            start = at + len(words)
    return tuple(places)
