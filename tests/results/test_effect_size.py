from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lightning_xai.results.effect_size import grounding_change, knowledge_gaps, standardised_mean_difference


def rows(excluded: Mapping[str, str] | None = None, /, **gammas: list[float]) -> pd.DataFrame:
    found = [(label, gamma, "") for label, values in gammas.items() for gamma in values]
    found += [(label, math.nan, why) for label, why in (excluded or {}).items()]
    return pd.DataFrame(found, columns=["label", "value", "excluded"])


def test_the_difference_by_hand() -> None:
    # means 6 and 3; squared deviations 8 of 3 values and 2 of 2, so s^2 = (8 + 2) / (3 + 2 - 2); 5/6 + d^2 / 10
    effect = standardised_mean_difference([8, 4, 6], [2, 4])
    assert effect.smd == pytest.approx(3 / math.sqrt(10 / 3))
    assert effect.standard_error == pytest.approx(math.sqrt(5 / 6 + 2.7 / 10))
    assert standardised_mean_difference([2, 4], [8, 4, 6]).smd == -effect.smd


@pytest.mark.parametrize(("n", "m"), [(2, 2), (13, 50)])
def test_it_is_scipys_t_statistic_without_the_sizes(n: int, m: int) -> None:
    generator = np.random.default_rng(n)
    after, before = generator.normal(0.6, 0.2, n), generator.normal(0.4, 0.1, m)
    expected = stats.ttest_ind(after, before, equal_var=True).statistic * math.sqrt(1 / n + 1 / m)
    assert standardised_mean_difference(after, before).smd == pytest.approx(expected)


def test_its_standard_error_is_its_spread_over_repetitions() -> None:
    generator = np.random.default_rng(1)
    effects = [
        standardised_mean_difference(generator.normal(0.8, 1, 60), generator.normal(0, 1, 40)) for _ in range(2000)
    ]
    spread = statistics.stdev(effect.smd for effect in effects)
    assert statistics.fmean(effect.standard_error for effect in effects) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    ("after", "before"), [([], [0.1, 0.2]), ([0.1, 0.2], [0.5]), ([0.1] * 3, [0.1] * 3), ([0.7] * 3, [0.1] * 6)]
)
def test_without_spread_it_is_nan(after: list[float], before: list[float]) -> None:
    assert all(math.isnan(value) for value in asdict(standardised_mean_difference(after, before)).values())


def test_gaps_start_with_the_worst_class_and_state_its_numbers() -> None:
    gammas = {"dog": [0.9, 0.7, 0.8], "cup": [0.1, 0.4], "cow": [0.5, 0.5]}
    classes = knowledge_gaps(rows(**gammas), min_pairs=2).classes
    assert list(classes.index) == ["cup", "cow", "dog"]
    for label, values in gammas.items():
        found = classes.loc[label]
        assert found["mean"] == pytest.approx(statistics.fmean(values))
        assert found["std"] == pytest.approx(statistics.stdev(values))
        assert found["count"] == len(values)


def test_gaps_count_classes_with_too_few_phrases() -> None:
    table = rows({"dog": "span_cut_off", "cow": "no_positive"}, dog=[0.9] * 3, cup=[0.1] * 2)
    gaps = knowledge_gaps(table, min_pairs=3)
    assert gaps.classes["count"].to_dict() == {"dog": 3}
    assert gaps.too_few == {"cow": 0, "cup": 2}
    assert math.isnan(knowledge_gaps(rows(dog=[0.9]), min_pairs=1).classes["std"]["dog"])
    assert len(knowledge_gaps(rows(dog=[0.9] * 10, cup=[0.9] * 9)).classes) == 1
    assert len(knowledge_gaps(rows()).classes) == 0


def test_classes_with_the_same_mean_are_in_the_order_of_their_names_whatever_the_order_of_rows() -> None:
    table = rows(b=[0.3, 0.1, 0.2], a=[0.2, 0.3, 0.1], c=[0.1, 0.2, 0.3])
    for seed in range(5):
        order = random.Random(seed).sample(range(len(table)), len(table))
        assert list(knowledge_gaps(table.iloc[order], min_pairs=1).classes.index) == ["a", "b", "c"]


def test_changes_are_sorted_by_effect_size_and_not_by_difference() -> None:
    before = rows(wide=[0.0, 0.6], narrow=[0.1, 0.12], worse=[0.9, 0.8], same=[0.5, 0.6])
    after = rows(wide=[0.3, 0.9], narrow=[0.2, 0.22], worse=[0.1, 0.2], same=[0.6, 0.5])
    change = grounding_change(before, after, min_pairs=2)
    assert list(change.classes.index) == ["narrow", "wide", "same", "worse"]
    assert list(change.gains().index) == ["narrow", "wide"]
    assert list(change.gains(1).index) == ["narrow"]
    assert list(change.losses().index) == ["worse"]
    assert len(change.losses(-1)) == 0
    narrow = change.classes.loc["narrow"]
    effect = standardised_mean_difference([0.2, 0.22], [0.1, 0.12])
    assert (narrow["smd"], narrow["standard_error"]) == (effect.smd, effect.standard_error)
    assert narrow[["mean_before", "mean_after", "difference"]].tolist() == pytest.approx([0.11, 0.21, 0.1])


def test_classes_without_an_effect_size_come_last_and_are_neither_gain_nor_loss() -> None:
    before = rows(flat=[0.2] * 3, dog=[0.1, 0.2], cup=[0.8, 0.9])
    change = grounding_change(before, rows(flat=[0.9] * 3, dog=[0.3, 0.2], cup=[0, 1]), min_pairs=2)
    assert list(change.classes.index) == ["dog", "cup", "flat"]
    assert math.isnan(change.classes["smd"]["flat"])
    assert change.classes["difference"]["flat"] == pytest.approx(0.7)
    assert "flat" not in {*change.gains().index, *change.losses().index}


def test_classes_that_only_one_run_has_are_named_and_runs_without_a_common_one_refused() -> None:
    before = rows({"cow": "no_positive"}, dog=[0.1, 0.2], cup=[0.3, 0.4], few=[0.1])
    after = rows({"cup": "no_positive"}, dog=[0.1, 0.2], cow=[0.3, 0.4], few=[0.1, 0.3])
    change = grounding_change(before, after, min_pairs=2)
    assert list(change.classes.index) == ["dog"]
    assert (change.only_before, change.only_after) == (("cup",), ("cow",))
    assert change.too_few == {"few": (1, 2)}
    many = rows(**{f"class {i}": [0.5] for i in range(7)})
    with pytest.raises(
        ValueError, match=r"before has 7 \('class 0', .*'class 4', ...\), after has 1 \('dog'\); compare"
    ):
        grounding_change(many, rows(dog=[0.1]))
    with pytest.raises(ValueError, match="before has none, after has 1"):
        grounding_change(rows({"dog": "no_positive"}), rows(dog=[0.1]))
    for call in (lambda: knowledge_gaps(many, min_pairs=0), lambda: grounding_change(many, many, min_pairs=0)):
        with pytest.raises(ValueError, match="min_pairs: expected at least 1, got 0"):
            call()
