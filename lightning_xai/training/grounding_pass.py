"""One pass over a split: gamma and rho of its phrases, from the hidden states that its own forward passes compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_xai.attribution.pairwise import PairwiseMethod
from lightning_xai.data.batch import Batch
from lightning_xai.evaluation.maps import maps_of
from lightning_xai.evaluation.ranks import from_first, gather_to_first
from lightning_xai.evaluation.rows import ValueRow, measure_batch, places_of
from lightning_xai.metrics.base import choose_metric
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.report.plots import Example

if TYPE_CHECKING:
    from lightning_xai.results.table import ResultTable

__all__ = ["METHOD", "Drawn", "GroundingPass", "Measured"]

METHOD = "feature_pair"


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
    """The result of a pass.

    Attributes:
        split: `"val"` or `"test"`.
        label_names: the split's classes.
        scores: over all ranks, by name.
        targets: phrases that were measured.
        excluded: phrases that were not, by reason.
        table: the long table of all ranks, on the first one; elsewhere None.
        drawn: the examples of this rank.
    """

    split: str
    label_names: tuple[str, ...]
    scores: dict[str, float]
    targets: int
    excluded: dict[str, int]
    table: ResultTable | None
    drawn: Drawn


class GroundingPass:
    """Measures each batch after its forward pass.

    Args:
        attribution: of the model that is evaluated.
        split: `"val"` or `"test"`.
        examples: how many examples to keep for drawing.
        internal_batch_size: phrases attributed at a time; bounds memory, changes no number.
    """

    def __init__(self, attribution: PairwiseMethod, split: str, *, examples: int, internal_batch_size: int) -> None:
        self._encoder = attribution.encoder
        self._split = split
        self._most_drawn = examples
        self._metric = choose_metric(SPEC.name, {})
        self._maps = maps_of(attribution, internal_batch_size)
        self._label_names: tuple[str, ...] | None = None
        self._targets: list[dict[str, Any]] = []
        self._values: list[ValueRow] = []
        self._drawn = Drawn()
        self._hooks = ExitStack()

    def open(self) -> None:
        """Start to capture what the forward pass of a batch computes."""
        self.close()
        self._hooks.enter_context(self._maps.forward_pass())

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def add(self, batch: Batch) -> None:
        """Measure a batch whose forward pass has just run.

        Raises:
            ValueError: its classes are not those of the batches before, or an attribution is not finite.
        """
        self.close()
        if self._label_names is None:
            self._label_names = batch.label_names
        if self._label_names != batch.label_names:
            raise ValueError(
                "the batches of one evaluation differ in their classes; GroundingCallback measures one split at a "
                "time, so give the trainer one validation data loader"
            )
        rows = measure_batch(batch, self._maps, [self._metric])
        self._targets += rows.targets
        self._values += rows.values
        self._draw(batch, rows.phrases, rows.values)

    def result(self) -> Measured:
        """Everything of all ranks; every rank has to call this.

        Raises:
            RuntimeError: no batch came.
        """
        if self._label_names is None:
            raise RuntimeError(
                "the evaluation had no lightning_xai.data.Batch, so there is no grounding: let the data loader give "
                "such batches (ShardDataModule does), or take GroundingCallback out"
            )
        parts = gather_to_first((self._targets, self._values))
        tables: list[ResultTable] = []
        scores, targets, excluded = from_first(lambda: _summed_up(parts, tables))
        table = tables[0] if tables else None
        return Measured(self._split, self._label_names, scores, targets, excluded, table, self._drawn)

    def _draw(
        self, batch: Batch, phrases: Sequence[tuple[int, dict[str, Any], Tensor]], values: Sequence[ValueRow]
    ) -> None:
        """Keep the first phrase of each of the first images; which ones they are never depends on the model."""
        if len(self._drawn.examples) == self._most_drawn:
            return
        found = {(target, metric): value for target, metric, value, _ in values}
        for row, target, heat in phrases:
            if len(self._drawn.examples) == self._most_drawn:
                return
            if any(example.key == target["key"] for example in self._drawn.examples):
                continue
            self._drawn.examples.append(self._example(batch, row, target))
            name = target["target"]
            state: dict[str, Any] = {
                "keys": f"{target['key']}: {target['phrase']}",
                "heats": heat.clone(),
                "gammas": found[name, "gamma"],
                "hits": found[name, "rho"] == 1,
            }
            for kept, value in state.items():
                self._drawn.state[kept].append(value)

    def _example(self, batch: Batch, row: int, target: dict[str, Any]) -> Example:
        image = int(batch.phrases.image_row[row])
        pixels = self._encoder.pictures(batch.images[[image]].float().cpu())[0].permute(1, 2, 0).numpy()
        text, phrase = target["caption"], target["phrase"]
        box = (target["x0"], target["y0"], target["x1"], target["y1"])
        return Example(np.asarray(pixels), phrase, text, places_of(text, phrase), box, target["key"])


def _summed_up(
    parts: Sequence[tuple[list[dict[str, Any]], list[ValueRow]]], tables: list[ResultTable]
) -> tuple[dict[str, float], int, dict[str, int]]:
    """On the first rank: join the rows into a table, which is put into `tables`, and sum it up."""
    # Not before: pandas takes a while to import, and other ranks do not need it.
    from lightning_xai.results.table import ResultTable, exclusions, score_table

    table = ResultTable.of(
        ((METHOD, 0, *row) for _, values in parts for row in values), (row for targets, _ in parts for row in targets)
    )
    tables.append(table)
    summed = score_table(table.values, SPEC.scores)
    scores = {score.name: float("nan") for score in SPEC.scores}
    scores |= dict(zip(summed["score"], summed["value"].tolist(), strict=True))
    counts = exclusions(table.values[table.values["metric"] == SPEC.values[0]], by=["metric"])
    by_reason = dict(zip(counts["excluded"], counts["count"].tolist(), strict=True))
    return scores, by_reason.pop("", 0), by_reason
