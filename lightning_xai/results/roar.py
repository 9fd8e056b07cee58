"""ROAR+ scores from the losses in the long table (M2IB paper, section 4.4).

A `roar` folder holds the metric `validation_loss` on the original data for each method, target ("image" or "text": what
was degraded before retraining) and seed; the method `ORIGINAL` was retrained on the data as they are. Nothing here
needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pandas as pd

from lightning_xai.results.record import MetricRecord, ResultRecord, Score
from lightning_xai.results.table import VALUE_COLUMNS, ResultTable
from lightning_xai.results.trials import LOSS, MODALITIES, ORIGINAL

__all__ = ["LOSS", "MODALITIES", "ORIGINAL", "ROAR", "label_at", "roar_result", "roar_scores"]


ROAR = MetricRecord(
    name="roar",
    title="ROAR+",
    note="Rise of the validation loss after retraining without what a method finds important.",
    values=MODALITIES,
    scores=tuple(
        Score(name=f"roar_{m}", value=m, heading=f"ROAR+, {m}", better="up", percent=True) for m in MODALITIES
    ),
    chart="bars",
)


def roar_scores(record: ResultRecord, table: ResultTable) -> pd.DataFrame:
    """(l_c - l_o) / l_o for each method, modality and seed of which both losses are there; higher is better.

    Returns:
        The columns method, modality, seed and value (a fraction), methods in the order of the record. `value` is NaN
        where a retraining diverged, or left no loss to compare with.

    >>> losses = [(ORIGINAL, 0, "none", LOSS, 2.0, ""), ("rise", 0, "image", LOSS, 2.5, "")]
    >>> keys = {"key": "", "caption_index": 0, "caption": "", "label": "", "kind": "modality", "ordinal": 0}
    >>> targets = [{"target": name, "index": place, **keys} for place, name in enumerate(("image", "text", "none"))]
    >>> from lightning_xai.results.record import MethodRecord
    >>> record = ResultRecord(kind="roar", methods={"rise": MethodRecord(name="rise")})
    >>> roar_scores(record, ResultTable.of(losses, targets)).values.tolist()
    [['rise', 'image', 0, 0.25]]
    """
    losses = table.values[table.values["metric"] == LOSS]
    original = losses[losses["method"] == ORIGINAL].set_index("seed")["value"]
    kept = losses[losses["seed"].isin(original.index)].rename(columns={"target": "modality"})
    places = {name: place for place, name in enumerate((*record.methods, *MODALITIES))}
    kept = kept[kept["method"].isin(record.methods) & kept["modality"].isin(MODALITIES)]
    kept = kept.sort_values(["method", "modality", "seed"], key=lambda column: column.replace(places))
    loss = kept["seed"].map(original)
    scores = kept.assign(value=(kept["value"] - loss) / loss.where(loss != 0))
    return scores[["method", "modality", "seed", "value"]].reset_index(drop=True)


def roar_result(record: ResultRecord, table: ResultTable) -> tuple[ResultRecord, ResultTable]:
    """ROAR+ with its scores in place of losses, as the values of the metric `ROAR`."""
    # A retraining that diverged makes the mean NaN: without it, the method would look better than it is known to be.
    scores = roar_scores(record, table).assign(metric=lambda rows: rows["modality"], excluded="")
    values = scores.rename(columns={"modality": "target"})[list(VALUE_COLUMNS)]
    return msgspec.structs.replace(record, metrics={ROAR.name: ROAR}), ResultTable(values, table.targets)


def label_at(record: ResultRecord, point: Mapping[str, Any]) -> str | None:
    """The label of the first method with these options, compared as values: 1 is 1.0; None where there is none.

    >>> from lightning_xai.results.record import MethodRecord
    >>> methods = {"m2ib,beta=1": MethodRecord(name="m2ib", options={"beta": 1.0, "steps": 10})}
    >>> label_at(ResultRecord(kind="roar", methods=methods), {"beta": 1})
    'm2ib,beta=1'
    """
    for label, method in record.methods.items():
        if all(name in method.options and method.options[name] == value for name, value in point.items()):
            return label
    return None
