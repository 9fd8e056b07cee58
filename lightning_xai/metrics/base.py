"""What a metric is: a pure function from the tensors of some targets to numbers, and a description of these numbers.

A metric knows neither data sets nor models. The evaluation groups what it attributed into targets of a kind, hands
their tensors over, and writes what comes back into the long table of results.

Shape suffixes: M targets, H x W the patch grid, h x w pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_xai.results.record import MetricRecord, Score

__all__ = ["CaptionTargets", "Kind", "MetricSpec", "NegativeTargets", "PhrasePairTargets", "PhraseTargets"]

Kind = Literal["phrase", "phrase_pair", "negative", "caption"]


@dataclass(frozen=True)
class PhraseTargets:
    """Phrases of captions, each with the box of the one object that it names.

    Attributes:
        maps: [M, H, W], the phrase's map.
        masks: [M, H, W] bool, the patches of the box.
        signed: whether the maps distinguish for from against.
    """

    maps: Tensor
    masks: Tensor
    signed: bool


@dataclass(frozen=True)
class PhrasePairTargets:
    """Ordered pairs of phrases of one caption that name different classes.

    Attributes:
        maps: [M, H, W], the map of the first phrase.
        masks: [M, H, W] bool, the patches of its own box.
        other_masks: [M, H, W] bool, the patches of the other phrase's box.
    """

    maps: Tensor
    masks: Tensor
    other_masks: Tensor


@dataclass(frozen=True)
class NegativeTargets:
    """Hard negatives: captions in which one object's name was replaced.

    Attributes:
        true_maps: [M, H, W], of the true words in the true caption.
        replacement_maps: [M, H, W], of the words that replace them, in the wrong caption.
        masks: [M, H, W] bool, the patches of the true object's box.
    """

    true_maps: Tensor
    replacement_maps: Tensor
    masks: Tensor


@dataclass(frozen=True)
class CaptionTargets:
    """Whole captions with their images.

    Attributes:
        image_maps: [M, H, W], how much each patch adds to the similarity with the caption.
        text_maps: [M, L], how much each token adds.
        content: [M, L] bool, the tokens that are words, not marks or padding.
        similarity: [M], the cosine similarity of image and caption.
        boxes: [N, 4] boxes of all objects that a caption names, (x0, y0, x1, y1) in pixels.
        box_owner: [N] int64, the target that a box belongs to.
        image_size: (h, w) in pixels.
        signed: whether the maps distinguish for from against.
        similarity_of_images: how much of each pixel to keep, [M, h, w] in [0, 1], for a slice of the targets, and what
            is seen elsewhere ("zeros" or "black") -> their similarity [M] with the caption.
        similarity_of_texts: which tokens to keep, [M, L] bool -> the captions' similarity [M] with the image, with
            padding in place of all other tokens.
        batch_size: targets that a metric should work on at a time where it needs pixels.
    """

    image_maps: Tensor
    text_maps: Tensor
    content: Tensor
    similarity: Tensor
    boxes: Tensor
    box_owner: Tensor
    image_size: tuple[int, int]
    signed: bool
    similarity_of_images: Callable[[slice, Tensor, str], Tensor]
    similarity_of_texts: Callable[[Tensor], Tensor]
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A metric, as the registry holds it.

    Attributes:
        name: its key in configs and results.
        kind: what it is measured on.
        compute: the targets -> for each of `values` a number for each target, [M] float or bool; NaN where a target has
            none. Its keyword-only parameters are the metric's options.
        values: the names that `compute` returns: metrics of the long table.
        scores: how they are summed up.
        title: of its table in reports.
        note: what the numbers mean, in one or two sentences.
        needs_boxes: whether data sets without boxes have no such targets.
        needs_sign: whether it only makes sense for methods whose maps are signed.
        empty: value -> the reason that is recorded where a target has no number (NaN).
        chart: how reports draw the values; None: not at all.
    """

    name: str
    kind: Kind
    compute: Callable[..., Mapping[str, Tensor]]
    values: tuple[str, ...]
    scores: tuple[Score, ...]
    title: str
    note: str
    needs_boxes: bool = False
    needs_sign: bool = False
    empty: Mapping[str, str]
    chart: Literal["cumulative", "distribution", "bars"] | None = None

    def record(self, options: Mapping[str, Any]) -> MetricRecord:
        """What a result file says of it."""
        return MetricRecord(
            name=self.name,
            title=self.title,
            note=self.note,
            values=self.values,
            scores=self.scores,
            chart=self.chart,
            options=dict(options),
        )
