"""One pass over a split: gamma and rho of its phrases, from the hidden states that its own forward passes make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from lightning_xai.attribution.feature_pair import FeaturePairAttribution
from lightning_xai.data.batch import Batch
from lightning_xai.evaluation.batch_maps import PairMapMaker, Wanted
from lightning_xai.evaluation.phrase_grounding import PhraseGrounding, ground_phrases, grounding_rows, places_of
from lightning_xai.metrics.grounding import GroundingMetric, GroundingSummary
from lightning_xai.report.plots import Example

__all__ = ["Drawn", "GroundingPass", "Measured"]


@dataclass
class Drawn:
    """The fixed examples of a pass: what to draw, and what a checkpoint keeps of it, row by row the same.

    Attributes:
        examples: image, caption, phrase and box.
        state: `keys`, `heats` ([H, W] float32), `gammas` and `hits`: tensors and plain values only.
    """

    examples: list[Example] = field(default_factory=list)
    state: dict[str, list[Any]] = field(default_factory=lambda: {"keys": [], "heats": [], "gammas": [], "hits": []})


@dataclass(frozen=True)
class Measured:
    """What a pass has found.

    Attributes:
        split: `"val"` or `"test"`.
        summary: over all ranks.
        pairs: the table of all ranks, a row for each phrase, in the order of the data.
        drawn: the examples of this rank.
    """

    split: str
    summary: GroundingSummary
    pairs: list[dict[str, object]]
    drawn: Drawn


class GroundingPass:
    """Listens to a model's towers from construction to `close`, and measures each batch after its forward pass.

    Args:
        attribution: of the model that is evaluated.
        split: `"val"` or `"test"`.
        examples: how many examples to keep for drawing.
        internal_batch_size: phrases attributed at a time; bounds memory, changes no number.
    """

    def __init__(
        self, attribution: FeaturePairAttribution, split: str, *, examples: int, internal_batch_size: int
    ) -> None:
        self._attribution = attribution
        self._split = split
        self._most_drawn = examples
        self._metric: GroundingMetric | None = None
        self._pairs: list[dict[str, object]] = []
        self._drawn = Drawn()
        self._maker = PairMapMaker(attribution, internal_batch_size)
        self._maker.listen()

    def forget(self) -> None:
        """Let go of hidden states from before the batch."""
        self._maker.forget()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._maker.close()

    def add(self, batch: Batch) -> None:
        """Measure a batch whose forward pass has just run.

        Raises:
            ValueError: its classes are not those of the batches before, or an attribution is not finite.
        """
        metric = self._metric_for(batch)
        found = ground_phrases(batch, self._attribution.image.grid, lambda rows: self._maps(batch, rows))
        metric.update(found.gammas, found.hits, batch.phrases.label, found.reason)
        self._pairs += grounding_rows(batch, found)
        self._draw(batch, found)

    def result(self) -> Measured:
        """Everything of all ranks; every rank has to call this.

        Raises:
            RuntimeError: no batch came.
        """
        if self._metric is None:
            raise RuntimeError(
                "the evaluation had no lightning_xai.data.Batch, so there is no grounding: let the data loader give "
                "such batches (ShardDataModule does), or take GroundingCallback out"
            )
        summary: GroundingSummary = self._metric.compute()
        return Measured(self._split, summary, self._all_pairs(), self._drawn)

    def _metric_for(self, batch: Batch) -> GroundingMetric:
        if self._metric is None:
            self._metric = GroundingMetric(batch.label_names).to(batch.images.device)
        if self._metric.label_names != batch.label_names:
            raise ValueError(
                "the batches of one evaluation differ in their classes; GroundingCallback measures one split at a "
                "time, so give the trainer one validation data loader"
            )
        return self._metric

    def _maps(self, batch: Batch, rows: Tensor) -> Tensor:
        """Span maps [R, H, W] of some of the batch's phrases."""
        self._maker.take(batch)
        return self._maker.maps(batch, Wanted(phrases=rows, negatives=rows[:0], captions=False)).phrases

    def _all_pairs(self) -> list[dict[str, object]]:
        pairs = self._pairs
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, pairs)
            pairs = [row for part in gathered for row in part]
        # The file is the same at any number of ranks and workers.
        return sorted(pairs, key=lambda row: (row["index"], row["caption_index"], row["label"]))

    def _draw(self, batch: Batch, found: PhraseGrounding) -> None:
        """Keep the first phrase of each of the first images; which ones they are never depends on the model."""
        for heat, row in zip(found.maps.cpu(), found.rows.tolist(), strict=True):
            if len(self._drawn.examples) == self._most_drawn:
                return
            key = batch.keys[int(batch.phrases.image_row[row])]
            if any(example.key == key for example in self._drawn.examples):
                continue
            self._drawn.examples.append(self._example(batch, row))
            state = {"keys": f"{key}: {batch.phrases.text[row]}", "heats": heat.float().clone()}
            state |= {"gammas": float(found.gammas[row]), "hits": bool(found.hits[row])}
            for name, value in state.items():
                self._drawn.state[name].append(value)

    def _example(self, batch: Batch, row: int) -> Example:
        image, caption = int(batch.phrases.image_row[row]), int(batch.phrases.caption_row[row])
        pixels = self._attribution.encoder.pictures(batch.images[[image]].float().cpu())[0].permute(1, 2, 0).numpy()
        text, phrase = batch.captions[caption], batch.phrases.text[row]
        x0, y0, x1, y1 = batch.phrases.boxes[row].tolist()
        return Example(np.asarray(pixels), phrase, text, places_of(text, phrase), (x0, y0, x1, y1), batch.keys[image])
