"""The page of `objectives`, from made-up trials."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from objective_trials import BASE, CHOICE, GAMMA, RECALL, write_trials

from lightning_xai.report.objectives import compare_variants, write_objectives_report
from lightning_xai.report.sections.objectives import ObjectivesStudy, sentences_on
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.results.table import read_result

TEST = OrderTest(bootstrap_samples=50)
TRAINED = {"gamma": ("feature_pair",), "negatives": (CHOICE,)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ObjectivesStudy]:
    out = tmp_path_factory.mktemp("objectives")
    done = write_trials(out, {"base": BASE, "gamma": GAMMA, "negatives": BASE}, (0, 1), TRAINED)
    given = {name: [{"class_path": "Softmax"}] for name in ("base", "gamma", "negatives")}
    return out, write_objectives_report(out, done, "base", given, ("gamma_mean", "rho"), (RECALL, CHOICE), TEST)


def test_the_page_opens_and_names_every_variant_and_part(study: tuple[Path, ObjectivesStudy]) -> None:
    page = (study[0] / "report" / "report.html").read_text(encoding="utf-8")
    for part in ("not-trained-on", "trained-on", "validation", "significance", "metric-grounding", "heat-maps"):
        assert f'id="{part}"' in page
    assert "gamma, where it was trained" in page


def test_scores_that_a_variant_was_trained_on_stand_in_a_table_of_their_own(
    study: tuple[Path, ObjectivesStudy],
) -> None:
    tables = study[0] / "report" / "tables"
    judged = pd.read_csv(tables / "objectives-gamma_mean.csv").set_index("variant")
    column = next(name for name in judged if name.startswith("feature_pair") and "error" not in name)
    assert judged[column].isna().to_dict() == {"base": False, "gamma": True, "negatives": False}
    trained = pd.read_csv(tables / "trained-on.csv")
    assert set(zip(trained["variant"], trained["judged by"], strict=True)) == {
        ("gamma", "feature_pair"),
        ("negatives", "the model itself"),
    }


def test_sentences_say_both_directions_from_the_numbers(study: tuple[Path, ObjectivesStudy]) -> None:
    sentences = " ".join(sentences_on(study[1], "gamma"))
    change = {(each.method, each.score.name): each for each in study[1].of("gamma")}
    before, after = (statistics for statistics in change["feature_pair", "gamma_mean"].estimates())
    assert f"rose from {before.mean:.4f} to {after.mean:.4f}" in sentences
    assert "γ mean is better by 0 of 1 methods; it fell" in sentences
    assert "text to image recall at 5 fell from 20.1 to 10.1 %, which is worse" in sentences
    assert list(sentences_on(study[1], "base")) == []


def test_a_variant_is_a_result_folder_and_every_score_is_in_one_file(study: tuple[Path, ObjectivesStudy]) -> None:
    out, found = study
    record, table = read_result(out / "variants" / "gamma")
    assert record.settings["trained_on"] == ["feature_pair"]
    scores = pd.read_csv(out / "scores.csv")
    own = scores[(scores["variant"] == "gamma") & (scores["method"] == "m2ib") & (scores["score"] == "gamma_mean")]
    for seed, value in zip(own["seed"], own["value"], strict=True):
        rows = table.measured("gamma")
        values = rows.loc[(rows["method"] == "m2ib") & (rows["seed"] == seed), "value"]
        assert value == pytest.approx(values.mean(), rel=1e-12)
    assert set(scores["variant"]) == {variant.name for variant in found.variants}


def test_a_score_that_no_metric_has_is_refused(study: tuple[Path, ObjectivesStudy]) -> None:
    with pytest.raises(ValueError, match=r"the judging metrics have no gama; they have gamma_mean"):
        compare_variants(study[1].variants, "base", ("gama",), (), TEST)
