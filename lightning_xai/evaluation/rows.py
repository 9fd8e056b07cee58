"""From the maps of a batch to rows of the long table: its targets by kind, and what metrics measure on them.

Shape suffixes: R phrases of the batch, M targets that can be measured, C captions, K embedding width, L tokens, H x W
patches, h x w pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.perturbation import only_tokens
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.data.batch import Batch
from lightning_xai.evaluation.maps import BatchMaps, MethodMaps, Wanted
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import (
    CaptionTargets,
    ChosenMetric,
    Kind,
    NegativeTargets,
    PhrasePairTargets,
    PhraseTargets,
)
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.metrics.other_objects import directed_pairs
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["BatchRows", "Embeddings", "ValueRow", "measure_batch", "places_of"]

ValueRow = tuple[str, str, float, str]
"""Target, metric, value and reason of exclusion; NaN with a reason, a number with an empty one."""
_BOX = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Embeddings:
    """A model's embeddings of a batch, to compare with those of what is kept of it.

    Attributes:
        encoder: the model.
        image_BK: of the images.
        text_CK: of the captions.
    """

    encoder: TwoTowerEncoder
    image_BK: Tensor
    text_CK: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: TwoTowerEncoder, batch: Batch) -> Embeddings:
        """Embed a batch."""
        return cls(encoder, encoder.encode_image(batch.images), encoder.encode_text(batch.tokens))


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch.

    Attributes:
        targets: rows of the table of targets, excluded ones included.
        values: what was measured on them.
        phrases: the phrases that were measured: row of `Batch.phrases`, target and map [H, W] on the CPU.
    """

    targets: list[dict[str, Any]]
    values: list[ValueRow]
    phrases: list[tuple[int, dict[str, Any], Tensor]]


@dataclass(frozen=True)
class _Group:
    """All targets of one kind: their rows and reasons, and the tensors of those whose reason is MEASURED."""

    rows: list[dict[str, Any]]
    reasons: list[int]
    tensors: PhraseTargets | PhrasePairTargets | NegativeTargets | CaptionTargets


def measure_batch(
    batch: Batch,
    maps: MethodMaps,
    metrics: Sequence[ChosenMetric],
    embeddings: Embeddings | None = None,
    batch_size: int = 64,
) -> BatchRows:
    """Attribute and measure a batch whose forward pass has just run.

    Args:
        batch: of an evaluation.
        maps: makes the method's maps.
        metrics: what to measure.
        embeddings: of the batch; needed by metrics of captions.
        batch_size: inputs that pass through a tower at a time.

    Raises:
        ValueError: an attribution is not finite.
    """
    measuring = _Measuring(batch, maps, {metric.spec.kind for metric in metrics}, embeddings, batch_size)
    groups: dict[Kind, _Group] = {}
    values: list[ValueRow] = []
    for metric in metrics:
        kind = metric.spec.kind
        if kind not in groups:
            groups[kind] = measuring.group(kind)
        values += _value_rows(groups[kind], metric)
    targets = [row for group in groups.values() for row in group.rows]
    return BatchRows(targets, values, measuring.measured_phrases(groups["phrase"]) if "phrase" in groups else [])


class _Measuring:
    """One batch, its maps by one method, and the targets that they make."""

    def __init__(
        self, batch: Batch, maps: MethodMaps, kinds: set[Kind], embeddings: Embeddings | None, batch_size: int
    ) -> None:
        self.batch = batch
        self.size = (batch.images.shape[2], batch.images.shape[3])
        self.grid = maps.grid
        self.signed = maps.method.signed
        self.embeddings = embeddings
        self.batch_size = batch_size
        self.reason_R = measurable(batch.phrases.reason, batch.phrases.boxes, maps.grid, self.size)
        self.wanted = self._wanted(kinds)
        self.maps: BatchMaps = maps.maps(batch, self.wanted)
        self._index, self._captions = batch.index.tolist(), batch.caption_index.tolist()
        self._caption_image = batch.caption_image.tolist()

    def group(self, kind: Kind) -> _Group:
        """All targets of a kind."""
        groups: dict[Kind, Callable[[], _Group]] = {
            "phrase": self._phrases,
            "phrase_pair": self._phrase_pairs,
            "negative": self._negatives,
            "caption": self._caption_targets,
        }
        return groups[kind]()

    def measured_phrases(self, group: _Group) -> list[tuple[int, dict[str, Any], Tensor]]:
        """Row, target and map of each phrase that can be measured."""
        heats = self.maps.phrases.float().cpu()
        return [(row, group.rows[row], heat) for row, heat in zip(self.wanted.phrases.tolist(), heats, strict=True)]

    def _wanted(self, kinds: set[Kind]) -> Wanted:
        phrases = (self.reason_R == Exclusion.MEASURED).nonzero()[:, 0]
        negatives = phrases[:0]
        if "negative" in kinds and self.batch.negatives is not None:
            negatives = (self._negative_reasons() == Exclusion.MEASURED).nonzero()[:, 0]
        return Wanted(phrases if kinds & {"phrase", "phrase_pair"} else phrases[:0], negatives, "caption" in kinds)

    def _negative_reasons(self) -> Tensor:
        negatives = self.batch.negatives
        assert negatives is not None
        return measurable(negatives.reason, negatives.boxes, self.grid, self.size)

    def _phrases(self) -> _Group:
        phrases = self.batch.phrases
        masks = patch_mask(phrases.boxes[self.wanted.phrases], self.grid, self.size)
        columns = zip(
            phrases.image_row.tolist(),
            phrases.caption_row.tolist(),
            phrases.label.tolist(),
            phrases.text,
            phrases.boxes.tolist(),
            strict=True,
        )
        rows = [
            self._where(image, caption, label) | {"phrase": text} | dict(zip(_BOX, box, strict=True))
            for image, caption, label, text, box in columns
        ]
        targets = PhraseTargets(self.maps.phrases, masks, self.signed)
        return _Group(_numbered("phrase", rows), self.reason_R.tolist(), targets)

    def _phrase_pairs(self) -> _Group:
        phrases = self.batch.phrases
        # Which pairs there are depends on the data alone, so that methods on other grids number them alike.
        known = (phrases.reason == Exclusion.MEASURED).nonzero()[:, 0]
        pairs = known[directed_pairs(phrases.caption_row[known], phrases.label[known])]
        reasons = self.reason_R[pairs].amax(dim=1)
        # The place of each phrase's map among those that were made.
        place = torch.cumsum(self.reason_R == Exclusion.MEASURED, dim=0) - 1
        selected, other = pairs[reasons == Exclusion.MEASURED].unbind(dim=1)
        masks = patch_mask(phrases.boxes, self.grid, self.size)
        rows = [
            self._where(int(phrases.image_row[row]), int(phrases.caption_row[row]), int(phrases.label[row]))
            | {"phrase": phrases.text[row], "other_label": self.batch.label_names[int(phrases.label[other_row])]}
            for row, other_row in pairs.tolist()
        ]
        targets = PhrasePairTargets(self.maps.phrases[place[selected]], masks[selected], masks[other])
        return _Group(_numbered("phrase_pair", rows), reasons.tolist(), targets)

    def _negatives(self) -> _Group:
        negatives, maps = self.batch.negatives, self.maps
        if negatives is None:
            return _Group([], [], NegativeTargets(maps.true, maps.replacements, maps.true.bool()))
        masks = patch_mask(negatives.boxes[self.wanted.negatives], self.grid, self.size)
        columns = zip(
            negatives.image_row.tolist(),
            negatives.caption_row.tolist(),
            negatives.label.tolist(),
            negatives.captions,
            negatives.text,
            negatives.replacement,
            strict=True,
        )
        rows = [
            self._where(image, caption, label)
            | {"negative_caption": negative, "phrase": text, "replacement": replacement}
            for image, caption, label, negative, text, replacement in columns
        ]
        targets = NegativeTargets(maps.true, maps.replacements, masks)
        return _Group(_numbered("negative", rows), self._negative_reasons().tolist(), targets)

    def _caption_targets(self) -> _Group:
        batch, embeddings = self.batch, self.embeddings
        assert embeddings is not None, "metrics of captions need embeddings"
        assert batch.named is not None, "evaluation batches have named boxes"
        content = embeddings.encoder.tokenizer.content_mask(batch.tokens)
        image_CK, text_CK = embeddings.image_BK[batch.caption_image], embeddings.text_CK
        targets = CaptionTargets(
            image_maps=self.maps.image.to(batch.images),
            text_maps=self.maps.text,
            content=content,
            similarity=cosine_similarity(image_CK, text_CK),
            boxes=batch.named.boxes,
            box_owner=batch.named.caption_row,
            image_size=self.size,
            signed=self.signed,
            similarity_of_images=lambda rows, kept, hidden: self._similarity_of_images(embeddings, rows, kept, hidden),
            similarity_of_texts=lambda kept: self._similarity_of_texts(embeddings, kept | ~content),
            batch_size=self.batch_size,
        )
        boxes = torch.bincount(batch.named.caption_row, minlength=len(batch.tokens)).tolist()
        rows = [
            self._where(image, caption) | {"boxes": count}
            for caption, (image, count) in enumerate(zip(self._caption_image, boxes, strict=True))
        ]
        return _Group(_numbered("caption", rows), [Exclusion.MEASURED] * len(rows), targets)

    @torch.no_grad()
    def _similarity_of_images(
        self, embeddings: Embeddings, rows: slice, kept_Nhw: Tensor, hidden: ImageReference
    ) -> Tensor:
        """The similarity of some captions with the part of their images that is kept."""
        images = self.batch.images[self.batch.caption_image[rows]]
        shown = torch.lerp(reference_image(embeddings.encoder, hidden), images, kept_Nhw.to(images).unsqueeze(1))
        return cosine_similarity(embeddings.encoder.encode_image(shown), embeddings.text_CK[rows])

    @torch.no_grad()
    def _similarity_of_texts(self, embeddings: Embeddings, kept_CL: Tensor) -> Tensor:
        """The similarity of all images with their captions, with padding in place of tokens that are not kept."""
        encoder = embeddings.encoder
        tokens = only_tokens(self.batch.tokens, kept_CL, encoder.tokenizer.padding_id)
        starts = range(0, len(tokens), self.batch_size)
        parts = [encoder.encode_text(tokens[start : start + self.batch_size]) for start in starts]
        kept_CK = torch.cat([embeddings.text_CK[:0], *parts])
        return cosine_similarity(embeddings.image_BK[self.batch.caption_image], kept_CK)

    def _where(self, image: int, caption: int, label: int | None = None) -> dict[str, Any]:
        """The columns that every target has; a caption of -1 stands for none."""
        return {
            "index": self._index[image],
            "key": self.batch.keys[image],
            "caption_index": self._captions[caption] if caption >= 0 else -1,
            "caption": self.batch.captions[caption] if caption >= 0 else "",
            "label": "" if label is None else self.batch.label_names[label],
        }


def places_of(caption: str, phrase: str) -> tuple[tuple[int, int], ...]:
    """Find the words of a phrase (several mentions joined by a comma) in a caption, to highlight them.

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


def _numbered(kind: Kind, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `target`, `kind` and `ordinal`: a number within kind and sample, the same in any batch."""
    counts: Counter[int] = Counter()
    numbered = []
    for row in rows:
        index = row["index"]
        ordinal = counts[index]
        counts[index] += 1
        numbered.append({"target": f"{kind}-{index}-{ordinal}", "kind": kind, "ordinal": ordinal} | row)
    return numbered


def _value_rows(group: _Group, metric: ChosenMetric) -> list[ValueRow]:
    """A row for each target and value; in place of a value that is missing, the one reason for it."""
    columns = metric.measure(group.tensors)
    found: list[ValueRow] = []
    for name, values in columns.items():
        empty = metric.spec.empty.get(name, Exclusion.NO_VALUE)
        measured = iter(values)
        for row, reason in zip(group.rows, group.reasons, strict=True):
            value = next(measured) if reason == Exclusion.MEASURED else math.nan
            why = empty if reason == Exclusion.MEASURED and math.isnan(value) else Exclusion(reason)
            found.append((row["target"], name, value, why.key))
    return found
