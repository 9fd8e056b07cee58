from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from result_folders import target, write_roar

from lightning_xai.report.sections.metrics import agreement_table
from lightning_xai.results.method_ranks import rank_correlation
from lightning_xai.results.record import MethodRecord, MetricRecord, ResultRecord, Score
from lightning_xai.results.runs import load_runs
from lightning_xai.results.table import ResultTable, write_result

ROAD = MetricRecord(
    name="road",
    title="ROAD",
    note="",
    values=("road",),
    scores=(Score(name="road", value="road", heading="ROAD", better="up"),),
)


def test_it_is_scipys_with_ties_over_what_both_have() -> None:
    draw = np.random.default_rng(0)
    one, other = ({str(key): float(draw.integers(4)) for key in range(first, first + 20)} for first in (0, 5))
    expected = scipy.stats.spearmanr(*([scores[str(key)] for key in range(5, 20)] for scores in (one, other)))
    found, count = rank_correlation(one, other)
    assert found == pytest.approx(expected.statistic)
    assert count == 15
    assert math.isnan(rank_correlation({"a": 1.0}, {"a": 2.0})[0])
    assert math.isnan(rank_correlation({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 3.0})[0])


def write_road(folder: Path, scores: dict[str, float], fingerprint: str | None = None) -> None:
    caption = target("caption", 0, 0, "")
    rows = [(label, 0, caption["target"], "road", value, "") for label, value in scores.items()]
    record = ResultRecord(
        kind="evaluation",
        model={"name": "shapes_vit", "fingerprint": fingerprint},
        data={"name": "shapes", "fingerprint": "1"},
        methods={label: MethodRecord(name=label) for label in scores}
        | {"tuned": MethodRecord(name="m2ib", options={"beta": 1})},
        metrics={"road": ROAD},
    )
    write_result(folder, record, ResultTable.of(rows, [caption]))


def test_a_report_compares_the_orders_of_methods_by_road_and_by_roar(tmp_path: Path) -> None:
    write_road(tmp_path / "eval", {"rise": 0.3, "m2ib": 0.2, "random": 0.1, "saliency": 0.9, "tuned": 0.0})
    losses = {("rise", "image"): (3.0, 3.3), ("m2ib", "image"): (3.5, 3.6), ("random", "image"): (2.1, 2.2)}
    write_roar(tmp_path / "roar", losses)
    measurements = [each for run in load_runs([tmp_path / "eval", tmp_path / "roar"]) for each in run.measurements]
    (table,) = agreement_table(measurements)
    assert [list(row) for row in table.rows] == [["eval", "roar", pytest.approx(0.5), 3]]
    assert not list(agreement_table(measurements[:1]))
