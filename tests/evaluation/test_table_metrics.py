"""From rows to metrics: new rows and stored ones alike, by plain Python."""

from __future__ import annotations

import json
import math
import random
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from lightning_xai.evaluation.table_metrics import TableMetrics, counts_of

from lightning_xai.exclusion import Exclusion
from lightning_xai.results.schema import TABLES

LABELS = ("cat", "dog", "unseen")
CPU = torch.device("cpu")
Tables = dict[str, list[dict[str, Any]]]


def random_item(seed: int) -> Tables:
    """The rows of one item as an evaluation makes them, with what is not there as None."""
    draw = random.Random(seed)
    grounding = []
    for _ in range(draw.randrange(4)):
        reason = draw.choice(["measured", "measured", "measured", *(why.name.lower() for why in Exclusion if why)])
        measured = reason == "measured"
        grounding.append(
            {
                "label": draw.choice(LABELS[:2]),
                "reason": reason,
                "gamma": draw.random() if measured else None,
                "hit": draw.random() < 0.5 if measured else None,
            }
        )
    captions = range(draw.randrange(1, 4))
    return {
        "grounding": grounding,
        "other_objects": [{"own": draw.gauss(0.1, 1), "other": draw.gauss(-0.1, 1)} for _ in captions],
        "hard_negatives": [{"delta": draw.gauss(-0.1, 1)} for _ in captions],
        "confidence": [{name: draw.random() for name in ("similarity", "image_kept", "text_kept")} for _ in captions],
        "localization": [{"boxes": 1, "iou": draw.choice([draw.random(), None])} for _ in captions],
    }


ITEMS = [random_item(seed) for seed in range(40)]
ALL: Tables = {table: [row for item in ITEMS for row in item[table]] for table in TABLES}


def filled(items: Iterable[Mapping[str, Sequence[Mapping[str, Any]]]]) -> TableMetrics:
    metrics = TableMetrics(TABLES, LABELS, CPU)
    for item in items:
        metrics.update(item)
    return metrics


def test_numbers_agree_with_plain_python() -> None:
    numbers, summary = filled(ITEMS).compute()
    measured = [row for row in ALL["grounding"] if row["reason"] == "measured"]
    ious = [row["iou"] for row in ALL["localization"] if row["iou"] is not None]
    pairs = [tuple(row[name] for name in ("similarity", "image_kept", "text_kept")) for row in ALL["confidence"]]
    deltas = [row["delta"] for row in ALL["hard_negatives"]]
    expected = {
        "gamma_mean": statistics.fmean(row["gamma"] for row in measured),
        "gamma_above_50": statistics.fmean(row["gamma"] > 0.5 for row in measured),
        "gamma_above_80": statistics.fmean(row["gamma"] > 0.8 for row in measured),
        "rho": statistics.fmean(row["hit"] for row in measured),
        "own_positive": statistics.fmean(row["own"] > 0 for row in ALL["other_objects"]),
        "other_negative": statistics.fmean(row["other"] < 0 for row in ALL["other_objects"]),
        "delta_negative": statistics.fmean(delta < 0 for delta in deltas),
        "delta_mean": statistics.fmean(deltas),
        "image_drop": statistics.fmean(max(0, o - image) for o, image, _ in pairs),
        "image_increase": statistics.fmean(image > o for o, image, _ in pairs),
        "text_drop": statistics.fmean(max(0, o - text) for o, _, text in pairs),
        "text_increase": statistics.fmean(text > o for o, _, text in pairs),
        "localization_iou": statistics.fmean(ious),
    }
    assert numbers == pytest.approx(expected, abs=1e-12)
    assert 10 < len(measured) < len(ALL["grounding"])
    assert 10 < len(ious) < len(ALL["localization"])
    assert summary is not None
    assert summary.pairs == len(measured)
    assert summary.per_class["dog"].pairs == sum(row["label"] == "dog" for row in measured)
    for why in Exclusion:
        if why is not Exclusion.MEASURED:
            name = why.name.lower()
            assert summary.left_out[name] == sum(row["reason"] == name for row in ALL["grounding"])


def test_rows_that_were_stored_and_rows_in_one_piece_give_the_same_bits() -> None:
    expected = repr(filled(ITEMS).compute())
    assert repr(filled([ALL]).compute()) == expected
    assert repr(filled(json.loads(json.dumps(ITEMS[::-1]))).compute()) == expected


def test_tables_that_were_not_asked_for_are_not_counted() -> None:
    metrics = TableMetrics(["localization"], LABELS, CPU)
    metrics.update(ALL)
    numbers, summary = metrics.compute()
    assert list(numbers) == ["localization_iou"]
    assert summary is None


def test_an_item_may_lack_tables_and_a_metric_without_any_item_is_nan_and_says_nothing() -> None:
    metrics = TableMetrics(TABLES, LABELS, CPU)
    metrics.update({"localization": [{"iou": 0.5}], "grounding": []})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers, summary = metrics.compute()
    assert numbers.pop("localization_iou") == 0.5
    assert len(numbers) == 12
    assert all(map(math.isnan, numbers.values()))
    assert summary is not None
    assert summary.pairs == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(math.isnan, filled([]).compute()[0].values()))


def test_an_unknown_reason_or_class_is_an_error() -> None:
    for change, name in (({"reason": "bored"}, "BORED"), ({"label": "zebra"}, "zebra")):
        with pytest.raises(KeyError, match=name):
            filled([{"grounding": [{"label": "cat", "reason": "measured", "gamma": 0.5, "hit": True} | change]}])


def test_counts_add_up_to_the_rows_and_name_every_reason() -> None:
    for table, rows in ALL.items():
        counts = counts_of(table, rows)
        assert sum(counts.values()) == len(rows)
        assert next(iter(counts)) == "measured"
        if table in ("other_objects", "hard_negatives", "confidence"):
            assert counts == {"measured": len(rows)}
    reasons = counts_of("grounding", ALL["grounding"])
    for reason, count in reasons.items():
        assert count == sum(row["reason"] == reason for row in ALL["grounding"]) > 0
    assert counts_of("localization", ALL["localization"])["no_box"] == sum(
        r["iou"] is None for r in ALL["localization"]
    )


@pytest.mark.parametrize("table", TABLES)
def test_nothing_is_none_measured(table: str) -> None:
    assert counts_of(table, iter(())) == {"measured": 0}
