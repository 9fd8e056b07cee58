"""One method with one seed in an evaluation: what it computes, what it has kept, and what is shown of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lightning_xai.attribution.method_options import ChosenMethod
from lightning_xai.data.batch import Batch
from lightning_xai.evaluation.batch_maps import MapMaker, map_maker
from lightning_xai.evaluation.example_gallery import Candidate, ExampleGallery, Pixels
from lightning_xai.evaluation.item_measures import Embeddings, ItemMeasures, MeasureOptions
from lightning_xai.evaluation.phrase_grounding import BOX, places_of
from lightning_xai.evaluation.result_cache import ResultCache
from lightning_xai.evaluation.table_metrics import TableMetrics
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["EvaluationCell", "picture_of"]

_NEED_SIGN = frozenset({"other_objects", "hard_negatives"})
Rows = dict[str, list[dict[str, Any]]]


class EvaluationCell:
    """Attributes batches, keeps a record of each item, and adds the records up.

    Args:
        label: of the method.
        chosen: the method and its options.
        encoder: the model.
        label_names: the split's classes.
        options: what is measured, and how; metrics that need a sign are left out for methods without.
        folder: of the evaluation.
        settings: all that the records depend on, beside the method and the options.
        gallery: keeps examples to look at; None for none.

    Attributes:
        seed: of the method; 0 for one that draws no random numbers.
        tables: the tables that the cell fills.
        rows: table -> rows of this process, without their maps.
        left_out: (table, reason) -> things of this process that have no row.
        metrics: the numbers.

    Raises:
        CacheError: the folder holds records of other settings.
    """

    def __init__(
        self,
        label: str,
        chosen: ChosenMethod,
        encoder: TwoTowerEncoder,
        label_names: Sequence[str],
        options: MeasureOptions,
        folder: Path,
        settings: Mapping[str, Any],
        gallery: ExampleGallery | None,
    ) -> None:
        left_out = frozenset() if chosen.method.signed else _NEED_SIGN
        options = replace(options, metrics=options.metrics - left_out)
        self.label = label
        self.seed = int(chosen.options.get("seed", 0))
        self.chosen = chosen
        self.tables = tuple(sorted(options.metrics))
        self.rows: Rows = {table: [] for table in self.tables}
        self.left_out: Counter[tuple[str, str]] = Counter()
        self.metrics = TableMetrics(self.tables, label_names, next(encoder.parameters()).device)
        self.gallery = gallery
        self.maker: MapMaker = map_maker(chosen.method, options.batch_size)
        self._measures = ItemMeasures(encoder, self.maker, options)
        # How many at a time changes no number.
        how = {name: value for name, value in asdict(options).items() if name not in ("metrics", "batch_size")}
        own = {key: value for key, value in chosen.options.items() if key != "internal_batch_size"}
        self._store = ResultCache(
            folder / "rows" / f"{label},seed={self.seed}",
            {**settings, **how, "metrics": self.tables, "method": chosen.name, "options": own},
        )

    @property
    def damaged(self) -> int:
        """Stored lines that could not be read; their items are computed again."""
        return self._store.damaged

    @property
    def stored(self) -> int:
        """Items that are there already."""
        return len(self._store)

    def has(self, indices: Sequence[int]) -> bool:
        """Whether all of these items are there already."""
        return all(index in self._store for index in indices)

    def compute(self, batch: Batch, embeddings: Embeddings) -> None:
        """Attribute and measure a batch that `maker.take` has seen, and keep its records on disk."""
        for index, record in self._measures.records(batch, embeddings).items():
            self._store.put(index, record)
        self._store.flush()

    def collect(self, indices: Sequence[int], pixels: Callable[[int], Pixels]) -> None:
        """Add the records of some items up.

        Args:
            indices: of the items.
            pixels: index to picture, for those that are kept to look at.
        """
        candidates: list[Candidate] = []
        for index in indices:
            record = self._store[index]
            tables: Rows = record["tables"]
            for table, reasons in record["left_out"].items():
                self.left_out.update({(table, reason): count for reason, count in reasons.items()})
            self.metrics.update(tables)
            for table, rows in tables.items():
                self.rows[table] += [
                    {"seed": self.seed} | {name: value for name, value in row.items() if name != "heat"} for row in rows
                ]
            candidates += [_candidate(row) for row in tables.get("grounding", ()) if "heat" in row]
        if self.gallery is not None:
            self.gallery.add(candidates, pixels)

    def close(self) -> None:
        """Leave the model as it was, and all records on disk."""
        self.maker.close()
        self._store.close()


def picture_of(encoder: TwoTowerEncoder, batch: Batch) -> Callable[[int], Pixels]:
    """From the index of a sample of a batch to its picture as the model saw it, [H, W, 3] bytes."""
    rows = {index: row for row, index in enumerate(batch.index.tolist())}

    def pixels(index: int) -> Pixels:
        picture = encoder.pictures(batch.images[[rows[index]]].float().cpu())[0].permute(1, 2, 0)
        levels: Pixels = (picture * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return levels

    return pixels


def _candidate(row: Mapping[str, Any]) -> Candidate:
    record = {name: row[name] for name in ("key", "caption", "phrase", "heat")}
    record |= {"spans": places_of(row["caption"], row["phrase"]), "hit": bool(row["hit"])}
    record |= {"box": tuple(row[side] for side in BOX)}
    gamma = math.nan if row["gamma"] is None else float(row["gamma"])
    return Candidate(row["index"], row["caption_index"], row["label"], gamma, record)
