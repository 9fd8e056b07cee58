"""Which parts a report has, what it says where something is missing, and that pictures are what their data are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from lightning_xai.report.comparison import OrderTest
from lightning_xai.report.composition import Composer, Options
from lightning_xai.report.html import Chart, Findings, Folded, Note, Section, Sheet, flat
from lightning_xai.results.run_folders import load_runs
from PIL import Image
from result_folders import CLASSES, grounding_rows, write_evaluation, write_grid, write_roar, write_training

from lightning_xai.report.gallery import Gallery
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.tables import per_pair_csv, read_csv
from lightning_xai.results.effect_size import grounding_change
from lightning_xai.results.runs import Run
from lightning_xai.results.schema import ResultError

SKILLS = {"feature_pair": 0.4, "m2ib": 0.5, "random": 0.1}
OPTIONS = Options(OrderTest(bootstrap_samples=20))
B = TypeVar("B")


def compose(folders: Iterable[Path], options: Options = OPTIONS) -> dict[str, Section]:
    return {section.name: section for section in Composer(load_runs(list(folders)), options).sections()}


def blocks(sections: Iterable[Section], kind: type[B]) -> list[B]:
    return [block for section in sections for block in flat(section.blocks) if isinstance(block, kind)]


def tables(sections: dict[str, Section]) -> dict[str, PaperTable]:
    return {table.name: table for table in blocks(sections.values(), PaperTable)}


def missing(sections: dict[str, Section]) -> str:
    return "\n".join(note.text for note in blocks(sections.values(), Note) if note.missing)


def findings(sections: dict[str, Section]) -> dict[str, str]:
    (found,) = blocks(sections.values(), Findings)
    return {text: big for big, text in found.items}


def test_a_training_alone_has_its_course_its_verdicts_and_its_classes(tmp_path: Path) -> None:
    every = write_training(tmp_path / "t", [0.1, 0.3, 0.6])
    sections = compose([tmp_path / "t"])
    assert list(sections) == ["overview", "grounding", "training", "significance", "gaps", "heat-maps", "appendix"]
    gammas = [[row["gamma"] for row in rows if row["reason"] == "measured"] for rows in (every[0], every[-1])]
    shares = [100 * sum(gamma > 0.5 for gamma in values) / len(values) for values in gammas]
    assert f"{shares[0]:.1f} → {shares[1]:.1f} %" in findings(sections).values()
    assert "epoch 2 grounds better" in findings(sections).values()
    assert len(tables(sections)["significance"].rows) == 3
    assert [sheet.title for sheet in blocks(sections.values(), Sheet)] == ["What t learned to look at"]
    change = grounding_change(every[0], every[-1])
    rows = tables(sections)["change-before-epoch-2"].bodies[0].rows
    assert [row[0].text for row in rows] == [each.label for each in change.gains(5)]
    assert [row[1].value for row in rows] == [each.smd for each in change.gains(5)]


def test_roar_alone_has_its_bars_and_says_what_is_still_to_run(tmp_path: Path) -> None:
    write_roar(tmp_path / "r", SKILLS, missing=("m2ib/text/2",))
    sections = compose([tmp_path / "r"])
    assert list(sections) == ["overview", "grounding", "degradation", "appendix"]
    assert "None of the runs measured grounding" in missing(sections)
    assert "r: 1 of the retrainings have not been run yet: m2ib/text/2." in missing(sections)
    assert [chart.name for chart in blocks(sections.values(), Chart)] == ["roar-r"]
    assert "m2ib" in findings(sections).values()


def test_a_control_or_a_method_alone_is_never_said_to_find_best_what_the_model_learns_from(tmp_path: Path) -> None:
    write_roar(tmp_path / "two", {"feature_pair": 0.2, "m2ib": 0.5, "random": 0.9, "gaussian": 0.8})
    write_roar(tmp_path / "one", {"m2ib": 0.5, "random": 0.1})
    assert set(findings(compose([tmp_path / "two"])).values()) == {"m2ib"}
    assert findings(compose([tmp_path / "one"])) == {}


def test_a_grid_has_its_two_tables_and_no_bars(tmp_path: Path) -> None:
    write_grid(tmp_path / "g")
    sections = compose([tmp_path / "g"])
    assert {"grid-g-image", "grid-g-text"} <= tables(sections).keys()
    assert blocks(sections.values(), Chart) == []


def test_two_evaluations_have_all_parts_with_examples_of_what_changed(tmp_path: Path) -> None:
    for name, gain in (("before", 0.0), ("after", 0.4)):
        write_evaluation(tmp_path / name, {label: skill + gain for label, skill in SKILLS.items()})
    sections = compose([tmp_path / "before", tmp_path / "after"])
    expected = ["overview", "grounding", "signs", "degradation", "significance", "gaps", "heat-maps", "appendix"]
    assert list(sections) == expected
    names = [sheet.name for sheet in blocks(sections.values(), Sheet)]
    assert "examples-gained-after" in names
    assert {"fixed-before", "fixed-after", "fixed-runs-shapes", "failures-before-feature_pair"} <= set(names)
    assert not any("random" in name for name in names if name.startswith("failures"))
    verdicts = {(row[2].text, row[3].text) for row in tables(sections)["significance"].rows}
    assert verdicts == {("feature_pair", "second better"), ("m2ib", "second better")}
    folded = [fold.summary for fold in blocks(sections.values(), Folded)]
    assert "Failures of m2ib (before)" in folded
    assert "Settings and versions of after" in folded


def test_the_overview_tells_of_the_method_for_classes_and_of_a_trainings_begin_and_end_only(tmp_path: Path) -> None:
    for name, gain in (("a", 0.0), ("b", 0.4)):
        write_evaluation(tmp_path / name, {label: skill + gain for label, skill in SKILLS.items()}, examples=False)
    write_training(tmp_path / "t", [0.1, 0.3, 0.6])
    two = findings(compose([tmp_path / "a", tmp_path / "b"]))
    assert [text.partition(":")[0] for text, big in two.items() if "grounds better" in big] == ["than a (feature_pair)"]
    one = findings(compose([tmp_path / "t"]))
    assert [text.partition(":")[0] for text, big in one.items() if "better" in big] == ["than before (feature_pair)"]


def test_other_data_are_refused_in_a_sentence_and_nothing_is_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"feature_pair": 0.4})
    write_evaluation(tmp_path / "b", {"feature_pair": 0.4}, data="coco", images=90)
    sections = compose([tmp_path / "a", tmp_path / "b"])
    assert "a and b are not compared by γ (feature_pair): they were measured on different data" in missing(sections)
    assert "significance" not in tables(sections)
    assert not any(name.startswith("change") for name in tables(sections))


def test_one_evaluation_says_that_there_is_nothing_to_compare(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"m2ib": 0.4})
    sections = compose([tmp_path / "a"])
    assert "Give two runs, or a training, to have them compared." in missing(sections)
    assert "No run has signed methods" in missing(sections)


def test_options_of_a_method_that_differ_between_runs_are_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, {"feature_pair": 0.4})
    record = json.loads((tmp_path / "b" / "result.json").read_text())
    record["methods"]["feature_pair"]["options"]["steps"] = 50
    (tmp_path / "b" / "result.json").write_text(json.dumps(record))
    assert "a and b: options of feature_pair differ (steps)." in missing(compose([tmp_path / "a", tmp_path / "b"]))


def test_the_method_that_tells_about_classes_can_be_chosen(tmp_path: Path) -> None:
    written = write_evaluation(tmp_path / "a", SKILLS)
    sections = compose([tmp_path / "a"], replace(OPTIONS, method="m2ib"))
    table = tables(sections)["classes-m2ib-on-shapes"]
    rows = [row for row in written["m2ib"][0]["grounding"] if row["reason"] == "measured"]
    for row in table.rows:
        own = [each["gamma"] for each in rows if each["label"] == row[0].text]
        assert row[1].value == pytest.approx(np.mean(own))
        assert row[2].value == pytest.approx(np.std(own, ddof=1))
        assert row[5].value == len(own)
    values = [row[1].value for row in table.rows]
    assert values == sorted(values, key=lambda value: float(value or 0))
    with pytest.raises(
        ValueError, match="--method rise: none of the runs has it; they have feature_pair, m2ib, random"
    ):
        compose([tmp_path / "a"], replace(OPTIONS, method="rise"))


def test_classes_with_few_pairs_are_not_ranked_and_named(tmp_path: Path) -> None:
    write_training(tmp_path / "t", [0.5], labels=CLASSES, images=24)
    rows = grounding_rows(0.5, images=24)
    per_pair_csv(tmp_path / "t" / "grounding" / "pairs-epoch=000.csv", rows, tuple(rows[0]))
    sections = compose([tmp_path / "t"])
    assert "no class has 10 measured pairs; see --min-pairs" in missing(sections)
    few = tables(compose([tmp_path / "t"], replace(OPTIONS, min_pairs=6)))["classes-feature_pair-on-shapes"]
    assert 0 < len(few.rows) < len(CLASSES)
    assert "Not ranked for fewer than 6 measured pairs:" in few.note


def test_what_changed_is_told_of_classes_with_enough_pairs(tmp_path: Path) -> None:
    every = write_training(tmp_path / "t", [0.1, 0.6], images=24)
    found = tables(compose([tmp_path / "t"], replace(OPTIONS, min_pairs=6)))["change-before-epoch-1"]
    pairs = Counter(row["label"] for row in every[0] if row["reason"] == "measured")
    assert min(pairs.values()) < 6
    assert all(pairs[row[0].text] >= 6 for row in found.rows)


def test_runs_of_the_same_numbers_are_not_said_to_have_too_few_pairs(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_evaluation(tmp_path / name, SKILLS)
    told = missing(compose([tmp_path / "one", tmp_path / "other"], replace(OPTIONS, min_pairs=2)))
    assert "None of the classes has gained or lost anything." in told
    assert "measured pairs on both sides" not in told
    few = missing(compose([tmp_path / "one", tmp_path / "other"], replace(OPTIONS, min_pairs=10_000)))
    assert "no class has 10000 measured pairs" in few
    assert "None of the classes" not in few


def test_distributions_are_of_the_first_seed(tmp_path: Path) -> None:
    written = write_evaluation(tmp_path / "a", {"rise": 0.4}, seeds=3)
    charts = {chart.name: chart for chart in blocks(compose([tmp_path / "a"]).values(), Chart)}
    first = written["rise"][0]
    negative = [row["delta"] < 0 for row in first["hard_negatives"]]
    assert charts["delta"].alt == f"rise, a: {100 * sum(negative) / len(negative):.1f} % below 0."
    own, other = ([row[name] for row in first["other_objects"]] for name in ("own", "other"))
    shares = [100 * sum(value > 0 for value in own) / len(own), 100 * sum(value < 0 for value in other) / len(other)]
    expected = f"rise: own object {shares[0]:.1f} % positive, other object {shares[1]:.1f} % negative."
    assert charts["signs"].alt == expected


def test_an_evaluation_in_which_nothing_could_be_measured_has_its_counts_and_no_curve(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4}, images=8, labels=("ring",))
    path = tmp_path / "feature_pair" / "grounding.csv"
    rows = [row | {"reason": "no_positive", "gamma": "", "hit": ""} for row in read_csv(path)]
    per_pair_csv(path, rows, tuple(rows[0]))
    sections = compose([tmp_path])
    assert "no class has 10 measured pairs" in missing(sections)
    assert not any(chart.name.startswith("gamma") for chart in blocks(sections.values(), Chart))


def test_a_delta_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4})
    path = tmp_path / "feature_pair" / "hard_negatives.csv"
    first, row, *rest = path.read_text().splitlines()
    for wrong in ("much", "nan"):
        path.write_text("\n".join([first, row.rpartition(",")[0] + f",{wrong}", *rest]) + "\n")
        with pytest.raises(ResultError, match="feature_pair, delta: "):
            compose([tmp_path])


# --- pictures ---


def change_examples(folder: Path, **changes: Any) -> list[Run]:
    """The runs of a folder whose first example is broken."""
    path = folder / "feature_pair" / "examples.json"
    record = json.loads(path.read_text())
    record["examples"][0] |= changes
    path.write_text(json.dumps(record))
    return load_runs([folder])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "examples/gone.jpg"}, "No such file"),
        ({"image": "result.json"}, "cannot identify image file"),
        ({"heat": [[1.0, 2.0], [1.0]]}, "expected a map"),
        ({"heat": []}, "expected a map"),
        ({"box": [0, 0, 1e999, 3]}, "not finite"),
    ],
)
def test_an_example_that_cannot_be_drawn_is_counted_with_its_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4})
    gallery = Gallery(change_examples(tmp_path, **changes))
    (reason,) = gallery.faults.values()
    assert message in reason
    assert "1 of the examples cannot be drawn" in missing(compose([tmp_path]))


def test_a_map_that_is_not_finite_and_spans_beyond_the_caption_are_drawn_as_such(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4})
    gallery = Gallery(change_examples(tmp_path, heat=[[None, 1.0]], spans=[[-5, 3], [4, 10**9], [7, 2]]))
    assert gallery.faults == {}
    found = gallery.side_by_side({"one": (tmp_path.name, "feature_pair")}, lambda record: True, "t")
    assert found is not None


def test_an_image_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"feature_pair": 0.4})
    with pytest.raises(ResultError, match="lies outside of the evaluation's folder"):
        change_examples(tmp_path, image="../secret.png")


def test_only_examples_that_all_have_stand_side_by_side(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS)
    write_evaluation(tmp_path / "b", SKILLS, data="coco", labels=("cat", "dog"))
    gallery = Gallery(load_runs([tmp_path / "a", tmp_path / "b"]))
    both = {"a": ("a", "feature_pair"), "b": ("b", "feature_pair")}
    assert gallery.side_by_side(both, lambda record: True, "t") is None
    found = gallery.side_by_side({"x": ("a", "feature_pair"), "y": ("a", "m2ib")}, lambda r: "fixed" in r.why, "t")
    assert found is not None
    assert found[1] == 4
    assert gallery.worst("a", "gone", "t") is None


def test_maps_without_a_sign_are_drawn_from_their_lowest_value_and_failures_from_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evaluation(tmp_path / "a", SKILLS)
    drawn: list[Any] = []
    for name in ("progress_sheet", "example_sheet"):
        monkeypatch.setattr(f"lightning_xai.report.gallery.{name}", lambda *args, **options: drawn.append(args))
    runs = load_runs([tmp_path / "a"])
    gallery = Gallery(runs)
    gallery.side_by_side({label: ("a", label) for label in ("feature_pair", "m2ib")}, lambda r: "fixed" in r.why, "t")
    signed, unsigned = drawn[0][1]
    records = [record for record in runs[0].examples["m2ib"] if "fixed" in record.why]
    for heat, record in zip(unsigned, records, strict=True):
        raw = np.array(record.heat)
        np.testing.assert_allclose(heat, (raw - raw.min()) / np.ptp(raw))
    assert min(heat.min() for heat in signed) < 0
    gallery.worst("a", "feature_pair", "t")
    gammas = drawn[1][2]
    assert len(gammas) == 12
    assert gammas == sorted(record.gamma for record in runs[0].examples["feature_pair"] if "failure" in record.why)


@pytest.mark.parametrize("name", ["progress.png", "progress-test.png"])
def test_a_trainings_picture_is_shown_as_it_is_and_its_caption_says_what_it_is(tmp_path: Path, name: str) -> None:
    write_training(tmp_path / "t", [0.1, 0.5])
    grounding = tmp_path / "t" / "grounding"
    (grounding / "progress.png").rename(grounding / name)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(grounding / name)
    (sheet,) = blocks([compose([tmp_path / "t"])["heat-maps"]], Sheet)
    np.testing.assert_array_equal(sheet.pixels, pixels)
    assert sheet.title == "What t learned to look at"
    expected = "of the run: heat maps by feature_pair of a few fixed phrases, from the first measurement to the last."
    assert sheet.note == f"{name} {expected}"


def test_a_trainings_picture_that_is_broken_is_said(tmp_path: Path) -> None:
    write_training(tmp_path / "t", [0.5])
    (tmp_path / "t" / "grounding" / "progress.png").write_bytes(b"no picture")
    assert "progress.png cannot be shown" in missing(compose([tmp_path / "t"]))
