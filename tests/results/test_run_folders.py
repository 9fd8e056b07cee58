"""Folders of results are read whole, or an error names the file and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning_xai.results.run_folders import distinct_names, load_runs
from result_folders import grounding_rows, write_evaluation, write_roar, write_training

from lightning_xai.report.tables import per_pair_csv, read_csv
from lightning_xai.results.runs import by_data, by_method_and_data
from lightning_xai.results.schema import ResultError

SKILLS = {"feature_pair": 0.6, "m2ib": 0.5, "random": 0.1}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_evaluation_is_read_with_the_first_seed_of_each_method(tmp_path: Path) -> None:
    tables = write_evaluation(tmp_path / "one", SKILLS, seeds=3)
    (run,) = load_runs([tmp_path / "one"])
    assert (run.name, run.model, run.data) == ("one", "ViT-B-16, openai", "shapes")
    assert [each.label for each in run.groundings] == list(SKILLS)
    assert [each.is_control for each in run.groundings] == [False, False, True]
    for grounding in run.groundings:
        expected = [r["gamma"] for r in tables[grounding.label][0]["grounding"] if r["reason"] == "measured"]
        np.testing.assert_array_equal(grounding.gammas, expected)
    assert len(run.tables["random"]["confidence"]) == 3 * len(tables["random"][0]["confidence"])
    assert set(run.tables["m2ib"]) == {"confidence", "localization"}
    assert all(size == path.stat().st_size for path, size in run.files.items())
    names = {str(path.relative_to(tmp_path / "one")) for path in run.files}
    assert {"result.json", "m2ib/grounding.csv", "random/examples.json"} <= names
    assert run.missing == ()


def test_a_training_is_read_with_the_state_of_each_measurement(tmp_path: Path) -> None:
    every = write_training(tmp_path / "demo" / "version_0", [0.1, 0.5])
    (run,) = load_runs([tmp_path / "demo" / "version_0"])
    assert run.name == "demo/version_0"
    assert run.training is not None
    assert [each.state for each in run.groundings] == ["before", "epoch 1"]
    assert [each.name for each in run.groundings] == ["before", "epoch 1"]
    assert [len(each.rows) for each in run.groundings] == [len(rows) for rows in every]
    assert [row["epoch"] for row in run.training.summary] == [0, 1]
    assert (run.model, run.data) == ("ViT-B-16, openai", "shapes")
    assert run.training.picture == tmp_path / "demo" / "version_0" / "grounding" / "progress.png"
    shown = run.of_class()
    assert shown is not None
    assert shown.state == "epoch 1"


def test_beside_other_runs_the_states_of_a_training_bear_its_name(tmp_path: Path) -> None:
    write_training(tmp_path / "a", [0.1])
    write_roar(tmp_path / "b", SKILLS)
    training, roar = load_runs([tmp_path / "a", tmp_path / "b"])
    assert [each.name for each in training.groundings] == ["a, before"]
    assert roar.roar is not None
    assert roar.groundings == ()


def test_a_validation_outside_of_training_is_a_state_of_its_own(tmp_path: Path) -> None:
    write_training(tmp_path, [0.5])
    folder = tmp_path / "grounding"
    (folder / "pairs-epoch=000.csv").rename(folder / "pairs-test.csv")
    row = read_csv(folder / "summary.csv")[0] | {"epoch": "test"}
    (folder / "summary.csv").unlink()
    per_pair_csv(folder / "summary-test.csv", [row], tuple(row))
    (run,) = load_runs([tmp_path])
    assert [each.state for each in run.groundings] == ["test"]


def test_what_a_summary_names_and_is_not_there_is_said(tmp_path: Path) -> None:
    write_training(tmp_path, [0.1, 0.5], config=False)
    (tmp_path / "grounding" / "pairs-epoch=000.csv").unlink()
    (run,) = load_runs([tmp_path])
    assert [each.state for each in run.groundings] == ["epoch 1"]
    (sentence,) = run.missing
    assert "before: the table of its phrases" in sentence
    assert run.data == "unnamed data"


def test_names_differ_by_as_much_of_the_paths_as_it_takes(tmp_path: Path) -> None:
    for name in ("x/one", "y/one", "two"):
        write_roar(tmp_path / name, SKILLS)
    runs = load_runs([tmp_path / name for name in ("x/one", "y/one", "two")])
    assert [run.name for run in runs] == ["x/one", "y/one", "two"]
    assert distinct_names([Path("/one"), Path("/a/one")]) == ["/one", "a/one"]
    named = load_runs([tmp_path / "x" / "one", tmp_path / "two"], ["first", "second"])
    assert [run.name for run in named] == ["first", "second"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "a different name for each of 2 runs"), (["a", "a"], "a different name"), (["a", ""], "a different name")],
)
def test_names_have_to_tell_the_runs_apart(names: list[str], message: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_roar(tmp_path / name, SKILLS)
    with pytest.raises(ValueError, match=message):
        load_runs([tmp_path / "one", tmp_path / "two"], names)


def test_the_same_folder_twice_is_refused(tmp_path: Path) -> None:
    write_roar(tmp_path / "one", SKILLS)
    with pytest.raises(ValueError, match="is given twice"):
        load_runs([tmp_path / "one", tmp_path / "one" / ".." / "one"])
    with pytest.raises(ValueError, match="at least one folder"):
        load_runs([])


def test_a_folder_without_results_is_named_and_so_is_a_run_below_it(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"gone is not a folder"):
        load_runs([tmp_path / "gone"])
    with pytest.raises(ResultError, match=r"holds no results: expected result\.json .* or grounding/ [^;]*$"):
        load_runs([tmp_path])
    write_training(tmp_path / "demo" / "version_0", [0.1])
    with pytest.raises(ResultError, match=r"did you mean .*demo/version_0\?"):
        load_runs([tmp_path])


def test_another_version_of_the_schema_is_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path, SKILLS)
    edit(tmp_path / "result.json", version=2)
    with pytest.raises(ResultError, match=r"result\.json: schema version 2, this release reads 1"):
        load_runs([tmp_path])


def break_table(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("feature_pair/grounding.csv", "gamma", "gama", r"grounding\.csv: the columns gamma are missing"),
        (
            "feature_pair/grounding.csv",
            ",measured,0.",
            ",measured,7.",
            r"grounding\.csv, row 1 .* expected gamma in \[0, 1\]",
        ),
        ("feature_pair/grounding.csv", ",measured,0.", ",measured,x", r"grounding\.csv, row 1 .* got gamma 'x"),
        (
            "feature_pair/grounding.csv",
            "\n0,0,",
            "\n0,0,one more,",
            r"grounding\.csv, line 2: expected 14 fields .* found 15",
        ),
        ("m2ib/localization.csv", "iou", "union", r"localization\.csv: the columns iou are missing"),
        ("feature_pair/examples.json", '"examples"', '"samples"', r"examples\.json: field missing"),
        ("result.json", "{", "", r"result\.json: broken JSON"),
    ],
)
def test_a_broken_file_is_named(name: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    write_evaluation(tmp_path, SKILLS)
    break_table(tmp_path / name, old, new)
    with pytest.raises(ValueError, match=message):
        load_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("grounding/summary.csv", "epoch,pairs\n../../x,3\n", "expected an epoch, or validate or test; got '../../x'"),
        ("grounding/summary.csv", "epoch,pairs,rho\n0,3,high\n", "a number cannot be read"),
        ("grounding/summary.csv", "epoch,pairs\n", "no measurement; expected summary.csv"),
        ("grounding/summary.csv", "pairs\n3\n", "the columns epoch are missing"),
        ("grounding/pairs-epoch=000.csv", "\xff", "pairs-epoch=000.csv: the columns key"),
        ("config.yaml", "a: [", "config.yaml: no YAML that can be read"),
        ("config.yaml", "!!python/object/apply:os.system ['true']", "config.yaml: no YAML that can be read"),
        ("config.yaml", "x" * (2**20 + 1), "larger than"),
    ],
)
def test_a_broken_training_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    write_training(tmp_path, [0.1])
    (tmp_path / name).write_text(text + ("\n1" if "\xff" in text else ""))
    with pytest.raises(ValueError, match=message):
        load_runs([tmp_path])


def test_a_table_that_was_measured_and_is_gone_is_said(tmp_path: Path) -> None:
    write_evaluation(tmp_path, SKILLS)
    (tmp_path / "m2ib" / "confidence.csv").unlink()
    (run,) = load_runs([tmp_path])
    assert [sentence.partition(",")[0] for sentence in run.missing] == ["m2ib: confidence was measured"]


def test_data_are_the_same_where_the_phrases_are_and_no_fingerprint_differs(tmp_path: Path) -> None:
    skills = {"feature_pair": 0.5, "m2ib": 0.4}
    write_evaluation(tmp_path / "a", skills)
    write_evaluation(tmp_path / "b", skills)
    write_evaluation(tmp_path / "pixels", skills, fingerprint="beef")
    write_evaluation(tmp_path / "fewer", skills, images=100)
    write_training(tmp_path / "training", [0.5])
    runs = load_runs([tmp_path / name for name in ("a", "b", "pixels", "fewer", "training")])
    groundings = [each for run in runs for each in run.groundings if each.label == "feature_pair"]
    names = [[each.run for each in group] for group in by_data(groundings)]
    assert names == [["a", "b", "training"], ["pixels"], ["fewer"]]
    groups = by_method_and_data([each for run in runs[:2] for each in run.groundings])
    assert [[(each.run, each.label) for each in group] for group in groups] == [
        [("a", "feature_pair"), ("b", "feature_pair")],
        [("a", "m2ib"), ("b", "m2ib")],
    ]


def test_another_class_of_one_phrase_is_other_data(tmp_path: Path) -> None:
    write_training(tmp_path / "a", [0.5])
    write_training(tmp_path / "b", [0.5])
    rows = grounding_rows(0.5)
    rows[0]["label"] = "circles"
    per_pair_csv(tmp_path / "b" / "grounding" / "pairs-epoch=000.csv", rows, tuple(rows[0]))
    first, second = (run.groundings[0] for run in load_runs([tmp_path / "a", tmp_path / "b"]))
    assert not first.same_data(second)
