"""One method with one seed in an evaluation: its rows, from a batch or from the cache, and its examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_xai.attribution import METHODS
from lightning_xai.attribution.method_options import ChosenMethod
from lightning_xai.data.batch import Batch
from lightning_xai.evaluation.examples import Candidate, ExampleGallery, Pixels
from lightning_xai.evaluation.maps import maps_of
from lightning_xai.evaluation.result_cache import ResultCache
from lightning_xai.evaluation.rows import Embeddings, measure_batch
from lightning_xai.metrics.base import ChosenMetric

__all__ = ["MethodRun"]

_HEAT_DIGITS = 4
_FORMAT = 2  # of what the cache holds for an item


class MethodRun:
    """Attributes and measures batches, and keeps the rows of each item on disk.

    Args:
        label: of the method.
        chosen: the method and its options.
        metrics: what to measure; those that need a sign are skipped for methods without.
        folder: of the evaluation.
        settings: what else the rows depend on, but for the method, the metrics and their options.
        gallery: keeps examples to look at; None for none.
        batch_size: inputs that pass through a tower at a time; changes no number.

    Attributes:
        seed: of the method; 0 for one that draws no random numbers.
        metrics: what is measured, by name.
        targets: target -> row of the table of targets; of this process.
        values: rows of the table of values of this process.

    Raises:
        CacheError: the folder holds rows of other settings.
    """

    def __init__(
        self,
        label: str,
        chosen: ChosenMethod,
        metrics: Mapping[str, ChosenMetric],
        folder: Path,
        settings: Mapping[str, Any],
        gallery: ExampleGallery | None,
        batch_size: int,
    ) -> None:
        self.label = label
        self.chosen = chosen
        self.seed = int(chosen.options["seed"]) if chosen.method.stochastic else 0
        self.metrics = {
            name: metric for name, metric in metrics.items() if chosen.method.signed or not metric.spec.needs_sign
        }
        self.targets: dict[str, dict[str, Any]] = {}
        self.values: list[tuple[str, int, str, str, float, str]] = []
        self.gallery = gallery if "grounding" in self.metrics else None
        self.maps = maps_of(chosen.method, batch_size)
        self._batch_size = batch_size
        # How many at a time changes no number.
        own = {key: value for key, value in chosen.options.items() if key != "internal_batch_size"}
        measured = {name: metric.options for name, metric in self.metrics.items()}
        self.cache = ResultCache(
            folder / "rows" / f"{label},seed={self.seed}",
            {
                **settings,
                "format": _FORMAT,
                "metrics": measured,
                "method": chosen.name,
                "options": own,
                # Another version of a plug-in may compute something else.
                "packages": sorted({METHODS.origin(chosen.name), *(each.origin for each in self.metrics.values())}),
            },
        )

    def has(self, indices: Sequence[int]) -> bool:
        """Whether all of these items are in the cache."""
        return all(index in self.cache for index in indices)

    def compute(self, batch: Batch, embeddings: Embeddings) -> None:
        """Attribute and measure a batch that has passed through the model, and keep its rows on disk."""
        rows = measure_batch(batch, self.maps, list(self.metrics.values()), embeddings, self._batch_size)
        records: dict[int, dict[str, Any]] = {
            index: {"targets": [], "values": [], "heats": {}} for index in batch.index.tolist() if index >= 0
        }
        index_of = {target["target"]: target["index"] for target in rows.targets}
        for target in rows.targets:
            records[target["index"]]["targets"].append(target)
        for name, metric, value, excluded in rows.values:
            number = None if math.isnan(value) else value
            records[index_of[name]]["values"].append((name, metric, number, excluded))
        for _, target, heat in rows.phrases if self.gallery is not None else ():
            digits = [[float(f"{value:.{_HEAT_DIGITS}g}") for value in line] for line in heat.tolist()]
            records[target["index"]]["heats"][target["target"]] = digits
        for index, record in records.items():
            self.cache.put(index, record)
        self.cache.flush()

    def collect(self, indices: Sequence[int], pixels: Callable[[int], Pixels]) -> None:
        """Add the rows of some items, which are in the cache.

        Args:
            indices: of the items.
            pixels: index to picture, for those that are kept to look at.
        """
        candidates: list[Candidate] = []
        for index in indices:
            record = self.cache[index]
            found: dict[tuple[str, str], float] = {}
            for name, metric, number, excluded in record["values"]:
                value = math.nan if number is None else number
                self.values.append((self.label, self.seed, name, metric, value, excluded))
                found[name, metric] = value
            targets = {target["target"]: target for target in record["targets"]}
            self.targets |= targets
            candidates += [
                Candidate.of(targets[name], found[name, "gamma"], found[name, "rho"] == 1, heat)
                for name, heat in record["heats"].items()
            ]
        if self.gallery is not None:
            self.gallery.add(candidates, pixels)
