"""What one method's maps of a batch come to: a record of table rows for each item.

Shape suffixes: C captions, M phrases, N hard negatives, P pairs of phrases, L tokens, H x W patches, h x w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.perturbation import only_tokens
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.data.batch import Batch
from lightning_xai.data.degradation import important_pixels, important_tokens
from lightning_xai.evaluation.batch_maps import BatchMaps, MapMaker, Wanted
from lightning_xai.evaluation.phrase_grounding import ground_phrases, grounding_rows, image_size, measurable_rows
from lightning_xai.exclusion import Exclusion
from lightning_xai.heat_maps import min_max, upsample
from lightning_xai.metrics.grounding import box_attribution, measurable, patch_mask
from lightning_xai.metrics.hard_negatives import attribution_difference
from lightning_xai.metrics.localization import binarised, box_union, intersection_over_union
from lightning_xai.metrics.other_objects import directed_pairs
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["Embeddings", "ItemMeasures", "MeasureOptions"]

_HEAT_DIGITS = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and how.

    Attributes:
        metrics: names, keys of `report.results.TABLES`.
        keep_tokens: share of a caption's tokens that stay for its confidence, in [0, 1], rounded up to whole tokens.
        keep_pixels: share of an image's pixels that stay for its confidence; None: it is multiplied by its map.
        hidden_image: what is seen where an image is not kept: "zeros" (the mean colour) or "black".
        localization_quantile: of a map's values, above which it is taken to point at something.
        batch_size: inputs that pass through a tower at a time.
    """

    metrics: frozenset[str]
    keep_tokens: float
    keep_pixels: float | None
    hidden_image: ImageReference
    localization_quantile: float
    batch_size: int


@dataclass(frozen=True)
class Embeddings:
    """What the model makes of a batch: images [B, K] and captions [C, K]."""

    image: Tensor
    text: Tensor


class ItemMeasures:
    """Measures batches with one method.

    Args:
        encoder: the model.
        maker: makes the method's maps.
        options: what is measured, and how.
    """

    def __init__(self, encoder: TwoTowerEncoder, maker: MapMaker, options: MeasureOptions) -> None:
        self._encoder = encoder
        self._maker = maker
        self._options = options

    def records(self, batch: Batch, embeddings: Embeddings) -> dict[int, Row]:
        """Measure a batch whose forward pass has just run.

        Returns:
            For the index of each valid sample: `tables`, metric -> rows (columns of `report.results.TABLES` but seed; a
            measured row of grounding also has its `heat`); and `left_out`, metric -> reason -> what has no row.

        Raises:
            ValueError: an attribution is not finite.
        """
        wanted = self._wanted(batch)
        maps = self._maker.maps(batch, wanted)
        tables = {name: self._table(name, batch, embeddings, wanted, maps) for name in sorted(self._options.metrics)}
        records: dict[int, Row] = {
            index: {"tables": {name: [] for name in tables}, "left_out": {}}
            for index in batch.index.tolist()
            if index >= 0
        }
        for name, rows in tables.items():
            for row in rows:
                records[row["index"]]["tables"][name].append(row)
        if "hard_negatives" in tables:
            self._count_negatives_left_out(batch, records)
        return records

    def _count_negatives_left_out(self, batch: Batch, records: dict[int, Row]) -> None:
        if batch.negatives is None:
            return
        reasons = self._negative_reasons(batch).tolist()
        for image, reason in zip(batch.negatives.image_row.tolist(), reasons, strict=True):
            if reason != Exclusion.MEASURED:
                counts = records[int(batch.index[image])]["left_out"].setdefault("hard_negatives", {})
                name = Exclusion(reason).name.lower()
                counts[name] = counts.get(name, 0) + 1

    def _negative_reasons(self, batch: Batch) -> Tensor:
        """[N] int64, `Exclusion` of each hard negative, with the size of its box considered."""
        assert batch.negatives is not None
        return measurable(batch.negatives.reason, batch.negatives.boxes, self._maker.grid, image_size(batch))

    def _wanted(self, batch: Batch) -> Wanted:
        metrics = self._options.metrics
        _, phrases = measurable_rows(batch, self._maker.grid)
        negatives = phrases[:0]
        if "hard_negatives" in metrics and batch.negatives is not None:
            negatives = (self._negative_reasons(batch) == Exclusion.MEASURED).nonzero()[:, 0]
        if not metrics & {"grounding", "other_objects"}:
            phrases = phrases[:0]
        return Wanted(phrases, negatives, bool(metrics & {"confidence", "localization"}))

    def _table(self, name: str, batch: Batch, embeddings: Embeddings, wanted: Wanted, maps: BatchMaps) -> list[Row]:
        if name == "grounding":
            return self._grounding(batch, maps)
        if name == "other_objects":
            return self._other_objects(batch, wanted.phrases, maps.phrases)
        if name == "hard_negatives":
            return self._hard_negatives(batch, wanted.negatives, maps)
        assert maps.image is not None
        assert maps.text is not None
        if name == "localization":
            return self._localization(batch, maps.image)
        return self._confidence(batch, embeddings, maps.image, maps.text)

    def _grounding(self, batch: Batch, maps: BatchMaps) -> list[Row]:
        found = ground_phrases(batch, self._maker.grid, lambda rows: maps.phrases)
        table: list[Row] = grounding_rows(batch, found)
        heats = found.maps.float().cpu().tolist()
        for row, heat in zip(found.rows.tolist(), heats, strict=True):
            table[row]["heat"] = [[float(f"{value:.{_HEAT_DIGITS}g}") for value in line] for line in heat]
        return table

    def _other_objects(self, batch: Batch, rows: Tensor, maps: Tensor) -> list[Row]:
        phrases = batch.phrases
        masks = patch_mask(phrases.boxes[rows], self._maker.grid, image_size(batch))
        pairs = directed_pairs(phrases.caption_row[rows], phrases.label[rows])
        selected, other = pairs.unbind(dim=1)
        columns = {
            "own": box_attribution(maps[selected], masks[selected]).tolist(),
            "other": box_attribution(maps[selected], masks[other]).tolist(),
        }
        table = []
        for number, (row, other_row) in enumerate(rows[pairs].tolist()):
            table.append(
                self._where(batch, int(phrases.caption_row[row]))
                | {
                    "phrase": phrases.text[row],
                    "label": batch.label_names[int(phrases.label[row])],
                    "other_label": batch.label_names[int(phrases.label[other_row])],
                }
                | {name: values[number] for name, values in columns.items()}
            )
        return table

    def _hard_negatives(self, batch: Batch, rows: Tensor, maps: BatchMaps) -> list[Row]:
        negatives = batch.negatives
        if negatives is None:
            return []
        masks = patch_mask(negatives.boxes[rows], self._maker.grid, image_size(batch))
        positive = box_attribution(maps.true, masks)
        negative = box_attribution(maps.replacements, masks)
        delta = attribution_difference(negative, positive).tolist()
        table = []
        for number, row in enumerate(rows.tolist()):
            table.append(
                self._where(batch, int(negatives.caption_row[row]))
                | {
                    "negative_caption": negatives.captions[row],
                    "phrase": negatives.text[row],
                    "replacement": negatives.replacement[row],
                    "label": batch.label_names[int(negatives.label[row])],
                    "positive": float(positive[number]),
                    "negative": float(negative[number]),
                    "delta": delta[number],
                }
            )
        return table

    def _localization(self, batch: Batch, image_CHW: Tensor) -> list[Row]:
        assert batch.named is not None, "evaluation batches have named boxes"
        size = image_size(batch)
        owner = batch.named.caption_row
        boxes = torch.bincount(owner, minlength=len(batch.tokens)).tolist()
        ious: list[float] = []
        for rows in self._chunks(len(image_CHW)):  # masks at pixel resolution are the large thing here
            here = (owner >= rows.start) & (owner < rows.stop)
            predicted = binarised(upsample(image_CHW[rows].float(), size), self._options.localization_quantile)
            truth = box_union(batch.named.boxes[here], owner[here] - rows.start, len(predicted), size)
            ious += intersection_over_union(predicted, truth).tolist()
        return [
            # NaN: a constant map, and boxes between the centres of pixels.
            self._where(batch, row) | {"boxes": count, "iou": None if not count or math.isnan(iou) else iou}
            for row, (count, iou) in enumerate(zip(boxes, ious, strict=True))
        ]

    def _confidence(self, batch: Batch, embeddings: Embeddings, image_CHW: Tensor, text_CL: Tensor) -> list[Row]:
        image_CK, text_CK = embeddings.image[batch.caption_image], embeddings.text
        columns = {
            "similarity": cosine_similarity(image_CK, text_CK),
            "image_kept": cosine_similarity(self._embed_kept_images(batch, image_CHW), text_CK),
            "text_kept": cosine_similarity(image_CK, self._embed_kept_texts(batch, text_CL)),
        }
        values = {name: column.tolist() for name, column in columns.items()}
        return [
            self._where(batch, row) | {name: column[row] for name, column in values.items()}
            for row in range(len(batch.tokens))
        ]

    def _embed_kept_images(self, batch: Batch, image_CHW: Tensor) -> Tensor:
        """The important part of each caption's image [C, K]."""
        hidden = reference_image(self._encoder, self._options.hidden_image)

        def kept(rows: slice) -> Tensor:
            images = batch.images[batch.caption_image[rows]]
            heat_Chw = upsample(image_CHW[rows].to(images), image_size(batch))
            return torch.lerp(hidden, images, self._shown(heat_Chw).unsqueeze(1))

        return self._embed(lambda rows: self._encoder.encode_image(kept(rows)), len(image_CHW))

    def _shown(self, heat_Chw: Tensor) -> Tensor:
        """How much of each pixel stays, in [0, 1]."""
        if self._options.keep_pixels is not None:
            return important_pixels(heat_Chw, self._options.keep_pixels).to(heat_Chw)
        # What speaks against the caption is as little to be kept as what says nothing.
        return min_max(heat_Chw.clamp(min=0) if self._maker.method.signed else heat_Chw)

    def _embed_kept_texts(self, batch: Batch, text_CL: Tensor) -> Tensor:
        """Each caption with padding in place of its less important tokens [C, K]."""
        tokenizer = self._encoder.tokenizer
        content = tokenizer.content_mask(batch.tokens)
        kept = important_tokens(text_CL, content, self._options.keep_tokens, round_up=True)
        tokens = only_tokens(batch.tokens, kept | ~content, tokenizer.padding_id)
        return self._embed(lambda rows: self._encoder.encode_text(tokens[rows]), len(tokens))

    @torch.no_grad()
    def _embed(self, encode: Callable[[slice], Tensor], count: int) -> Tensor:
        parts = [encode(rows) for rows in self._chunks(count)]
        return (
            torch.cat(parts) if parts else next(self._encoder.parameters()).new_zeros(0, self._encoder.embedding_width)
        )

    def _where(self, batch: Batch, caption_row: int) -> Row:
        image = int(batch.caption_image[caption_row])
        return {
            "index": int(batch.index[image]),
            "key": batch.keys[image],
            "caption_index": int(batch.caption_index[caption_row]),
            "caption": batch.captions[caption_row],
        }

    def _chunks(self, count: int) -> Iterator[slice]:
        size = self._options.batch_size
        yield from (slice(start, min(start + size, count)) for start in range(0, count, size))
