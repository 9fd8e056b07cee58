"""Hard negatives of a batch, tokenised: wrong captions beside the true ones and the boxes that they are wrong about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai.data.image_transform import ImageTransform
from lightning_xai.data.phrases import find_tokens
from lightning_xai.data.sample import HardNegative, Sample
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.data.tensor_fields import TensorFields
from lightning_xai.exclusion import Exclusion

__all__ = ["NegativeRows", "Negatives"]


@dataclass
class Negatives(TensorFields):
    """N wrong captions of a batch.

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


class NegativeRows:
    """Collects the rows of `Negatives`, image by image."""

    def __init__(self, transform: ImageTransform, tokenizer: CaptionTokenizer, labels: dict[str, int]) -> None:
        self._transform = transform
        self._tokenizer = tokenizer
        self._labels = labels
        self._numbers: list[tuple[int, int, int, int]] = []
        self._boxes: list[Tensor] = []
        self._masks: list[tuple[Tensor, Tensor]] = []
        self._words: list[tuple[str, str, str]] = []

    def add(self, sample: Sample, negatives: Iterable[HardNegative], image_row: int, first_caption_row: int) -> None:
        """Wrong captions of one image, whose true captions start at a row of the batch's tokens."""
        for negative in negatives:
            region, caption = sample.regions[negative.region], sample.captions[negative.caption]
            box = self._transform.boxes(torch.tensor([region.box], dtype=torch.float64), sample.size)[0]
            mask, reason = self._mask(negative.text, negative.span)
            true_mask, true_reason = self._mask(caption, negative.true_span)
            if bool((box[2:] <= box[:2]).any()):
                reason = Exclusion.OUTSIDE_CROP
            row = first_caption_row + negative.caption
            self._numbers.append((row, image_row, self._labels[region.label], reason or true_reason))
            self._boxes.append(box)
            self._masks.append((mask, true_mask))
            true_words, words = caption[slice(*negative.true_span)], negative.text[slice(*negative.span)]
            self._words.append((negative.text, true_words, words))

    def negatives(self) -> Negatives:
        """All rows so far."""
        length, rows = self._tokenizer.context_length, len(self._numbers)
        numbers = torch.tensor(self._numbers, dtype=torch.int64).reshape(rows, 4)
        caption_row, image_row, label, reason = (column.clone() for column in numbers.unbind(1))
        captions, text, replacement = ([words[column] for words in self._words] for column in range(3))
        masks = torch.stack([mask for pair in self._masks for mask in pair]) if rows else torch.zeros(0, length)
        mask, true_mask = masks.bool().reshape(rows, 2, length).unbind(1)
        return Negatives(
            caption_row=caption_row,
            image_row=image_row,
            label=label,
            boxes=torch.stack(self._boxes).float() if rows else torch.zeros(0, 4),
            reason=reason,
            tokens=self._tokenizer.encode(captions) if rows else torch.zeros(0, length, dtype=torch.int64),
            mask=mask.clone(),
            true_mask=true_mask.clone(),
            captions=captions,
            text=text,
            replacement=replacement,
        )

    def _mask(self, caption: str, span: tuple[int, int]) -> tuple[Tensor, Exclusion]:
        mask = torch.zeros(self._tokenizer.context_length, dtype=torch.bool)
        tokens = find_tokens(self._tokenizer, caption, span)
        if isinstance(tokens, Exclusion):
            return mask, tokens
        mask[tokens] = True
        return mask, Exclusion.MEASURED
