"""Trials of `objectives`, and the comparison of variants with the base, against what is written out here."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest
from objective_trials import BASE, CHOICE, GAMMA, RECALL, write_trials
from result_folders import METRICS, write_evaluation

from lightning_xai.results.objectives import (
    Change,
    ObjectiveTrial,
    Variant,
    changes_from,
    join_seeds,
    read_trained_model,
)
from lightning_xai.results.record import Score
from lightning_xai.results.table import read_result

SCORES = {score.name: score for metric in METRICS.values() for score in metric.scores}
GAMMA_MEAN, IMAGE_DROP = SCORES["gamma_mean"], SCORES["image_drop"]  # of which more, and less, is better
FIVE = (0, 1, 2, 3, 4)


def joined(out: Path, seeds: tuple[int, ...], skills: dict[str, dict[str, float]]) -> list[Variant]:
    done = write_trials(out, skills, seeds, {"gamma": ("feature_pair", CHOICE)})
    return [join_seeds(out, [each for each in done if each.trial.variant == name], {}) for name in skills]


def compared(
    out: Path, seeds: tuple[int, ...], *scores: Score, logged: tuple[str, ...] = ()
) -> dict[tuple[str, str], Change]:
    base, gamma = joined(out, seeds, {"base": BASE, "gamma": GAMMA})
    return {(each.method, each.score.name): each for each in changes_from(base, gamma, scores, logged)}


def test_the_joined_table_has_every_value_under_the_seed_of_its_training(tmp_path: Path) -> None:
    (variant,) = joined(tmp_path, (3, 7), {"base": BASE})
    assert variant.seeds == (3, 7)
    for seed in (3, 7):
        single = read_result(ObjectiveTrial("base", seed).judged(tmp_path))[1].values
        own = variant.table.values[variant.table.values["seed"] == seed]
        columns = ["method", "target", "metric", "value", "excluded"]
        lines = [sorted(map(str, each[columns].to_numpy().tolist())) for each in (own, single)]
        assert lines[0] == lines[1]
    assert variant.record.methods["m2ib"].seeds == (3, 7)
    assert variant.logged[RECALL] == {3: 0.2 + 0.001 * 3, 7: 0.2 + 0.001 * 7}


def test_trials_that_were_judged_on_other_data_are_not_joined(tmp_path: Path) -> None:
    done = write_trials(tmp_path, {"base": BASE}, (0, 1))
    write_evaluation(done[1].trial.judged(tmp_path), BASE, fingerprint="2", images=24)
    with pytest.raises(ValueError, match=r"base/0 and base/1 were judged by other methods or on other data"):
        join_seeds(tmp_path, done, {})


def test_five_seeds_are_compared_by_their_scores_and_fewer_by_single_values(tmp_path: Path) -> None:
    many = compared(tmp_path / "five", FIVE, GAMMA_MEAN)
    few = compared(tmp_path / "one", (0,), GAMMA_MEAN)
    better, worse = many["feature_pair", "gamma_mean"], many["m2ib", "gamma_mean"]
    assert (better.over, better.verdict, worse.verdict) == ("5 seeds", "better", "worse")
    # Every training of one side lies above all of the other: no quantile is violated.
    assert min(better.own) > max(better.base)
    assert better.above is not None
    assert (better.above.violation_ratio, better.above.epsilon_min) == (0, 0)
    spread = ((4 * statistics.variance(better.own) + 4 * statistics.variance(better.base)) / 8) ** 0.5
    assert better.effect is not None
    assert better.effect.smd == pytest.approx(better.difference / spread, rel=1e-12)
    measured = read_result(ObjectiveTrial("gamma", 0).judged(tmp_path / "one"))[1].measured("gamma")
    values = measured.loc[measured["method"] == "feature_pair", "value"]
    single = few["feature_pair", "gamma_mean"]
    assert single.over == f"{len(values)} values of 1 seed"
    assert statistics.fmean(single.own) == pytest.approx(values.mean(), rel=1e-12)


def test_a_score_of_which_less_is_better_turns_the_verdict_round(tmp_path: Path) -> None:
    found = compared(tmp_path, FIVE, IMAGE_DROP)
    # Skill lowers the drop in made-up results.
    change = found["feature_pair", "image_drop"]
    assert change.difference < 0 < change.gain
    assert change.verdict == "better"
    assert found["m2ib", "image_drop"].verdict == "worse"


def test_what_an_objective_asks_about_is_marked_and_nothing_else(tmp_path: Path) -> None:
    found = compared(tmp_path, FIVE, GAMMA_MEAN, IMAGE_DROP, logged=(RECALL, CHOICE))
    trained = {method or score for (method, score), change in found.items() if change.trained}
    assert trained == {"feature_pair", CHOICE}
    assert found["", RECALL].verdict == "worse"
    assert found["", CHOICE].verdict == "undecided"  # equal numbers


def test_one_training_has_no_test_of_what_it_logged(tmp_path: Path) -> None:
    change = compared(tmp_path, (0,), logged=(RECALL,))["", RECALL]
    assert (change.verdict, change.effect) == ("", None)
    assert change.difference == pytest.approx(-0.1)


def test_a_trial_of_other_settings_is_refused_with_what_differs(tmp_path: Path) -> None:
    (done,) = write_trials(tmp_path, {"base": BASE})
    assert read_trained_model(tmp_path, done.trial, done.recipe) == done
    with pytest.raises(ValueError, match=r"other settings: model\.model was 'tiny' and is 'b'"):
        read_trained_model(tmp_path, done.trial, done.recipe | {"model": {"model": "b"}})
    done.trial.path(tmp_path).write_text("{")
    with pytest.raises(ValueError, match="delete it and run the trial again"):
        read_trained_model(tmp_path, done.trial)
    msgspec.structs.replace(done, trial=ObjectiveTrial("other", 0)).save(tmp_path)
    assert read_trained_model(tmp_path, ObjectiveTrial("another", 0)) is None
