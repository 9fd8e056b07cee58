"""Batches: decoded images, tokenised captions, and the phrases that can be measured against boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_xai.data.excluded import Fault
from lightning_xai.data.needs import BatchNeeds, hard_negatives
from lightning_xai.data.phrases import NamedBoxes, Negatives, Phrases, TargetRows, TensorFields, Transform
from lightning_xai.data.sample import HardNegative, RecordError, Sample, decode_image, stable_hash
from lightning_xai.data.spans import CaptionTokenizer

__all__ = ["Batch", "EvaluationCollate", "Record", "TrainingCollate"]

Record = tuple[int, Sample | RecordError | None]
"""Global index of a sample in its split and the sample; the error of a broken record; `(-1, None)` for padding."""


@dataclass
class Batch(TensorFields):
    """B images with C captions.

    Attributes:
        images: `[B, 3, H, W]` float32, normalised; zeros where not valid.
        valid: `[B]` bool; False for padding and for broken records.
        index: `[B]` int64, the sample's global index in its split, -1 where not valid.
        tokens: `[C, L]` int64. Training: C = B, row i is the chosen caption of image i, empty where not valid.
            Evaluation: all captions of the valid images, in order.
        caption_image: `[C]` int64, row of `images`.
        caption_index: `[C]` int64, which caption of its image it is; -1 for the empty caption of an invalid image.
        captions: C texts.
        keys: B sample keys; empty for padding and for records too broken to have one.
        phrases: see `Phrases`; empty in training, unless they are asked for (`BatchNeeds`).
        named: see `NamedBoxes`; None in training.
        negatives: see `Negatives`; None in training, unless they are asked for.
        label_names: the split's classes, that `Phrases.label` counts; empty in training.
        faults: one per broken record; padding is none.
    """

    images: Tensor
    valid: Tensor
    index: Tensor
    tokens: Tensor
    caption_image: Tensor
    caption_index: Tensor
    captions: list[str]
    keys: list[str]
    phrases: Phrases
    label_names: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)
    named: NamedBoxes | None = None
    negatives: Negatives | None = None

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """A copy with all tensors on `device`, without waiting where the memory is page-locked.

        Lightning calls this without `non_blocking`, so the default is what fits the memory.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda" and self.images.is_pinned()
        return super().to(device, non_blocking)

    def only(self, rows: Tensor) -> Batch:
        """Some images, with their captions and phrases; without named boxes, hard negatives and faults.

        Args:
            rows: [N] int64, of the images, ascending.
        """
        captions = torch.isin(self.caption_image, rows).nonzero()[:, 0]
        phrases = self.phrases.only(torch.isin(self.phrases.image_row, rows).nonzero()[:, 0])
        phrases.image_row = torch.searchsorted(rows, phrases.image_row)
        named = phrases.caption_row >= 0
        phrases.caption_row = torch.where(named, torch.searchsorted(captions, phrases.caption_row), -1)
        return Batch(
            images=self.images[rows],
            valid=self.valid[rows],
            index=self.index[rows],
            tokens=self.tokens[captions],
            caption_image=torch.searchsorted(rows, self.caption_image[captions]),
            caption_index=self.caption_index[captions],
            captions=[self.captions[row] for row in captions.tolist()],
            keys=[self.keys[row] for row in rows.tolist()],
            phrases=phrases,
            label_names=self.label_names,
        )


@dataclass(frozen=True)
class TrainingCollate:
    """Make a training batch: one caption per image, and only where they are asked for its phrases and hard negatives.

    Which caption, and which of its hard negatives, is a function of (seed, epoch, sample key) alone: the same on any
    number of ranks and workers. Padding takes the place of tokens that the sample blanks (`Sample.blanks`).

    Attributes:
        transform: image transform of the model.
        tokenizer: tokenizer of the model.
        seed: of the choice of captions.
        captions_per_image: only the first so many captions of an image take part; None: all.
        label_names: the split's classes; of use where batches hold phrases or hard negatives.
        needs: what batches hold in addition to images and captions.
    """

    transform: Transform
    tokenizer: CaptionTokenizer
    seed: int = 0
    captions_per_image: int | None = None
    label_names: tuple[str, ...] = ()
    needs: BatchNeeds = field(default_factory=BatchNeeds)

    def __call__(self, records: Sequence[Record], epoch: int = 0) -> Batch:
        """Decode, transform and tokenise; a record that fails becomes an invalid row and a fault."""
        labels = set(self.label_names) if self.needs.any_phrases or self.needs.negatives else None
        samples, images = _read_images(records, self.transform, self.tokenizer.context_length, labels)
        choices = [-1 if sample is None else self._choice(sample, epoch) for sample in samples]
        captions = [
            "" if sample is None else sample.captions[choice] for sample, choice in zip(samples, choices, strict=True)
        ]
        tokens = self._tokens(captions)
        _blank(tokens, zip(samples, choices, strict=True), self.tokenizer)
        targets = self._targets(samples, choices, epoch)
        return Batch(
            **images,
            tokens=tokens,
            caption_image=torch.arange(len(captions)),
            caption_index=torch.tensor(choices, dtype=torch.int64),
            captions=captions,
            phrases=targets.phrases() if self.needs.any_phrases else Phrases.empty(self.tokenizer.context_length),
            label_names=self.label_names,
            negatives=targets.negatives() if self.needs.negatives else None,
        )

    def _targets(self, samples: Sequence[Sample | None], choices: Sequence[int], epoch: int) -> TargetRows:
        """What the chosen captions say of their images, as far as it is asked for."""
        tokenise = self.needs.phrase_tokens
        targets = TargetRows(self.transform, self.tokenizer, self.label_names, phrase_tokens=tokenise)
        if not (self.needs.any_phrases or self.needs.negatives):
            return targets
        for row, (sample, choice) in enumerate(zip(samples, choices, strict=True)):
            if sample is not None:
                alone = sample.with_one_caption(choice)
                negatives = self._negatives(alone, epoch)
                targets.add(alone, alone.captions, negatives, row, row, phrases=self.needs.any_phrases)
        return targets

    def _negatives(self, sample: Sample, epoch: int) -> list[HardNegative]:
        """So many hard negatives of a sample with one caption as are asked for, others in each epoch."""
        if not self.needs.negatives:
            return []
        swap, draw = self.needs.swap_objects, (self.seed, epoch)
        found = hard_negatives(sample, sample.captions, self.label_names, swap_objects=swap, draw=draw)
        found.sort(key=lambda negative: stable_hash("negative", *draw, sample.key, negative.text))
        return found[: self.needs.negatives]

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        if all(captions):
            return self.tokenizer.encode(captions)
        # CaptionTokenizer refuses empty captions, which here stand for invalid rows: only start and end are left.
        nothing = self.tokenizer.tokenizer([""]).to(torch.int64)[0]
        rows = iter(self.tokenizer.encode([caption for caption in captions if caption]))
        return torch.stack([next(rows) if caption else nothing for caption in captions])

    def _choice(self, sample: Sample, epoch: int) -> int:
        captions = len(sample.captions[: self.captions_per_image])
        return stable_hash("caption", self.seed, epoch, sample.key) % captions


@dataclass(frozen=True)
class EvaluationCollate:
    """Make an evaluation batch: all captions of every image, and the phrases that name its regions.

    Padding takes the place of tokens that a sample blanks (`Sample.blanks`).

    Attributes:
        transform: image transform of the model.
        tokenizer: tokenizer of the model.
        label_names: the split's classes (a manifest's labels).
        captions_per_image: only the first so many captions of an image take part; None: all.
        swap_objects: add hard negatives made from the captions (`object_swaps`) to those that the data set has.
    """

    transform: Transform
    tokenizer: CaptionTokenizer
    label_names: tuple[str, ...]
    captions_per_image: int | None = None
    swap_objects: bool = False

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Decode, transform, tokenise and align; a record that fails becomes an invalid row and a fault."""
        samples, images = _read_images(records, self.transform, self.tokenizer.context_length, set(self.label_names))
        captions: list[str] = []
        origin: list[tuple[int, int]] = []
        targets = TargetRows(self.transform, self.tokenizer, self.label_names)
        for image_row, sample in enumerate(samples):
            if sample is None:
                continue
            texts = sample.captions[: self.captions_per_image]
            negatives = hard_negatives(sample, texts, self.label_names, swap_objects=self.swap_objects)
            targets.add(sample, texts, negatives, image_row, len(captions))
            captions.extend(texts)
            origin.extend((image_row, caption_index) for caption_index in range(len(texts)))
        length = self.tokenizer.context_length
        where = torch.tensor(origin, dtype=torch.int64).reshape(-1, 2)
        tokens = self.tokenizer.encode(captions) if captions else torch.zeros(0, length, dtype=torch.int64)
        _blank(tokens, ((samples[row], caption_index) for row, caption_index in origin), self.tokenizer)
        return Batch(
            **images,
            tokens=tokens,
            caption_image=where[:, 0].clone(),
            caption_index=where[:, 1].clone(),
            captions=captions,
            phrases=targets.phrases(),
            label_names=self.label_names,
            named=targets.named(),
            negatives=targets.negatives(),
        )


def _read_images(
    records: Sequence[Record], transform: Transform, context_length: int, labels: Set[str] | None = None
) -> tuple[list[Sample | None], dict[str, Any]]:
    """The samples, None where a row is not valid, and the fields of `Batch` that are about images.

    Regions have to be of the classes `labels`, if these are given.
    """
    pixels = torch.zeros(len(records), 3, *transform.size)
    index = torch.full((len(records),), -1, dtype=torch.int64)
    samples: list[Sample | None] = []
    keys: list[str] = []
    faults: list[Fault] = []
    for row, (global_index, record) in enumerate(records):
        sample: Sample | None = None
        if isinstance(record, RecordError):
            faults.append(Fault(global_index, record.kind, str(record)))
        elif record is not None:
            try:
                _check_blanks(record, context_length)
                _check_labels(record, labels)
                pixels[row] = _read_pixels(record, transform)
                index[row] = global_index
                sample = record
            except RecordError as error:
                faults.append(Fault(global_index, error.kind, str(error)))
        keys.append(record.key if isinstance(record, Sample) else "")
        samples.append(sample)
    return samples, {"images": pixels, "valid": index >= 0, "index": index, "keys": keys, "faults": faults}


def _read_pixels(sample: Sample, transform: Transform) -> Tensor:
    image = decode_image(sample)
    try:
        return transform(image)
    except RecordError as error:
        raise RecordError(f"record {sample.key!r} ({sample.source}): {error}", kind=error.kind) from error


def _check_blanks(sample: Sample, context_length: int) -> None:
    last = max((position for positions in sample.blanks.values() for position in positions), default=0)
    if last >= context_length:
        raise RecordError(
            f"record {sample.key!r} ({sample.source}): token {last} is to be blanked, the tokenizer gives "
            f"{context_length}; these data were degraded for another model: make them again for this one"
        )


def _check_labels(sample: Sample, labels: Set[str] | None) -> None:
    if labels is None:
        return
    unknown = sorted({region.label for region in sample.regions} - labels)
    if unknown:
        raise RecordError(
            f"record {sample.key!r} ({sample.source}) has labels {unknown} that its manifest lacks; prepare the shards "
            "again"
        )


def _blank(tokens: Tensor, rows: Iterable[tuple[Sample | None, int]], tokenizer: CaptionTokenizer) -> None:
    """Put padding where samples say so: row i of `tokens` [C, L] is a caption of the i-th sample, by its index."""
    for row, (sample, caption_index) in enumerate(rows):
        positions = () if sample is None else sample.blanks.get(caption_index, ())
        if positions:
            tokens[row, list(positions)] = tokenizer.padding_id
