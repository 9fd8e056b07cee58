"""Phrases of captions that name objects with boxes: what can be measured, and why the rest cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai.data.image_transform import ImageTransform
from lightning_xai.data.sample import Region, Sample, Span
from lightning_xai.data.spans import CaptionTokenizer, SpanAlignmentError, SpanCutOffError
from lightning_xai.data.tensor_fields import TensorFields
from lightning_xai.exclusion import Exclusion

__all__ = ["NamedBoxes", "PhraseRows", "Phrases", "find_tokens", "named_boxes"]


@dataclass
class Phrases(TensorFields):
    """Every (caption, class that it names) of a batch, and one row per (image, class) that no caption names.

    Where a data set tells the things of a class apart (`Region.entity`), each of them has rows as a class does here.

    Attributes:
        caption_row: `[R]` int64, row of `Batch.tokens`; -1 where no caption names the class.
        image_row: `[R]` int64, row of `Batch.images`.
        label: `[R]` int64, index into `Batch.label_names`.
        span_mask: `[R, L]` bool, the tokens that name the class: all whole mentions of it in the caption together.
        boxes: `[R, 4]` float32, `(x0, y0, x1, y1)` in pixels of the transformed image: the box of the class's region,
            the first one where there are several.
        reason: `[R]` int64, a `Exclusion`; `MEASURED` where the data allow to measure (a metric may still find that the
            box is `SMALLER_THAN_PATCH` or that the map has `NO_POSITIVE` value).
        text: the words that name the class, several mentions joined by `", "`; empty where there are none.
    """

    caption_row: Tensor
    image_row: Tensor
    label: Tensor
    span_mask: Tensor
    boxes: Tensor
    reason: Tensor
    text: list[str]

    @classmethod
    def empty(cls, context_length: int) -> Phrases:
        """No phrases at all (R = 0), for captions of `context_length` tokens.

        >>> Phrases.empty(77).span_mask.shape
        torch.Size([0, 77])
        """
        none = torch.zeros(0, dtype=torch.int64)
        mask = torch.zeros(0, context_length, dtype=torch.bool)
        return cls(none, none.clone(), none.clone(), mask, torch.zeros(0, 4), none.clone(), [])

    def __len__(self) -> int:
        return len(self.text)


@dataclass
class NamedBoxes(TensorFields):
    """Every box of a region that a caption names, several instances of a class included.

    Attributes:
        caption_row: `[M]` int64, row of `Batch.tokens`.
        boxes: `[M, 4]` float32, `(x0, y0, x1, y1)` in pixels of the transformed image; those of which the transform
            leaves nothing are not among them.
    """

    caption_row: Tensor
    boxes: Tensor


def named_boxes(
    samples: Sequence[tuple[Sample, int]], captions_per_image: int | None, transform: ImageTransform
) -> NamedBoxes:
    """The boxes that the captions of some samples name.

    Args:
        samples: each with the row of its first caption.
        captions_per_image: only the first so many captions take part; None: all.
        transform: of the images.
    """
    rows: list[int] = []
    boxes = [torch.zeros(0, 4)]
    most = math.inf if captions_per_image is None else captions_per_image
    for sample, first_row in samples:
        for region in sample.regions:
            box = transform.boxes(torch.tensor([region.box], dtype=torch.float64), sample.size)
            named = [number for number, spans in sorted(region.spans.items()) if spans and number < most]
            if named and bool((box[:, 2:] > box[:, :2]).all()):
                rows += [first_row + number for number in named]
                boxes += [box.float()] * len(named)
    return NamedBoxes(torch.tensor(rows, dtype=torch.int64), torch.cat(boxes))


class PhraseRows:
    """Collects the rows of `Phrases`, image by image."""

    def __init__(self, transform: ImageTransform, tokenizer: CaptionTokenizer, labels: dict[str, int]) -> None:
        self._transform = transform
        self._tokenizer = tokenizer
        self._labels = labels
        self._numbers: list[tuple[int, int, int, int]] = []
        self._boxes: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._text: list[str] = []

    def add(self, sample: Sample, captions: Sequence[str], image_row: int, first_caption_row: int) -> None:
        """The phrases of one image whose captions start at a row of the batch's tokens."""
        regions: dict[tuple[str, str], list[Region]] = {}
        for region in sample.regions:
            regions.setdefault((region.label, region.entity), []).append(region)
        unknown = sorted({label for label, _ in regions} - self._labels.keys())
        if unknown:
            raise ValueError(
                f"record {sample.key!r} has labels {unknown} that its manifest lacks; prepare the shards again"
            )
        for (label, _), instances in sorted(regions.items()):
            box = torch.tensor([instances[0].box], dtype=torch.float64)
            box = self._transform.boxes(box, sample.size)[0]
            geometry = _geometry_reason(instances, box)
            before = len(self._numbers)
            for caption_index, caption in enumerate(captions):
                spans = sorted({span for region in instances for span in region.spans.get(caption_index, ())})
                if spans:
                    mask, reason = self._mask(caption, spans)
                    numbers = (first_caption_row + caption_index, image_row, self._labels[label], geometry or reason)
                    self._append(numbers, box, mask, ", ".join(caption[start:end] for start, end in spans))
            if len(self._numbers) == before:
                mask = torch.zeros(self._tokenizer.context_length, dtype=torch.bool)
                self._append((-1, image_row, self._labels[label], Exclusion.NOT_MENTIONED), box, mask, "")

    def _append(self, numbers: tuple[int, int, int, int], box: Tensor, mask: Tensor, text: str) -> None:
        self._numbers.append(numbers)
        self._boxes.append(box)
        self._masks.append(mask)
        self._text.append(text)

    def phrases(self) -> Phrases:
        """All rows so far."""
        if not self._numbers:
            return Phrases.empty(self._tokenizer.context_length)
        numbers = torch.tensor(self._numbers, dtype=torch.int64)
        caption_row, image_row, label, reason = (column.clone() for column in numbers.unbind(1))
        masks, boxes = torch.stack(self._masks), torch.stack(self._boxes)
        return Phrases(caption_row, image_row, label, masks, boxes, reason, self._text)

    def _mask(self, caption: str, spans: Sequence[Span]) -> tuple[Tensor, Exclusion]:
        """The tokens of all spans that are whole, and why there are none."""
        mask = torch.zeros(self._tokenizer.context_length, dtype=torch.bool)
        found = [find_tokens(self._tokenizer, caption, span) for span in spans]
        for tokens in found:
            if isinstance(tokens, slice):
                mask[tokens] = True
        failures = [reason for reason in found if isinstance(reason, Exclusion)]
        return mask, failures[0] if len(failures) == len(found) else Exclusion.MEASURED


def find_tokens(tokenizer: CaptionTokenizer, caption: str, span: Span) -> slice | Exclusion:
    """The tokens of a span of characters, or why there are none."""
    try:
        return tokenizer.token_span(caption, span)
    except SpanCutOffError:
        return Exclusion.SPAN_CUT_OFF
    except SpanAlignmentError:
        return Exclusion.SPAN_NOT_ALIGNED


def _geometry_reason(instances: Sequence[Region], box: Tensor) -> Exclusion:
    """Why the boxes of a class do not allow to measure it; `box` is `[4]` after the transform."""
    if len(instances) > 1 or instances[0].crowd:
        return Exclusion.SEVERAL_INSTANCES
    if bool((box[2:] <= box[:2]).any()):
        return Exclusion.OUTSIDE_CROP
    return Exclusion.MEASURED
