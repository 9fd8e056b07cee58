from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lightning_xai.report.comparison import Comparison, OrderTest, comparison_table, pairs_to_compare, why_not
from lightning_xai.results.run_folders import load_runs
from result_folders import grounding_rows, write_evaluation, write_roar, write_training

from lightning_xai.report.tables import per_pair_csv
from lightning_xai.results.stochastic_order import almost_stochastic_order

TEST = OrderTest(bootstrap_samples=50)
SKILLS = {"feature_pair": 0.4, "m2ib": 0.5, "random": 0.1}


def names(folders: list[Path]) -> list[tuple[str, str, str]]:
    return [(first.name, second.name, first.label) for first, second in pairs_to_compare(load_runs(folders))]


def test_runs_are_compared_method_by_method_and_controls_are_not(tmp_path: Path) -> None:
    for name in "abc":
        write_evaluation(tmp_path / name, SKILLS)
    found = names([tmp_path / name for name in "abc"])
    assert found == [(x, y, label) for x, y in ("ab", "ac", "bc") for label in ("feature_pair", "m2ib")]


def test_a_training_is_compared_by_its_first_last_and_second_state_and_with_others_by_its_last(tmp_path: Path) -> None:
    write_training(tmp_path / "t", [0.1, 0.2, 0.3, 0.4])
    write_evaluation(tmp_path / "e", SKILLS)
    assert names([tmp_path / "t"]) == [
        ("before", "epoch 3", "feature_pair"),
        ("before", "epoch 1", "feature_pair"),
        ("epoch 3", "epoch 1", "feature_pair"),
    ]
    assert names([tmp_path / "t", tmp_path / "e"])[3:] == [("t, epoch 3", "e", "feature_pair")]
    write_training(tmp_path / "short", [0.1, 0.2])
    assert names([tmp_path / "short"]) == [("before", "epoch 1", "feature_pair")]
    write_roar(tmp_path / "r", SKILLS)
    assert names([tmp_path / "r", tmp_path / "e"]) == []


def test_the_verdict_is_that_of_the_test_in_both_directions(tmp_path: Path) -> None:
    for name, skill in (("low", 0.2), ("high", 0.8), ("same", 0.2)):
        write_evaluation(tmp_path / name, {"feature_pair": skill})
    low, high, same = (run.groundings[0] for run in load_runs([tmp_path / name for name in ("low", "high", "same")]))
    up, down, level = Comparison.of(low, high, TEST), Comparison.of(high, low, TEST), Comparison.of(low, same, TEST)
    assert up.better is high
    assert down.better is high
    assert level.better is None
    assert up.second_above == almost_stochastic_order(high.gammas, low.gammas, bootstrap_samples=50)
    assert up.first_above == almost_stochastic_order(low.gammas, high.gammas, bootstrap_samples=50)
    assert str(down).startswith("high grounds better than low (feature_pair): ε_min = 0.0")
    assert "is not shown to ground better or worse" in str(level)
    table = comparison_table([up, down, level], TEST)
    assert [row[3].text for row in table.rows] == ["second better", "first better", "undecided"]
    headings = [f"{column.group}: {column.heading}" for column in table.columns]
    cells = dict(zip(headings, table.rows[0], strict=True))
    assert cells["is the second larger?: ε_min"].value == up.second_above.epsilon_min
    assert cells["is the first larger?: violation"].value == up.first_above.violation_ratio
    assert cells["mean γ: first"].value == pytest.approx(float(np.mean(low.gammas)))
    assert "for all of them, ask for --alpha 0.0017" in table.note


def test_gammas_of_other_data_are_not_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"feature_pair": 0.4})
    write_evaluation(tmp_path / "pixels", {"feature_pair": 0.4}, fingerprint="beef")
    write_evaluation(tmp_path / "coco", {"feature_pair": 0.4}, data="coco", images=90)
    runs = load_runs([tmp_path / name for name in ("a", "pixels", "coco")])
    first, pixels, coco = (run.groundings[0] for run in runs)
    assert why_not(first, first) is None
    assert "different data, two versions of shapes" in str(why_not(first, pixels))
    told = str(why_not(first, coco))
    assert told.startswith("a and coco are not compared by γ (feature_pair): they were measured on different data")
    assert "shapes and coco" in told


def test_other_methods_and_other_classes_are_said(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS)
    write_training(tmp_path / "t", [0.5])
    rows = grounding_rows(0.5)
    for row in rows:
        row["label"] = row["label"].replace("circle", "disc").replace("star", "disc")
    per_pair_csv(tmp_path / "t" / "grounding" / "pairs-epoch=000.csv", rows, tuple(rows[0]))
    evaluation, training = load_runs([tmp_path / "a", tmp_path / "t"])
    assert "are different methods" in str(why_not(*evaluation.groundings[:2]))
    told = str(why_not(evaluation.groundings[0], training.groundings[0]))
    assert "with other classes (2 only in a, 1 only in t, before)" in told


def test_without_a_measured_phrase_nothing_is_compared(tmp_path: Path) -> None:
    write_training(tmp_path / "a", [0.5])
    write_training(tmp_path / "b", [0.5])
    rows = [row | {"reason": "no_positive", "gamma": None, "hit": None} for row in grounding_rows(0.5)]
    per_pair_csv(tmp_path / "b" / "grounding" / "pairs-epoch=000.csv", rows, tuple(rows[0]))
    first, second = (run.groundings[0] for run in load_runs([tmp_path / "a", tmp_path / "b"]))
    assert "no measured phrase" in str(why_not(first, second))
