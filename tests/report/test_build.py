"""The sections of a report: what is in them, and the sentences in place of what is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from result_folders import (
    CLASSES,
    SKILLS,
    rewrite,
    write_evaluation,
    write_grid,
    write_roar,
    write_state,
    write_training,
)

from lightning_xai.metrics import METRICS as SPECS
from lightning_xai.report.build import build_sections, write_report
from lightning_xai.report.page import Block, Chart, Findings, HeatMaps, Note, Section, flat
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.results.effect_size import grounding_change
from lightning_xai.results.examples import read_examples
from lightning_xai.results.record import MetricRecord, Score
from lightning_xai.results.runs import load_runs
from lightning_xai.results.stochastic_order import almost_stochastic_order

TEST = OrderTest(bootstrap_samples=20)


def built(*folders: Path, method: str | None = None, **options: Any) -> dict[str, Section]:
    sections, _ = build_sections(load_runs(folders, method=method), TEST, **options)
    return {section.name: section for section in sections}


def blocks(sections: dict[str, Section], kind: type[Block]) -> dict[str, Any]:
    found = [block for section in sections.values() for block in flat(section.blocks)]
    return {getattr(block, "name", str(i)): block for i, block in enumerate(found) if isinstance(block, kind)}


def notes(sections: dict[str, Section]) -> str:
    return "\n".join(note.text for note in blocks(sections, Note).values())


def findings(sections: dict[str, Section]) -> list[str]:
    (found,) = blocks(sections, Findings).values()
    return [" ".join(item) for item in found.items]


def column(table: PaperTable, name: str) -> list[Any]:
    place = [each.full_heading for each in table.columns].index(name)
    return [row[place] for row in table.rows]


def test_an_evaluation_has_a_table_and_the_chart_of_each_metric(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS, seeds=2)
    sections = built(tmp_path / "a")
    tables, charts = blocks(sections, PaperTable), blocks(sections, Chart)
    names = ["overview", "metric-grounding", "metric-hard_negatives", "metric-confidence"]
    assert list(sections) == [*names, "significance", "gaps", "heat-maps", "appendix"]
    assert {"grounding", "hard_negatives", "confidence", "runs", "excluded", "files"} <= set(tables)
    assert {"gamma-a-on-shapes", "delta-shapes", "bars-confidence-shapes"} <= set(charts)
    table = tables["grounding"]
    assert column(table, "method") == ["feature_pair", "m2ib", "random"]
    assert table.baselines == 1
    (run,) = load_runs([tmp_path / "a"])
    expected = run.measurements[0].estimates("grounding")
    assert column(table, "ρ [%] ↑") == [scores["rho"] for scores in expected.values()]
    assert column(tables["hard_negatives"], "method") == ["feature_pair"]
    assert "Give two runs, or a training" in notes(sections)
    excluded = tables["excluded"]
    assert column(excluded, "excluded: not mentioned") == [14, 0, 0, 28, 0, 14, 0]


def test_a_metric_that_the_product_does_not_know_has_its_table_and_chart(tmp_path: Path) -> None:
    scores = (
        Score(name="mine", value="mine", heading="own <&> score", better="down"),
        Score(name="mine_too", value="mine", reduce="std", heading="own <&> score"),
    )
    mine = MetricRecord(name="mine", title="My metric", note="Lower.", values=("mine",), scores=scores, chart="bars")
    write_evaluation(tmp_path, SKILLS, examples=False)
    rewrite(tmp_path, lambda v, t: (v.replace({"metric": {"gamma": "mine"}}), t), metrics={"mine": mine})
    sections = built(tmp_path)
    assert sections["metric-mine"].title == "My metric"
    table = blocks(sections, PaperTable)["mine"]
    assert [each.name for each in table.columns[2:]] == ["own <&> score (mine)", "own <&> score (mine_too)", "targets"]
    assert {row for row, _ in table.best} == {0}
    assert "bars-mine-shapes" in blocks(sections, Chart)


def test_data_sets_have_tables_of_their_own(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS, examples=False)
    write_evaluation(tmp_path / "b", SKILLS, examples=False, fingerprint="2", name="flickr")
    write_evaluation(tmp_path / "c", SKILLS, examples=False, fingerprint="3")
    write_evaluation(tmp_path / "d", SKILLS, examples=False)
    tables = blocks(built(*(tmp_path / name for name in "abcd")), PaperTable)
    found = {name: set(column(table, "run")) for name, table in tables.items() if name.startswith("grounding")}
    assert found == {"grounding-shapes-a": {"a", "d"}, "grounding-flickr": {"b"}, "grounding-shapes-c": {"c"}}
    assert all(None not in row for name in found for row in tables[name].rows)


def test_a_training_has_its_progress_its_verdicts_and_its_classes(tmp_path: Path) -> None:
    write_training(tmp_path, [0.1, 0.3, 0.6])
    write_state(tmp_path, "test", 0.6, name="other")
    sections = built(tmp_path)
    tables = blocks(sections, PaperTable)
    progress = next(table for name, table in tables.items() if name.startswith("progress-"))
    assert column(progress, "after") == ["before", "epoch 1", "epoch 2", "test"]
    assert column(progress, "loss ↓") == [2.9, 2.7, 2.4, 2.4]
    assert {row for row, place in progress.best if progress.columns[place].name == "loss"} == {2, 3}
    assert findings(sections)[0].startswith("0.0 → ")
    assert "of its checkpoints" in notes(sections)
    pictures = blocks(sections, HeatMaps)
    assert [picture.pixels.shape for picture in pictures.values()] == [(480, 640, 3)]
    assert "progress.png" in next(iter(pictures.values())).note
    path = tmp_path / "grounding" / "progress.png"
    Image.new("RGB", (1, 2**16)).save(path)
    assert "cannot be shown: 1 x 65536 pixels are more" in notes(built(tmp_path))
    path.write_bytes(b"no picture")
    assert "cannot be shown" in notes(built(tmp_path))


def test_runs_are_compared_method_by_method_in_both_directions(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS, examples=False, options={"steps": 5})
    write_evaluation(tmp_path / "b", {**SKILLS, "feature_pair": 0.9}, examples=False, options={"steps": 9})
    write_training(tmp_path / "t", [0.1, 0.2, 0.5, 0.6], images=40)
    runs = load_runs([tmp_path / name for name in "abt"])
    _, comparisons = build_sections(runs, TEST)
    names = [(each.first.name, each.second.name, each.first.label) for each in comparisons]
    states = [("t, before", "t, epoch 3"), ("t, before", "t, epoch 1"), ("t, epoch 3", "t, epoch 1")]
    assert names == [*((*pair, "feature_pair") for pair in states), ("a", "b", "feature_pair"), ("a", "b", "m2ib")]
    found = comparisons[3]
    gammas = [run.groundings[0].gammas for run in runs[:2]]
    expected = almost_stochastic_order(gammas[1], gammas[0], bootstrap_samples=20)
    assert (found.second_above, found.better) == (expected, runs[1].groundings[0])
    assert str(found).startswith("b grounds better than a (feature_pair): ε_min = ")
    assert "not shown to ground better" in str(comparisons[4])
    sections = built(tmp_path / "a", tmp_path / "b", tmp_path / "t")
    note = blocks(sections, PaperTable)["significance"].note
    assert "The 5 comparisons are 10 tests" in note
    assert "ask for --alpha 0.0005." in note
    assert "a and b: options of feature_pair differ (steps was 5 and is 9)." in notes(sections)
    assert "a and t, epoch 3 are not compared by gamma (feature_pair)" in notes(sections)
    verdicts = [text for text in findings(sections) if "ε_min" in text]
    assert len(verdicts) == 2, "of a training from begin to end, and of the method that ranks classes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "flickr", "fingerprint": "2"}, "different data, shapes and flickr; evaluate both on the same"),
        ({"fingerprint": "2"}, "two versions of shapes"),
        ({"labels": CLASSES[:4]}, "with other classes (4 only in a, 0 only in b)"),
    ],
)
def test_other_data_are_refused_in_a_sentence(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS, examples=False)
    write_evaluation(tmp_path / "b", SKILLS, examples=False, **options)
    sections = built(tmp_path / "a", tmp_path / "b")
    assert message in notes(sections)
    assert "significance" not in blocks(sections, PaperTable)


def test_classes_are_those_of_the_method_asked_for_with_pictures_of_what_changed(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS)
    write_evaluation(tmp_path / "b", {**SKILLS, "m2ib": 0.9})
    sections = built(tmp_path / "a", tmp_path / "b", method="m2ib")
    tables = blocks(sections, PaperTable)
    table, change = tables["classes-m2ib-on-shapes"], tables["change-a-b"]
    assert column(table, "a: γ mean") == sorted(column(table, "a: γ mean"))
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    rows = [run.groundings[1].rows for run in runs]
    expected = grounding_change(*(each[each["metric"] == "gamma"] for each in rows))
    assert column(change, "effect size") == expected.gains()["smd"].tolist()
    assert {"examples-gained-b", "fixed-runs-shapes"} <= set(blocks(sections, HeatMaps))
    assert any("are the classes of shapes with the lowest mean γ" in text for text in findings(sections))
    few = built(tmp_path / "a", tmp_path / "b", min_pairs=1000)
    assert "feature_pair on shapes: no class has 1000 measured phrases" in notes(few)
    with pytest.raises(ValueError, match=r"--method rise: none of the runs has it; they have feature_pair, m2ib"):
        built(tmp_path / "a", method="rise")
    write_evaluation(tmp_path / "c", SKILLS)
    assert "None of the classes has gained or lost" in notes(built(tmp_path / "a", tmp_path / "c"))


def test_roar_has_its_bars_its_best_and_what_is_missing(tmp_path: Path) -> None:
    losses = {("m2ib", "image"): (2.5, 3.3), ("rise", "image"): (2.1, 2.2), ("random", "image"): (9.0, 9.0)}
    write_roar(tmp_path, losses, missing=[f"rise/text/{i}" for i in range(8)])
    sections = built(tmp_path)
    assert "bars-roar-shapes" in blocks(sections, Chart)
    assert "8 of the retrainings have not been run yet" in notes(sections)
    best = "m2ib finds best what the model learns from in the image: ROAR+ 37.5 %"
    assert findings(sections) == [f"{best} ({tmp_path.name})."]
    write_roar(tmp_path, {("m2ib", "image"): (2.5,), ("random", "image"): (9.0,)})
    assert findings(built(tmp_path)) == [], "one method alone is not the best"


def test_a_grid_has_a_table_for_each_modality_and_no_bars(tmp_path: Path) -> None:
    write_grid(tmp_path)
    sections = built(tmp_path)
    (grid,) = (table for name, table in blocks(sections, PaperTable).items() if name.startswith("grid-"))
    assert grid.texts == [["3", "0.00", "12.50"], ["9", "25.00", "–"]]
    assert not blocks(sections, Chart)


def test_an_evaluation_without_any_measured_value_has_its_counts_and_no_chart(tmp_path: Path) -> None:
    write_evaluation(tmp_path, SKILLS, examples=False)
    rewrite(tmp_path, lambda v, t: (v.assign(value=np.nan, excluded="span_cut_off"), t))
    sections = built(tmp_path)
    assert not blocks(sections, Chart)
    assert set(column(blocks(sections, PaperTable)["excluded"], "measured")) == {0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": "examples/none.png"}, "No such file"),
        ({"heat": [[0.0], [0.0, 1.0]]}, "expected a map"),
    ],
)
def test_an_example_that_cannot_be_drawn_is_counted_with_its_reason(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4})
    path = tmp_path / "feature_pair" / "examples.json"
    record = json.loads(path.read_text())
    record["examples"][0] |= changed
    path.write_text(json.dumps(record))
    text = notes(built(tmp_path))
    assert "1 of the examples cannot be drawn" in text
    assert message in text


def test_heat_maps_show_what_all_columns_share_and_the_worst_first(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4, "m2ib": 0.5})
    before = blocks(built(tmp_path), HeatMaps)
    assert before[f"fixed-{tmp_path.name}"].alt.startswith("Heat maps of 3 phrases by feature_pair, m2ib")
    assert {f"failures-{tmp_path.name}-{label}" for label in ("feature_pair", "m2ib")} <= set(before)
    path = tmp_path / "m2ib" / "examples.json"
    record = json.loads(path.read_text())
    record["examples"] = record["examples"][1:]
    path.write_text(json.dumps(record))
    assert len(read_examples(path.parent)) == len(CLASSES) - 1
    after = blocks(built(tmp_path), HeatMaps)
    assert after[f"fixed-{tmp_path.name}"].alt.startswith("Heat maps of 2 phrases")


def written(out: Path, folders: Sequence[Path]) -> Path:
    sections, _ = build_sections(load_runs(folders), TEST)
    return write_report(out, "t", "", sections, "")


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    write_training(tmp_path / "training", [0.1, 0.5])
    pages = [written(tmp_path / name, [tmp_path / "training"]).read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_the_files_of_an_earlier_report_go_and_no_others(tmp_path: Path) -> None:
    write_training(tmp_path / "training", [0.1, 0.5])
    write_roar(tmp_path / "roar", {("m2ib", "image"): (2.5,), ("rise", "image"): (2.1,)})
    out = tmp_path / "out"
    for name in ("training", "roar"):
        written(out, [tmp_path / name])
        (out / "tables" / "mine.csv").write_text("kept")
    assert not (out / "tables" / "grounding.csv").exists()
    assert not list((out / "figures").glob("gamma*"))
    assert (out / "tables" / "mine.csv").read_text() == "kept"
    listed = json.loads((out / "report.json").read_text())["files"]
    found = {str(path.relative_to(out)) for path in out.glob("*/*")} - {"tables/mine.csv"}
    assert sorted(found) == sorted(listed)
    for path in out.glob("figures/*.png"):
        with Image.open(path) as picture:
            picture.load()
    (tmp_path / "precious.csv").write_text("kept")
    names = ["tables/../../precious.csv", str(tmp_path / "precious.csv"), 3]
    (out / "report.json").write_text(json.dumps({"files": names}))
    written(out, [tmp_path / "roar"])
    assert (tmp_path / "precious.csv").read_text() == "kept"


def test_how_far_boxes_flatter_is_said_by_method_and_by_class(tmp_path: Path) -> None:
    metrics = ("grounding", "mask_grounding")
    write_evaluation(tmp_path / "run", SKILLS, examples=False, metrics=metrics)
    described = {name: SPECS[name].record({}) for name in metrics}
    rewrite(tmp_path / "run", None, metrics=described)
    sections = built(tmp_path / "run", min_pairs=3)
    by_method, by_class = (block for block in flat(sections["masks"].blocks) if isinstance(block, PaperTable))
    frame = load_runs([tmp_path / "run"])[0].measurements[0].table.frame
    frame = frame[(frame["excluded"] == "") & (frame["method"] == "feature_pair")]
    wide = frame.pivot(index=["target", "label"], columns="metric", values="value")
    assert column(by_method, "method") == list(SKILLS)
    assert column(by_method, "γ difference")[0] == pytest.approx((wide["gamma"] - wide["gamma_mask"]).mean())
    assert column(by_method, "phrases")[0] == len(wide)
    means = wide.groupby("label").mean()
    difference = (means["gamma"] - means["gamma_mask"]).sort_values(ascending=False)
    assert column(by_class, "class") == list(difference.index)
    assert column(by_class, "γ difference") == pytest.approx(difference.tolist())
    assert column(by_class, "box filled [%]") == pytest.approx(means["mask_fill"][difference.index].tolist())
    (note,) = (block.text for block in sections["masks"].blocks if isinstance(block, Note))
    mean = wide.mean()
    assert f"{mean['gamma']:.2f} by box and {mean['gamma_mask']:.2f} by mask: boxes flatter it by" in note
    assert f"Most of all {difference.index[0]} (" in note


def test_a_run_without_masks_has_no_section_of_them(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", SKILLS, examples=False)
    assert "masks" not in built(tmp_path / "run")
