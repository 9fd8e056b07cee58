"""The measurable parts of a batch: phrases that name objects with boxes, and hard negatives, each with its tokens.

Where something cannot be measured, its row says why (`Exclusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lightning_xai.data.masks import Mask
from lightning_xai.data.sample import HardNegative, Region, Sample, Span
from lightning_xai.data.spans import CaptionTokenizer, SpanAlignmentError, SpanCutOffError
from lightning_xai.exclusion import Exclusion
from lightning_xai.photo import PhotoGeometry

_T = TypeVar("_T", bound="TensorFields")
_Corners = tuple[float, float, float, float]
_NO_BOX = (0.0, 0.0, 0.0, 0.0)


class Transform(Protocol):
    """The part of a model's image transform that data need; see `lightning_xai.models.image_transform`."""

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` of the transformed image in pixels."""

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image as `[3, height, width]` float32; a `RecordError` where that cannot be."""

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes `[N, 4]` `(x, y, width, height)` in an image of that size, as `(x0, y0, x1, y1)` after it."""

    def mask(self, mask: Mask) -> Tensor:
        """A mask as `[height, width]` bool of the transformed image; a `MaskError` where it does not decode."""

    def geometry(self, size: tuple[int, int]) -> PhotoGeometry:
        """Where the transformed image lies on an image of (width, height) pixels."""

    def with_resizer(self, resizer: str) -> Transform:
        """The same transform, which resizes with `"pillow"` or `"torch"`."""


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
            the first one where there are several; zeros where it has none.
        reason: `[R]` int64, an `Exclusion`; `MEASURED` where the data allow it (a metric may still find that the
            box is `SMALLER_THAN_PATCH` or that the map has `NO_POSITIVE` value).
        text: the words that name the class, several mentions joined by `", "`; empty where there are none.
        masks: R masks of the boxes' regions, not decoded; an `Exclusion` in place of one that is missing or of another
            size than its image.
        tokens: `[R, L]` int64, the first mention as a separate caption, one that says nothing where there is no
            mention; None unless `TargetRows` was asked for it.
    """

    caption_row: Tensor
    image_row: Tensor
    label: Tensor
    span_mask: Tensor
    boxes: Tensor
    reason: Tensor
    text: list[str]
    masks: list[Mask | Exclusion] = field(default_factory=list)
    tokens: Tensor | None = None

    @classmethod
    def empty(cls, context_length: int) -> Phrases:
        """No phrases at all (R = 0), for captions of `context_length` tokens.

        >>> Phrases.empty(77).span_mask.shape
        torch.Size([0, 77])
        """
        none = torch.zeros(0, dtype=torch.int64)
        mask = torch.zeros(0, context_length, dtype=torch.bool)
        return cls(none, none.clone(), none.clone(), mask, torch.zeros(0, 4), none.clone(), [])

    def only(self, rows: Tensor) -> Phrases:
        """The phrases of some rows [N] int64; the batch that they are of stays."""
        chosen = self._map(lambda part: part[rows])
        chosen.text = [self.text[row] for row in rows.tolist()]
        chosen.masks = [self.masks[row] for row in rows.tolist()] if self.masks else []
        return chosen

    def __len__(self) -> int:
        return len(self.text)


@dataclass
class NamedBoxes(TensorFields):
    """Every box of a region that a caption names, several instances of a class included.

    Attributes:
        caption_row: `[M]` int64, row of `Batch.tokens`.
        boxes: `[M, 4]` float32, `(x0, y0, x1, y1)` in pixels of the transformed image; those of which the transform
            leaves nothing are not among them. A caption that names an instance without a box has none at all: its
            boxes are not all that it names.
        masks: M masks of the boxes' regions, as `Phrases.masks`.
    """

    caption_row: Tensor
    boxes: Tensor
    masks: list[Mask | Exclusion] = field(default_factory=list)


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


@dataclass(frozen=True)
class _Row:
    """A phrase or a hard negative; `marks` and `words` are the columns that only one of them has."""

    caption_row: int
    image_row: int
    label: int
    reason: int
    box: _Corners
    marks: tuple[list[slice], ...]
    words: tuple[str, ...]
    object: Mask | Exclusion = Exclusion.NO_MASK


class TargetRows:
    """Collects what can be measured of a batch, image by image.

    Args:
        transform: of the images.
        tokenizer: of the captions.
        labels: the split's classes.
        phrase_tokens: whether phrases are also tokenised as separate captions.
    """

    def __init__(
        self,
        transform: Transform,
        tokenizer: CaptionTokenizer,
        labels: Sequence[str],
        *,
        phrase_tokens: bool = False,
    ) -> None:
        self._transform = transform
        self._tokenizer = tokenizer
        self._phrase_tokens = phrase_tokens
        self._labels = {label: row for row, label in enumerate(labels)}
        self._phrases: list[_Row] = []
        self._negatives: list[_Row] = []
        self._named: list[tuple[int, _Corners, Mask | Exclusion]] = []

    def add(
        self,
        sample: Sample,
        captions: Sequence[str],
        negatives: Iterable[HardNegative],
        image_row: int,
        first_caption_row: int,
        *,
        phrases: bool = True,
    ) -> None:
        """The targets of one image; `captions` are its first ones, and start at a row of the batch's tokens.

        Without `phrases`, the hard negatives alone.

        The classes of its regions have to be among `labels`.
        """
        given = torch.tensor([region.box or _NO_BOX for region in sample.regions], dtype=torch.float64)
        # (x0, y0, x1, y1) in the transformed image; plain numbers, as tensors of four would take longer than all else.
        boxes: list[_Corners] = [tuple(box) for box in self._transform.boxes(given, sample.size).tolist()]
        for negative in negatives:
            self._add_negative(sample, negative, boxes[negative.region], image_row, first_caption_row)
        if not phrases:
            return
        self._add_phrases(sample, captions, boxes, image_row, first_caption_row)
        incomplete = {index for region in sample.regions if region.box is None for index in region.spans}
        for region, box in zip(sample.regions, boxes, strict=True):
            if region.box is not None and _has_area(box):
                named = (index for index, spans in sorted(region.spans.items()) if spans and index < len(captions))
                mask = _mask_of(region, sample)
                self._named += [(first_caption_row + index, box, mask) for index in named if index not in incomplete]

    def _add_phrases(
        self, sample: Sample, captions: Sequence[str], boxes: Sequence[_Corners], image_row: int, first_caption_row: int
    ) -> None:
        things: dict[tuple[str, str], list[int]] = {}
        for number, region in enumerate(sample.regions):
            things.setdefault((region.label, region.entity), []).append(number)
        for (label, _), numbers in sorted(things.items()):
            instances, box = [sample.regions[number] for number in numbers], boxes[numbers[0]]
            geometry = _geometry_reason(instances, box)
            whole = _mask_of(instances[0], sample)
            before = len(self._phrases)
            for index, caption in enumerate(captions):
                spans = sorted({span for region in instances for span in region.spans.get(index, ())})
                if spans:
                    marks, reason = self._marks(caption, spans)
                    mentions = [caption[start:end] for start, end in spans]
                    place = (first_caption_row + index, image_row, self._labels[label])
                    first = min(filter(None, (geometry, reason)), default=Exclusion.MEASURED)
                    words = (", ".join(mentions), mentions[0])
                    self._phrases.append(_Row(*place, first, box, (marks,), words, whole))
            if len(self._phrases) == before:
                place = (-1, image_row, self._labels[label])
                self._phrases.append(_Row(*place, Exclusion.NOT_MENTIONED, box, ([],), ("", ""), whole))

    def _add_negative(
        self, sample: Sample, negative: HardNegative, box: _Corners, image_row: int, first_caption_row: int
    ) -> None:
        caption = sample.captions[negative.caption]
        marks, reason = self._marks(negative.text, [negative.span])
        true_marks, true_reason = self._marks(caption, [negative.true_span])
        if not _has_area(box):
            reason = Exclusion.OUTSIDE_CROP
        place = (first_caption_row + negative.caption, image_row, self._labels[sample.regions[negative.region].label])
        words = (negative.text, caption[slice(*negative.true_span)], negative.text[slice(*negative.span)])
        self._negatives.append(_Row(*place, reason or true_reason, box, (marks, true_marks), words))

    def phrases(self) -> Phrases:
        """All phrases so far."""
        rows = self._phrases
        caption_row, image_row, label, reason = _numbers(rows)
        mask = self._masks([row.marks[0] for row in rows])
        boxes = _corners([row.box for row in rows])
        text, objects = [row.words[0] for row in rows], [row.object for row in rows]
        tokens = self._as_captions([row.words[1] for row in rows]) if self._phrase_tokens else None
        return Phrases(caption_row, image_row, label, mask, boxes, reason, text, objects, tokens)

    def _as_captions(self, mentions: Sequence[str]) -> Tensor:
        """Each mention as a caption [R, L]; where there is none, a caption that says nothing."""
        tokens = self._tokenizer.padding_caption().repeat(len(mentions), 1)
        given = torch.tensor([bool(mention) for mention in mentions], dtype=torch.bool)
        tokens[given] = self._tokenizer.encode([mention for mention in mentions if mention])
        return tokens

    def negatives(self) -> Negatives:
        """All hard negatives so far."""
        rows = self._negatives
        caption_row, image_row, label, reason = _numbers(rows)
        mask, true_mask = (self._masks([row.marks[i] for row in rows]) for i in range(2))
        captions, text, replacement = ([row.words[i] for row in rows] for i in range(3))
        return Negatives(
            caption_row=caption_row,
            image_row=image_row,
            label=label,
            boxes=_corners([row.box for row in rows]),
            reason=reason,
            tokens=self._tokenizer.encode(captions),
            mask=mask,
            true_mask=true_mask,
            captions=captions,
            text=text,
            replacement=replacement,
        )

    def named(self) -> NamedBoxes:
        """All boxes so far that captions name."""
        rows = torch.tensor([row for row, _, _ in self._named], dtype=torch.int64)
        boxes = _corners([box for _, box, _ in self._named])
        return NamedBoxes(rows, boxes, [mask for _, _, mask in self._named])

    def _masks(self, marks: Sequence[Sequence[slice]]) -> Tensor:
        """Marked tokens of each row [R, L] bool."""
        masks = torch.zeros(len(marks), self._tokenizer.context_length, dtype=torch.bool)
        marked = masks.numpy()  # the same memory, written to several times as fast
        for row, slices in enumerate(marks):
            for tokens in slices:
                marked[row, tokens] = True
        return masks

    def _marks(self, caption: str, spans: Sequence[Span]) -> tuple[list[slice], Exclusion]:
        """The tokens of all spans that are whole, and why there are none."""
        found = [self._tokens_of(caption, span) for span in spans]
        marks = [tokens for tokens in found if isinstance(tokens, slice)]
        reasons = [reason for reason in found if not isinstance(reason, slice)]
        return marks, Exclusion.MEASURED if marks else reasons[0]

    def _tokens_of(self, caption: str, span: Span) -> slice | Exclusion:
        try:
            return self._tokenizer.token_span(caption, span)
        except SpanCutOffError:
            return Exclusion.SPAN_CUT_OFF
        except SpanAlignmentError:
            return Exclusion.SPAN_NOT_ALIGNED


def _numbers(rows: Sequence[_Row]) -> list[Tensor]:
    """The columns caption_row, image_row, label and reason."""
    numbers = [(row.caption_row, row.image_row, row.label, row.reason) for row in rows]
    return [column.clone() for column in torch.tensor(numbers, dtype=torch.int64).reshape(-1, 4).unbind(1)]


def _corners(boxes: Sequence[_Corners]) -> Tensor:
    """Boxes [N, 4] float32."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _mask_of(region: Region, sample: Sample) -> Mask | Exclusion:
    if region.mask is None:
        return Exclusion.NO_MASK
    return region.mask if region.mask.size == sample.size[::-1] else Exclusion.MASK_SIZE


def _has_area(box: _Corners) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def _geometry_reason(instances: Sequence[Region], box: _Corners) -> Exclusion:
    """The reason why the boxes of a class do not allow to measure it; `box` is after the transform."""
    if len(instances) > 1 or instances[0].crowd:
        return Exclusion.SEVERAL_INSTANCES
    if instances[0].box is None:
        return Exclusion.NO_BOX
    return Exclusion.MEASURED if _has_area(box) else Exclusion.OUTSIDE_CROP
