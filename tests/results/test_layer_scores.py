"""Methods by layers, and a referee, from made-up tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from result_folders import METRICS, target
from scipy.stats import spearmanr

from lightning_xai.results.layers import gamma_agreement, layer_scores, sweeps
from lightning_xai.results.record import MethodRecord, ResultRecord
from lightning_xai.results.runs import Measurement
from lightning_xai.results.table import ResultTable


def measured(gammas: dict[str, list[float]], methods: dict[str, MethodRecord]) -> Measurement:
    """An evaluation with these gammas; NaN was not measured."""
    rows = [
        (label, 0, f"phrase/{i}/0", name, value, "no_positive" if math.isnan(value) else "")
        for label, values in gammas.items()
        for i, value in enumerate(values)
        for name in ("gamma", "rho")
    ]
    targets = [target("phrase", i, 0, "ring", phrase="a ring") for i in range(len(next(iter(gammas.values()))))]
    record = ResultRecord(kind="evaluation", methods=methods, metrics={"grounding": METRICS["grounding"]})
    return Measurement("run", "", record, ResultTable.of(rows, targets), "shapes")


def at(image: int, text: int) -> MethodRecord:
    return MethodRecord(name="feature_pair", options={"image_layer": image, "text_layer": text})


REFEREE = MethodRecord(name="banzhaf_pairs")


def test_gammas_are_compared_phrase_by_phrase_where_both_were_measured() -> None:
    draw = np.random.default_rng(0)
    own, others = draw.integers(0, 6, 40) / 5, draw.integers(0, 6, 40) / 5  # with ties
    own[3], others[7] = math.nan, math.nan
    both = ~np.isnan(own) & ~np.isnan(others)
    a, b = own[both], others[both]
    measurement = measured({"fp": own.tolist(), "judge": others.tolist()}, {"fp": at(0, 0), "judge": REFEREE})
    found = gamma_agreement(measurement, "fp", "judge")
    assert found.count == 38
    assert found.correlation == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert found.difference == pytest.approx((a - b).mean(), abs=1e-12)
    assert found.error == pytest.approx((a - b).std(ddof=1) / math.sqrt(38), abs=1e-12)
    assert found.both_above_50 == ((a > 0.5) & (b > 0.5)).mean()
    itself = gamma_agreement(measurement, "judge", "judge")
    assert (itself.correlation, itself.difference) == (1, 0)


def test_without_a_shared_phrase_there_is_no_number() -> None:
    measurement = measured({"fp": [math.nan, 0.5], "judge": [0.5, math.nan]}, {"fp": at(0, 0), "judge": REFEREE})
    found = gamma_agreement(measurement, "fp", "judge")
    assert found.count == 0
    assert math.isnan(found.correlation)


def test_a_sweep_goes_from_the_inputs_to_the_last_layers() -> None:
    labels = {"fp,-1,-1": at(-1, -1), "fp,0,-1": at(0, -1), "fp,10,0": at(10, 0), "fp,2,0": at(2, 0), "judge": REFEREE}
    (sweep,) = sweeps(measured({label: [0.5] for label in labels}, labels))
    assert sweep.method == "fp"
    assert list(sweep.labels) == [(0, -1), (2, 0), (10, 0), (-1, -1)]
    assert sweep.axes == ([0, 2, 10, -1], [0, -1])


def test_labels_of_any_kind_make_a_sweep_and_one_pair_of_layers_makes_none() -> None:
    (sweep,) = sweeps(measured({"ends": [0.5], "starts": [0.5]}, {"ends": at(-1, -1), "starts": at(0, 0)}))
    assert (sweep.method, sweep.labels) == ("feature_pair", {(0, 0): "starts", (-1, -1): "ends"})
    assert sweeps(measured({"ends": [0.5], "judge": [0.5]}, {"ends": at(-1, -1), "judge": REFEREE})) == []


def test_scores_by_layer_are_those_of_the_metric() -> None:
    scores = layer_scores(measured({"fp": [0.25, 0.75]}, {"fp": at(0, 0)}), ["fp"])
    assert scores.loc["fp", ["gamma_mean", "gamma_above_50"]].tolist() == [0.5, 0.5]
    assert math.isnan(scores.loc["fp", "agreement"])
