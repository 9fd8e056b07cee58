"""The measurable parts of a batch: phrases that name objects with boxes, and hard negatives, each with its tokens.

Where something cannot be measured, its row says why (`Exclusion`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lightning_xai.data.sample import HardNegative, Region, Sample, Span
from lightning_xai.data.spans import CaptionTokenizer, SpanAlignmentError, SpanCutOffError
from lightning_xai.exclusion import Exclusion

_T = TypeVar("_T", bound="TensorFields")


class Transform(Protocol):
    """The part of a model's image transform that data need; see `lightning_xai.models.image_transform`."""

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` of the transformed image in pixels."""

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image as `[3, height, width]` float32; a `RecordError` where that cannot be."""

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes `[N, 4]` `(x, y, width, height)` in an image of that size, as `(x0, y0, x1, y1)` after it."""


@dataclass
class TensorFields:
    """A dataclass that moves to a device with all its tensors; fields of other types stay as they are."""

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        """A copy with all tensors on `device`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self: _T) -> _T:
        """A copy with all tensors in page-locked memory (`DataLoader(pin_memory=True)` calls this)."""
        return self._map(lambda part: part.pin_memory())

    def _map(self: _T, change: Callable[[Any], Any]) -> _T:
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return type(self)(
            **{name: change(value) if isinstance(value, Tensor | TensorFields) else value for name, value in values}
        )


@dataclass
class Phrases(TensorFields):
    """Every (caption, class that it names) of a batch, and one row per (image, class) that no caption names.

    Where a data set distinguishes the things of a class (`Region.entity`), each of them has rows as a class does here.

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


@dataclass
class Negatives(TensorFields):
    """N wrong captions of a batch, with the true ones and the boxes that they are wrong about.

    Attributes:
        caption_row: `[N]` int64, row of the true caption in `Batch.tokens`.
        image_row: `[N]` int64, row of `Batch.images`.
        label: `[N]` int64, class of the true object, index into `Batch.label_names`.
        boxes: `[N, 4]` float32, `(x0, y0, x1, y1)` of the true object in pixels of the transformed image.
        reason: `[N]` int64, an `Exclusion`: `OUTSIDE_CROP`, `SPAN_CUT_OFF` or `SPAN_NOT_ALIGNED` (of either caption),
            else `MEASURED`. Those that a data set comes with count also where the image has several instances of the
            class: they name one of them, and section 4.4 of the paper asks for no more.
        tokens: `[N, L]` int64, the wrong caption.
        mask: `[N, L]` bool, its tokens that stand in place of the true words.
        true_mask: `[N, L]` bool, the tokens of the true caption that were replaced.
        captions: the wrong captions.
        text: the true words.
        replacement: the words in their place.
    """

    caption_row: Tensor
    image_row: Tensor
    label: Tensor
    boxes: Tensor
    reason: Tensor
    tokens: Tensor
    mask: Tensor
    true_mask: Tensor
    captions: list[str]
    text: list[str]
    replacement: list[str]

    def __len__(self) -> int:
        return len(self.captions)


class _Rows:
    """Collects rows of a caption, an image, a class, a reason, a box and tokens, image by image."""

    def __init__(self, transform: Transform, tokenizer: CaptionTokenizer, labels: dict[str, int]) -> None:
        self._transform = transform
        self._tokenizer = tokenizer
        self._labels = labels
        self._numbers: list[tuple[int, int, int, int]] = []
        self._boxes: list[Tensor] = []
        self._masks: list[Tensor] = []

    def _columns(self) -> tuple[Tensor, ...]:
        """The columns caption_row, image_row, label and reason."""
        numbers = torch.tensor(self._numbers, dtype=torch.int64).reshape(-1, 4)
        return tuple(column.clone() for column in numbers.unbind(1))

    def _mask(self, caption: str, spans: Sequence[Span]) -> tuple[Tensor, Exclusion]:
        """The tokens of all spans that are whole, and why there are none."""
        mask = torch.zeros(self._tokenizer.context_length, dtype=torch.bool)
        found = [self._find_tokens(caption, span) for span in spans]
        for tokens in found:
            if isinstance(tokens, slice):
                mask[tokens] = True
        reasons = [reason for reason in found if isinstance(reason, Exclusion)]
        return mask, reasons[0] if len(reasons) == len(found) else Exclusion.MEASURED

    def _find_tokens(self, caption: str, span: Span) -> slice | Exclusion:
        try:
            return self._tokenizer.token_span(caption, span)
        except SpanCutOffError:
            return Exclusion.SPAN_CUT_OFF
        except SpanAlignmentError:
            return Exclusion.SPAN_NOT_ALIGNED


class PhraseRows(_Rows):
    """Collects the rows of `Phrases`, image by image."""

    def __init__(self, transform: Transform, tokenizer: CaptionTokenizer, labels: dict[str, int]) -> None:
        super().__init__(transform, tokenizer, labels)
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
            box = _transformed(instances[0], sample, self._transform)
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
        caption_row, image_row, label, reason = self._columns()
        masks, boxes = torch.stack(self._masks), torch.stack(self._boxes)
        return Phrases(caption_row, image_row, label, masks, boxes, reason, self._text)


class NegativeRows(_Rows):
    """Collects the rows of `Negatives`, image by image."""

    def __init__(self, transform: Transform, tokenizer: CaptionTokenizer, labels: dict[str, int]) -> None:
        super().__init__(transform, tokenizer, labels)
        self._words: list[tuple[str, str, str]] = []

    def add(self, sample: Sample, negatives: Iterable[HardNegative], image_row: int, first_caption_row: int) -> None:
        """Wrong captions of one image, whose true captions start at a row of the batch's tokens."""
        for negative in negatives:
            region, caption = sample.regions[negative.region], sample.captions[negative.caption]
            box = _transformed(region, sample, self._transform)
            mask, reason = self._mask(negative.text, [negative.span])
            true_mask, true_reason = self._mask(caption, [negative.true_span])
            if not _has_area(box):
                reason = Exclusion.OUTSIDE_CROP
            row = first_caption_row + negative.caption
            self._numbers.append((row, image_row, self._labels[region.label], reason or true_reason))
            self._boxes.append(box)
            self._masks += [mask, true_mask]
            true_words, words = caption[slice(*negative.true_span)], negative.text[slice(*negative.span)]
            self._words.append((negative.text, true_words, words))

    def negatives(self) -> Negatives:
        """All rows so far."""
        length, rows = self._tokenizer.context_length, len(self._numbers)
        caption_row, image_row, label, reason = self._columns()
        captions, text, replacement = ([words[column] for words in self._words] for column in range(3))
        masks = torch.stack(self._masks) if rows else torch.zeros(0, length, dtype=torch.bool)
        mask, true_mask = masks.reshape(rows, 2, length).unbind(1)
        return Negatives(
            caption_row=caption_row,
            image_row=image_row,
            label=label,
            boxes=torch.stack(self._boxes) if rows else torch.zeros(0, 4),
            reason=reason,
            tokens=self._tokenizer.encode(captions),
            mask=mask.clone(),
            true_mask=true_mask.clone(),
            captions=captions,
            text=text,
            replacement=replacement,
        )


def named_boxes(
    samples: Sequence[tuple[Sample, int]], captions_per_image: int | None, transform: Transform
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
            box = _transformed(region, sample, transform)
            named = [number for number, spans in sorted(region.spans.items()) if spans and number < most]
            if named and _has_area(box):
                rows += [first_row + number for number in named]
                boxes.append(box.expand(len(named), 4))
    return NamedBoxes(torch.tensor(rows, dtype=torch.int64), torch.cat(boxes))


def _transformed(region: Region, sample: Sample, transform: Transform) -> Tensor:
    """A region's box `(x0, y0, x1, y1)` in pixels of the transformed image, [4] float32."""
    return transform.boxes(torch.tensor([region.box], dtype=torch.float64), sample.size)[0]


def _has_area(box: Tensor) -> bool:
    return bool((box[2:] > box[:2]).all())


def _geometry_reason(instances: Sequence[Region], box: Tensor) -> Exclusion:
    """The reason why the boxes of a class do not allow to measure it; `box` is `[4]` after the transform."""
    if len(instances) > 1 or instances[0].crowd:
        return Exclusion.SEVERAL_INSTANCES
    return Exclusion.MEASURED if _has_area(box) else Exclusion.OUTSIDE_CROP
