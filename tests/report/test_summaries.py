"""The numbers of the papers' tables are those of the per-item tables, computed here once more in plain Python."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from lightning_xai.report.summaries import (
    degradation_table,
    grid_tables,
    grounding_table,
    hard_negatives_table,
    left_out_table,
    progress_table,
    runs_table,
    signs_table,
)
from lightning_xai.results.run_folders import load_runs
from result_folders import metrics_of, write_evaluation, write_grid, write_roar, write_training

from lightning_xai.report.paper_table import Cell, PaperTable
from lightning_xai.results.schema import EvaluationResult

SKILLS = {"feature_pair": 0.6, "m2ib": 0.5, "random": 0.1, "gaussian": 0.2}


def headings(table: PaperTable | None) -> list[str]:
    assert table is not None
    return [f"{column.group}|{column.heading}" if column.group else column.heading for column in table.columns]


def rows_of(table: PaperTable | None) -> list[dict[str, Cell]]:
    assert table is not None
    return [dict(zip(headings(table), row, strict=True)) for row in table.rows]


def test_grounding_is_that_of_the_rows_with_controls_apart_and_errors_over_seeds(tmp_path: Path) -> None:
    tables = write_evaluation(tmp_path / "a", SKILLS, seeds=3)
    table = grounding_table(load_runs([tmp_path / "a"]))
    assert table is not None
    assert [body.heading for body in table.bodies] == ["", "Controls, which know nothing of the model"]
    assert table.title == "Visual-linguistic grounding on shapes"
    names = {"γ > 0.5 [%] ↑": "gamma_above_50", "γ > 0.8 [%] ↑": "gamma_above_80", "ρ [%] ↑": "rho"}
    for row in rows_of(table):
        seeds = [metrics_of(each) for each in tables[row["method"].text]]
        for heading, metric in names.items():
            values = [100 * found[metric] for found in seeds]
            assert row[heading].value == pytest.approx(statistics.fmean(values))
            if len(values) > 1:
                assert row[heading].error == pytest.approx(statistics.stdev(values) / math.sqrt(3))
                assert row[heading].text == f"{statistics.fmean(values):.1f} ± {row[heading].error:.1f}"
            else:
                assert row[heading].text == f"{values[0]:.1f}"
        measured = [r for r in tables[row["method"].text][0]["grounding"] if r["reason"] == "measured"]
        assert row["pairs"].value == len(measured)
    assert [row["γ > 0.5 [%] ↑"].best for row in rows_of(table)] == [True, False, False, False]


def test_one_model_on_two_data_sets_is_one_line_with_a_group_of_columns_each(tmp_path: Path) -> None:
    skills = {"feature_pair": 0.6}
    write_evaluation(tmp_path / "a", skills, data="coco", fingerprint="1", weights="w")
    write_evaluation(tmp_path / "b", skills, data="flickr", fingerprint="2", weights="w", images=90)
    write_evaluation(tmp_path / "c", skills, data="coco", fingerprint="1", weights="v")
    table = grounding_table(load_runs([tmp_path / name for name in "abc"]))
    first, second = rows_of(table)
    assert (first["run"].text, second["run"].text) == ("a / b", "c")
    assert first["coco|pairs"].value == 214
    assert first["flickr|pairs"].value == 160
    assert second["flickr|pairs"] == Cell("–")


def test_data_sets_of_one_name_and_other_phrases_are_told_apart(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"feature_pair": 0.6})
    write_evaluation(tmp_path / "b", {"feature_pair": 0.6}, images=90)
    table = grounding_table(load_runs([tmp_path / "a", tmp_path / "b"]))
    assert {heading.partition("|")[0] for heading in headings(table) if "|" in heading} == {"shapes", "shapes (b)"}


def test_the_same_model_twice_on_the_same_data_is_two_lines(tmp_path: Path) -> None:
    for name, skill in (("a", 0.6), ("b", 0.3)):
        write_evaluation(tmp_path / name, {"feature_pair": skill})
    table = grounding_table(load_runs([tmp_path / "a", tmp_path / "b"]))
    assert [row["run"].text for row in rows_of(table)] == ["a", "b"]


def test_states_of_a_training_stand_beside_evaluations(tmp_path: Path) -> None:
    every = write_training(tmp_path / "t", [0.1, 0.6])
    write_evaluation(tmp_path / "e", {"feature_pair": 0.3})
    rows = rows_of(grounding_table(load_runs([tmp_path / "e", tmp_path / "t"])))
    assert [(row["run"].text, row["state"].text) for row in rows] == [("e", ""), ("t", "before"), ("t", "epoch 1")]
    gammas = [row["gamma"] for row in every[1] if row["reason"] == "measured"]
    expected = 100 * sum(gamma > 0.5 for gamma in gammas) / len(gammas)
    assert rows[2]["γ > 0.5 [%] ↑"].value == pytest.approx(expected)


def test_signs_and_hard_negatives_are_those_of_the_rows_for_methods_with_a_sign(tmp_path: Path) -> None:
    tables = write_evaluation(tmp_path / "a", SKILLS, seeds=2)
    runs = load_runs([tmp_path / "a"])
    signs, negatives = rows_of(signs_table(runs)), rows_of(hard_negatives_table(runs))
    assert [row["method"].text for row in signs] == ["feature_pair", "random", "gaussian"]
    for sign, negative in zip(signs, negatives, strict=True):
        found = [metrics_of(each) for each in tables[sign["method"].text]]
        mean = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
        assert sign["own box positive [%] ↑"].value == pytest.approx(100 * mean["own_positive"])
        assert sign["other box negative [%]"].value == pytest.approx(100 * mean["other_negative"])
        assert negative["δ < 0 [%] ↑"].value == pytest.approx(100 * mean["delta_negative"])
        assert negative["mean δ ↓"].value == pytest.approx(mean["delta_mean"])
        assert negative["pairs"].value == 120


def test_signs_and_hard_negatives_have_a_best_on_each_data_set(tmp_path: Path) -> None:
    skills = {"feature_pair": 0.9, "integrated": 0.1}
    write_evaluation(tmp_path / "a", skills, data="coco", fingerprint="1")
    write_evaluation(tmp_path / "b", {label: skill / 9 for label, skill in skills.items()}, fingerprint="2")
    write_evaluation(tmp_path / "c", {"feature_pair": 0.5}, data="coco", fingerprint="1", weights="bb")
    write_evaluation(tmp_path / "d", {"feature_pair": 0.99}, data="coco", fingerprint="3")  # another coco
    moved = EvaluationResult.load(tmp_path / "c")
    replace(moved, data={**moved.data, "folder": "elsewhere", "broken_records": 1}).save(tmp_path / "c")
    runs = load_runs([tmp_path / name for name in "abcd"])
    for table, heading in (
        (signs_table(runs), "own box positive [%] ↑"),
        (hard_negatives_table(runs), "δ < 0 [%] ↑"),
    ):
        values = {(row["run"].text, row["method"].text): row[heading] for row in rows_of(table)}
        assert [key for key in values if key[0] in "ac"] == [
            *((("a", label)) for label in skills),
            ("c", "feature_pair"),
        ]
        for names in ("ac", "b"):
            there = {key: cell for key, cell in values.items() if key[0] in names}
            best = max(float(cell.value or 0) for cell in there.values())
            assert {key for key, cell in there.items() if cell.best} == {
                key for key, cell in there.items() if cell.value == best
            }
        assert not values["d", "feature_pair"].best, "it is the only one on its data"


def test_degradation_has_methods_side_by_side_and_the_best_of_each_row_bold(tmp_path: Path) -> None:
    tables = write_evaluation(tmp_path / "a", SKILLS, seeds=2)
    roar = write_roar(tmp_path / "r", SKILLS)
    table = degradation_table(load_runs([tmp_path / "a", tmp_path / "r"]))
    assert headings(table)[3:] == ["feature_pair", "m2ib", "controls|random", "controls|gaussian"]
    rows = rows_of(table)
    assert [(row["run"].text, row["of"].text, row["measure"].text.partition(" [")[0]) for row in rows] == [
        ("a", "image", "Conf. drop"),
        ("a", "image", "Conf. increase"),
        ("a", "image", "Localization"),
        ("r", "image", "ROAR+"),
        ("a", "text", "Conf. drop"),
        ("a", "text", "Conf. increase"),
        ("r", "text", "ROAR+"),
    ]
    metrics = ["image_drop", "image_increase", "localization_iou", "", "text_drop", "text_increase", ""]
    for row, metric in zip(rows, metrics, strict=True):
        values = {}
        for label in SKILLS:
            cell = row[label if label in ("feature_pair", "m2ib") else f"controls|{label}"]
            if metric:
                seeds = [100 * metrics_of(each)[metric] for each in tables[label]]
                values[label] = statistics.fmean(seeds)
            else:
                losses = roar.methods[label].losses[row["of"].text]
                scores = [100 * (losses[s] - loss) / loss for s, loss in roar.original.items()]
                values[label] = statistics.fmean(scores)
                assert cell.error == pytest.approx(statistics.stdev(scores) / math.sqrt(3))
            assert cell.value == pytest.approx(values[label])
        better = min if "↓" in row["measure"].text else max
        best = better(("feature_pair", "m2ib"), key=lambda label: values[label])
        assert row[best].best
        assert not any(cell.best for heading, cell in row.items() if heading != best)


def test_a_control_that_gets_more_than_any_method_is_not_called_the_best(tmp_path: Path) -> None:
    skills = {"feature_pair": 0.2, "m2ib": 0.3, "random": 0.9}
    write_evaluation(tmp_path / "a", skills)
    write_roar(tmp_path / "r", skills)
    runs = load_runs([tmp_path / "a", tmp_path / "r"])
    for row in rows_of(degradation_table(runs)):
        assert any(cell.best for cell in row.values())
        assert not row["controls|random"].best
    for table in (grounding_table(runs), signs_table(runs), hard_negatives_table(runs)):
        assert not any(cell.best for row in rows_of(table) if row["method"].text == "random" for cell in row.values())


def test_the_grid_is_the_papers_with_its_one_best_point(tmp_path: Path) -> None:
    result = write_grid(tmp_path / "g")
    image, text = grid_tables(load_runs([tmp_path / "g"]))
    assert [column.heading for column in image.columns] == ["β", "σ² = 1", "σ² = 0.1", "σ² = 0.01"]
    assert [body.heading for body in image.bodies] == ["ℓ = 7", "ℓ = 8", "ℓ = 9"]
    for modality, table in (("image", image), ("text", text)):
        scores = {}
        for layer, body in zip((7, 8, 9), table.bodies, strict=True):
            for beta, row in zip((1, 0.1, 0.01), body.rows, strict=True):
                assert row[0].text == str(beta)
                for variance, cell in zip((1, 0.1, 0.01), row[1:], strict=True):
                    losses = result.methods[f"m2ib,layer={layer},beta={beta},variance={variance}"].losses[modality]
                    expected = 100 * statistics.fmean((loss - 2.0) / 2.0 for loss in losses.values())
                    assert cell.value == pytest.approx(expected)
                    scores[layer, beta, variance] = (expected, cell.best)
        best = max(scores, key=lambda point: scores[point][0])
        assert [point for point, (_, marked) in scores.items() if marked] == [best]


def test_the_points_of_a_grid_are_found_by_number(tmp_path: Path) -> None:
    result = write_grid(tmp_path / "g")
    resolved = {
        label: replace(m, options={name: float(value) for name, value in m.options.items()})
        for label, m in result.methods.items()
    }
    replace(result, methods=resolved).save(tmp_path / "g")
    write_grid(tmp_path / "h")
    as_asked, other = (grid_tables(load_runs([tmp_path / name])) for name in "hg")
    assert [table.bodies for table in other] == [table.bodies for table in as_asked]
    assert all(isinstance(cell.value, float) for table in other for row in table.rows for cell in row[1:])


def test_a_training_shows_its_epochs_and_the_lowest_loss(tmp_path: Path) -> None:
    write_training(tmp_path / "t", [0.1, 0.6, 0.4])
    (run,) = load_runs([tmp_path / "t"])
    rows = rows_of(progress_table(run))
    assert [row["after"].text for row in rows] == ["before", "epoch 1", "epoch 2"]
    assert [row["loss ↓"].text for row in rows] == ["4.000", "3.500", "3.000"]
    assert [row["loss ↓"].best for row in rows] == [False, False, True]
    assert [row["γ mean ↑"].best for row in rows] == [False, True, False]
    assert [row["i→t R@1 [%] ↑"].text for row in rows] == ["0.0", "10.0", "20.0"]


def test_what_was_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    tables = write_evaluation(tmp_path / "a", {"feature_pair": 0.5}, seeds=1)
    write_training(tmp_path / "t", [0.5])
    rows = rows_of(left_out_table(load_runs([tmp_path / "a", tmp_path / "t"])))
    counts = {
        (row["run"].text, row["metric"].text): (row["measured"].value, row["left out|several instances"].value)
        for row in rows
    }
    grounding = tables["feature_pair"][0]["grounding"]
    out = sum(row["reason"] == "several_instances" for row in grounding)
    assert counts["a", "grounding"] == counts["t", "grounding"] == (len(grounding) - out, out)
    assert counts["a", "confidence"] == (120, None)


def test_without_data_there_is_no_table(tmp_path: Path) -> None:
    write_roar(tmp_path / "r", SKILLS)
    runs = load_runs([tmp_path / "r"])
    for make in (grounding_table, signs_table, hard_negatives_table, left_out_table):
        assert make(runs) is None
    assert progress_table(runs[0]) is None
    assert grid_tables(runs) == []
    assert [cell.text for cell in runs_table(runs).rows[0][:4]] == ["r", "ROAR+", "ViT-B-16, openai", "shapes"]
    write_training(tmp_path / "t", [0.5])
    assert degradation_table(load_runs([tmp_path / "t"])) is None
