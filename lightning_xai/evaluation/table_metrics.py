"""From the table rows of items to metrics: an accumulator for each table, filled alike with new and stored rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.confidence import ConfidenceMetric
from lightning_xai.metrics.grounding import GroundingMetric, GroundingSummary
from lightning_xai.metrics.hard_negatives import HardNegativesMetric
from lightning_xai.metrics.localization import LocalizationMetric
from lightning_xai.metrics.other_objects import OtherObjectsMetric

__all__ = ["TableMetrics", "counts_of"]

Row = Mapping[str, Any]
_COLUMNS = {
    "other_objects": ("own", "other"),
    "hard_negatives": ("delta",),
    "confidence": ("similarity", "image_kept", "text_kept"),
    "localization": ("iou",),
}
_CLASSES: dict[str, type[Metric]] = {
    "other_objects": OtherObjectsMetric,
    "hard_negatives": HardNegativesMetric,
    "confidence": ConfidenceMetric,
    "localization": LocalizationMetric,
}


class TableMetrics:
    """The metrics of one method and seed.

    Args:
        tables: which ones, keys of `report.results.TABLES`.
        label_names: the split's classes.
        device: where states are, as collectives need it.
    """

    def __init__(self, tables: Iterable[str], label_names: Sequence[str], device: torch.device) -> None:
        self._labels = {label: number for number, label in enumerate(label_names)}
        self._grounding = GroundingMetric(label_names).to(device) if "grounding" in (names := list(tables)) else None
        self._means = {name: _CLASSES[name]().to(device) for name in names if name in _CLASSES}
        self.device = device
        # Else torchmetrics warns of those of which there is no item; their numbers are NaN, and say so.
        self.update({})

    def update(self, tables: Mapping[str, Sequence[Row]]) -> None:
        """Add the rows of an item, or of several."""
        if self._grounding is not None:
            rows = tables.get("grounding", ())
            hits = torch.tensor([bool(row["hit"]) for row in rows], dtype=torch.bool)
            labels = torch.tensor([self._labels[row["label"]] for row in rows], dtype=torch.int64)
            reasons = torch.tensor([int(Exclusion[row["reason"].upper()]) for row in rows], dtype=torch.int64)
            self._grounding.update(self._column(rows, "gamma"), hits, labels, reasons)
        for name, metric in self._means.items():
            rows = tables.get(name, ())
            metric.update(*(self._column(rows, column) for column in _COLUMNS[name]))

    def compute(self) -> tuple[dict[str, float], GroundingSummary | None]:
        """All numbers by name, and the grounding by class, over all ranks; every rank has to call this.

        Numbers of which there was no item at all are NaN.
        """
        numbers: dict[str, float] = {}
        summary: GroundingSummary | None = None
        if self._grounding is not None:
            summary = self._grounding.compute()
            numbers |= {name: value for name, value in summary.scalars().items() if name != "grounding_pairs"}
        for metric in self._means.values():
            numbers |= metric.compute()
        return numbers, summary

    @staticmethod
    def _column(rows: Sequence[Row], name: str) -> Tensor:
        values = [math.nan if row[name] is None else row[name] for row in rows]
        return torch.tensor(values, dtype=torch.float64)


def counts_of(table: str, rows: Iterable[Row]) -> dict[str, int]:
    """How many rows of a table were measured, and why the others were not.

    >>> rows = [{"reason": "measured"}, {"reason": "several_instances"}, {"reason": "measured"}]
    >>> counts_of("grounding", rows)
    {'measured': 2, 'several_instances': 1}
    >>> counts_of("localization", [{"iou": 0.5}, {"iou": None}])
    {'measured': 1, 'no_box': 1}
    """
    if table == "grounding":
        reasons = Counter(str(row["reason"]) for row in rows)
    elif table == "localization":
        reasons = Counter("no_box" if row["iou"] is None else "measured" for row in rows)
    else:
        reasons = Counter({"measured": sum(1 for _ in rows)})
    return {"measured": reasons.pop("measured", 0)} | dict(sorted(reasons.items()))
