"""Folders of results are read as runs, and refused with a sentence where they are broken."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from result_folders import SKILLS, rewrite, write_evaluation, write_roar, write_state, write_training

from lightning_xai.results.record import ResultError
from lightning_xai.results.runs import by_data, by_method_and_data, load_runs


def test_an_evaluation_has_the_scores_of_all_seeds_and_the_distribution_of_the_first(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS, seeds=2)
    (run,) = load_runs([tmp_path / "a"])
    assert [(each.name, each.label, each.state) for each in run.groundings] == [("a", label, "") for label in SKILLS]
    values = pd.read_csv(tmp_path / "a" / "values.csv")
    own = values[(values["method"] == "m2ib") & (values["metric"] == "gamma") & values["excluded"].isna()]
    assert run.groundings[1].gammas.tolist() == own[own["seed"] == 0]["value"].tolist()
    found = run.measurements[0].estimates("grounding")["m2ib"]["gamma_above_50"]
    shares = [np.mean(part["value"] > 0.5) for _, part in own.groupby("seed")]
    assert found.mean == pytest.approx(np.mean(shares), abs=1e-15)
    assert found.error == pytest.approx(np.std(shares, ddof=1) / np.sqrt(2))
    assert found.count == len(run.groundings[1].gammas)
    assert set(run.files) == {p for p in (tmp_path / "a").rglob("*") if p.suffix in (".csv", ".json")}


def test_a_training_has_its_states_in_their_order(tmp_path: Path) -> None:
    write_training(tmp_path / "version_0", [0.1, 0.3, 0.6])
    for name in ("test", "validate"):
        write_state(tmp_path / "version_0", name, 0.6)
    (run,) = load_runs([tmp_path / "version_0"])
    assert [each.name for each in run.groundings] == ["before", "epoch 1", "epoch 2", "validate", "test"]
    assert (run.model, run.data, run.config[:5]) == ("shapes_vit", "shapes", "data:")
    write_evaluation(tmp_path / "a", SKILLS)
    run, _ = load_runs([tmp_path / "version_0", tmp_path / "a"])
    assert run.groundings[0].name == f"{tmp_path.name}/version_0, before"


def test_names_differ_by_as_much_of_the_paths_as_it_takes(tmp_path: Path) -> None:
    for name in ("x/one", "y/one", "two"):
        write_evaluation(tmp_path / name, SKILLS, examples=False, images=9)
    folders = [tmp_path / name for name in ("x/one", "y/one", "two")]
    assert [run.name for run in load_runs(folders)] == ["x/one", "y/one", "two"]
    assert [run.name for run in load_runs(folders, ["a", "b", "c"])] == ["a", "b", "c"]
    for names in (["a", "b"], ["a", "a", "b"], ["a", "", "b"]):
        with pytest.raises(ValueError, match="a different name for each of 3 runs"):
            load_runs(folders, names)
    with pytest.raises(ValueError, match="given twice"):
        load_runs([tmp_path / "two", tmp_path / "x" / ".." / "two"])


def test_a_folder_without_results_is_refused_with_a_hint(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "runs" / "a", SKILLS, examples=False, images=9)
    with pytest.raises(ResultError, match=re.escape(f"did you mean {tmp_path / 'runs' / 'a'}?")):
        load_runs([tmp_path / "runs"])
    with pytest.raises(ResultError, match="is not a folder"):
        load_runs([tmp_path / "none"])


def test_results_of_version_1_are_refused_with_the_way_to_make_them_again(tmp_path: Path) -> None:
    old = tmp_path / "training" / "grounding"
    old.mkdir(parents=True)
    (old / "summary.csv").write_text("epoch,pairs\n0,3\n")
    with pytest.raises(ResultError, match=r"version 1 .* run `fit` or `validate` again"):
        load_runs([tmp_path / "training"])
    (old / "summary.csv").unlink()
    with pytest.raises(ResultError, match="no measurement"):
        load_runs([tmp_path / "training"])


@pytest.mark.parametrize(
    ("name", "pattern", "new", "message"),
    [
        ("result.json", r"\{", "[", "field missing or of the wrong type"),
        ("values.csv", r"gamma,0\.\d+", "gamma,much", "do not fit"),
        ("values.csv", r"gamma,0\.\d+", "gamma,", "expected a finite number"),
        ("values.csv", r"gamma,0\.\d+", "gamma,inf", "expected a finite number"),
        ("values.csv", r"phrase/1/0", "phrase/none", "lacks 'phrase/none'"),
        ("values.csv", r"\A(?s:.*)", "method,seed\n", "the columns target, metric, value, excluded are missing"),
        ("targets.csv", r"\A.*\n", "a,b\n", "not a table of results|are missing"),
        ("targets.csv", r"\A(?s:.*)", "", "not a table of results"),
        ("m2ib/examples.json", r"\"hit\"", '"hat"', "field missing"),
        ("m2ib/examples.json", r"examples/0.png", "../secret.png", "outside of the result folder"),
    ],
)
def test_a_broken_file_is_named(name: str, pattern: str, new: str, message: str, tmp_path: Path) -> None:
    write_evaluation(tmp_path, SKILLS, images=9)
    path = tmp_path / name
    text = path.read_text()
    assert re.search(pattern, text)
    path.write_text(re.sub(pattern, new, text, count=1))
    with pytest.raises(ResultError, match=message) as raised:
        load_runs([tmp_path])
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("config", ["a: [", "\x00", "x" * (2**20 + 1)])
def test_a_broken_config_is_named(config: str, tmp_path: Path) -> None:
    write_training(tmp_path, [0.1], images=9)
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(ResultError, match=r"config.yaml"):
        load_runs([tmp_path])


def test_data_are_the_same_where_the_targets_are_and_no_fingerprint_differs(tmp_path: Path) -> None:
    written: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {},
        "other": {"fingerprint": "2"},
        "unknown": {"fingerprint": None},
        "fewer": {"images": 30},
    }
    for name, options in written.items():
        write_evaluation(tmp_path / name, SKILLS, examples=False, **options)
    write_evaluation(tmp_path / "class", SKILLS, examples=False)
    rewrite(tmp_path / "class", lambda v, t: (v, t.assign(label=t["label"].replace("ring", "rung"))))
    runs = load_runs([tmp_path / name for name in (*written, "class")])
    groups = by_data((run.measurements[0] for run in runs), "grounding")
    assert [[each.run for each in group] for group in groups] == [
        ["a", "b", "unknown"],
        ["other"],
        ["fewer"],
        ["class"],
    ]
    groundings = [each for run in runs[:3] for each in run.groundings]
    found = [[f"{each.run} {each.label}" for each in group] for group in by_method_and_data(groundings)]
    assert found[:2] == [["a feature_pair", "b feature_pair"], ["other feature_pair"]]


def test_roar_is_read_as_scores(tmp_path: Path) -> None:
    losses = {("m2ib", "image"): (2.5, 3.3), ("m2ib", "text"): (float("nan"), 2.2), ("random", "image"): (2.0,)}
    write_roar(tmp_path, losses)
    (run,) = load_runs([tmp_path])
    found = run.measurements[0].estimates("roar")
    assert found["m2ib"]["roar_image"].mean == pytest.approx((0.25 + 0.5) / 2)
    # The mean without the retraining that diverged would look better than what is known.
    assert math.isnan(found["m2ib"]["roar_text"].mean)
    assert list(found["random"]) == ["roar_image"]
    assert not run.groundings


def test_a_training_is_named_by_its_config_or_else_by_its_architecture(tmp_path: Path) -> None:
    write_training(tmp_path, [0.2, 0.6])
    (run,) = load_runs([tmp_path])
    assert run.model == "shapes_vit"
    options = "{init_args: {model: ViT-B-16, pretrained: openai}}"
    (tmp_path / "config.yaml").write_text(f"model: {options}\n")
    (run,) = load_runs([tmp_path])
    assert run.model == "ViT-B-16, openai"


def test_a_training_is_shown_by_its_best_model_or_by_its_last_state(tmp_path: Path) -> None:
    write_training(tmp_path, [0.1, 0.6, 0.4])
    [run] = load_runs([tmp_path])
    assert run.shown is not None
    assert run.shown_model == "epoch 2, the last state that was measured"
    steps = [each.record.state["step"] for each in run.measurements]
    best = {"step": steps[1], "monitor": "val/gamma_mean", "score": 0.6, "path": "checkpoints/best.ckpt"}
    (tmp_path / "run.json").write_text(json.dumps({"id": "1", "finished": True, "best": best}))
    for choice, state in (("best", "epoch 1"), ("last", "epoch 2")):
        [run] = load_runs([tmp_path], choice=choice)  # type: ignore[arg-type]
        assert run.shown is not None
        assert run.shown.state == state
    assert load_runs([tmp_path])[0].shown_model == (
        f"epoch 1, the run's best by val/gamma_mean (0.6000, after step {steps[1]})"
    )
