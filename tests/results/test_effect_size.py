from __future__ import annotations

import math
import random
import statistics
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_xai.report.tables import per_pair_csv, read_csv
from lightning_xai.results.effect_size import (
    ClassChange,
    GroundingChange,
    grounding_change,
    knowledge_gaps,
    standardised_mean_difference,
)

Row = dict[str, object]


def row(label: str, gamma: float, hit: bool = True) -> Row:
    return {"label": label, "reason": "measured", "gamma": repr(gamma), "hit": str(int(hit)), "caption": "a caption"}


def left_out(label: str, reason: str = "several_instances") -> Row:
    return {"label": label, "reason": reason, "gamma": "", "hit": ""}


def rows(**gammas: list[float]) -> list[Row]:
    return [row(label, gamma) for label, values in gammas.items() for gamma in values]


def labels(changes: tuple[ClassChange, ...]) -> list[str]:
    return [change.label for change in changes]


def test_the_difference_by_hand() -> None:
    # means 6 and 3; squared deviations 8 of 3 values and 2 of 2, so s^2 = (8 + 2) / (3 + 2 - 2); 5/6 + d^2 / 10
    effect = standardised_mean_difference([8, 4, 6], [2, 4])
    assert effect.smd == pytest.approx(3 / math.sqrt(10 / 3))
    assert effect.standard_error == pytest.approx(math.sqrt(5 / 6 + 2.7 / 10))
    assert standardised_mean_difference([2, 4], [8, 4, 6]).smd == -effect.smd


@pytest.mark.parametrize(("n", "m"), [(2, 2), (20, 20), (13, 50)])
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


def test_a_rising_line_leaves_it_as_it_is_and_so_does_the_order() -> None:
    after, before = [0.9, 0.5, 0.8, 0.3], [0.2, 0.4, 0.1]
    effect = standardised_mean_difference(after, before)
    moved = standardised_mean_difference([7 * x - 3 for x in after], [7 * x - 3 for x in before])
    assert asdict(moved) == pytest.approx(asdict(effect))
    assert standardised_mean_difference(after[::-1], [0.4, 0.1, 0.2]) == effect


@pytest.mark.parametrize(
    ("after", "before"), [([], [0.1, 0.2]), ([0.1, 0.2], [0.5]), ([0.1] * 3, [0.1] * 3), ([0.7] * 3, [0.1] * 6)]
)
def test_without_spread_it_is_nan(after: list[float], before: list[float]) -> None:
    assert all(math.isnan(value) for value in asdict(standardised_mean_difference(after, before)).values())


def test_spread_on_one_side_is_enough() -> None:
    assert standardised_mean_difference([0.5, 0.5], [0.1, 0.3]).smd == pytest.approx(0.3 / 0.1)


def test_what_is_no_sample_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="before: 1 of 2 values are not finite"):
        standardised_mean_difference([0.1, 0.2], [math.nan, 0.5])
    with pytest.raises(ValueError, match="after: expected numbers"):
        standardised_mean_difference(np.zeros((2, 2)), [0.1, 0.2])


def test_gaps_start_with_the_worst_class_and_state_its_numbers() -> None:
    table = [*rows(dog=[0.9, 0.8], tie=[0.5, 0.75], cup=[0.25, 0.75]), row("cup", 0.2, hit=False)]
    gaps = knowledge_gaps(table, min_pairs=2)
    assert [found.label for found in gaps.classes] == ["cup", "tie", "dog"]
    cup = gaps.classes[0]
    assert cup.pairs == 3
    assert cup.gamma_mean == pytest.approx(0.4)
    assert cup.gamma_std == pytest.approx(statistics.stdev([0.25, 0.75, 0.2]))
    assert cup.gamma_above_50 == pytest.approx(1 / 3)
    assert cup.rho == pytest.approx(2 / 3)
    assert gaps.classes[1].gamma_above_50 == 0.5, "a gamma of 0.5 is not above it"


def test_gaps_count_what_they_leave_out() -> None:
    table = [*rows(dog=[0.9] * 3, cup=[0.1] * 2), left_out("dog"), left_out("cow"), left_out("cow", "no_positive")]
    gaps = knowledge_gaps(table, min_pairs=3)
    assert [found.label for found in gaps.classes] == ["dog"]
    assert gaps.classes[0].pairs == 3
    assert gaps.too_few == {"cow": 0, "cup": 2}
    assert gaps.left_out == {"no_positive": 1, "several_instances": 2}
    assert math.isnan(knowledge_gaps(rows(dog=[0.9]), min_pairs=1).classes[0].gamma_std)
    assert len(knowledge_gaps(rows(dog=[0.9] * 10, cup=[0.9] * 9)).classes) == 1
    assert knowledge_gaps([]).classes == ()


def test_classes_with_the_same_mean_stand_in_the_order_of_their_names() -> None:
    table = rows(b=[0.3, 0.1, 0.2], a=[0.2, 0.3, 0.1], c=[0.1, 0.2, 0.3])
    for seed in range(5):
        random.Random(seed).shuffle(table)
        assert [found.label for found in knowledge_gaps(table, min_pairs=1).classes] == ["a", "b", "c"]


def test_changes_are_sorted_by_effect_size_and_not_by_difference() -> None:
    before = rows(wide=[0.0, 0.6], narrow=[0.1, 0.12], worse=[0.9, 0.8], same=[0.5, 0.6])
    after = rows(wide=[0.3, 0.9], narrow=[0.2, 0.22], worse=[0.1, 0.2], same=[0.6, 0.5])
    change = grounding_change(before, after, min_pairs=2)
    assert labels(change.classes) == ["narrow", "wide", "same", "worse"]
    assert labels(change.gains()) == ["narrow", "wide"]
    assert labels(change.losses()) == ["worse"]
    narrow = change.classes[0]
    assert narrow.mean_before == pytest.approx(0.11)
    assert narrow.mean_after == pytest.approx(0.21)
    assert narrow.difference == pytest.approx(0.1)
    effect = standardised_mean_difference([0.2, 0.22], [0.1, 0.12])
    assert (narrow.smd, narrow.standard_error) == (effect.smd, effect.standard_error)
    assert all(isinstance(getattr(narrow, field.name), (str, int, float)) for field in fields(narrow))


def test_gains_and_losses_are_cut_to_the_largest() -> None:
    names = ("a", "b", "c", "d", "e", "f", "g")
    before = rows(**{name: [0.4, 0.6] for name in names})
    after = rows(**{name: [0.4 + 0.1 * (i - 3), 0.6 + 0.1 * (i - 3)] for i, name in enumerate(names)})
    change = grounding_change(before, after, min_pairs=2)
    assert labels(change.gains(2)) == ["g", "f"]
    assert labels(change.losses(2)) == ["a", "b"]
    assert labels(change.gains()) == ["g", "f", "e"]
    assert change.gains(0) == change.losses(-1) == ()


def test_swapping_the_runs_turns_every_sign() -> None:
    before, after = rows(dog=[0.1, 0.4, 0.3], cup=[0.8, 0.9]), rows(dog=[0.6, 0.5], cup=[0.7, 0.6, 0.2])
    there, back = (grounding_change(*runs, min_pairs=2) for runs in ((before, after), (after, before)))
    assert labels(there.classes) == labels(back.classes)[::-1]
    for change, turned in zip(there.classes, back.classes[::-1], strict=True):
        assert (turned.smd, turned.difference) == (-change.smd, -change.difference)
        assert turned.standard_error == change.standard_error
        assert (turned.pairs_before, turned.pairs_after) == (change.pairs_after, change.pairs_before)


def test_classes_without_an_effect_size_come_last_and_are_neither_gain_nor_loss() -> None:
    before, after = (
        rows(flat=[0.2] * 3, dog=[0.1, 0.2], cup=[0.8, 0.9]),
        rows(flat=[0.9] * 3, dog=[0.3, 0.2], cup=[0, 1]),
    )
    change = grounding_change(before, after, min_pairs=2)
    assert labels(change.classes) == ["dog", "cup", "flat"]
    assert math.isnan(change.classes[-1].smd)
    assert change.classes[-1].difference == pytest.approx(0.7)
    assert "flat" not in labels(change.gains() + change.losses())


def test_classes_that_only_one_run_has_are_named() -> None:
    before = [*rows(dog=[0.1, 0.2], cup=[0.3, 0.4], few=[0.1]), left_out("cow")]
    after = [*rows(dog=[0.1, 0.2], cow=[0.3, 0.4], few=[0.1, 0.3]), left_out("cup", "span_cut_off"), left_out("owl")]
    change = grounding_change(before, after, min_pairs=2)
    assert isinstance(change, GroundingChange)
    assert labels(change.classes) == ["dog"]
    assert (change.only_before, change.only_after) == (("cup",), ("cow",))
    assert change.too_few == {"few": (1, 2)}
    assert change.left_out_before == {"several_instances": 1}
    assert change.left_out_after == {"several_instances": 1, "span_cut_off": 1}


def test_runs_without_a_common_class_are_refused() -> None:
    many = rows(**{f"class {i}": [0.5] for i in range(7)})
    with pytest.raises(
        ValueError, match=r"before has 7 \('class 0', .*'class 4', ...\), after has 1 \('dog'\); compare"
    ):
        grounding_change(many, rows(dog=[0.1]))
    with pytest.raises(ValueError, match="before has none, after has 1"):
        grounding_change([left_out("dog")], rows(dog=[0.1]))
    assert grounding_change(rows(dog=[0.1]), rows(dog=[0.2])).too_few == {"dog": (1, 1)}


def test_a_table_reads_the_same_from_its_file(tmp_path: Path) -> None:
    measured: list[Row] = [
        {"label": "dog", "reason": "measured", "gamma": np.float32(0.3), "hit": True},
        {"label": "dog", "reason": "measured", "gamma": 1, "hit": False},
        {"label": "dog", "reason": "no_positive", "gamma": None, "hit": None},
    ]
    per_pair_csv(tmp_path / "pairs.csv", measured)
    gaps = knowledge_gaps(measured, min_pairs=1)
    assert knowledge_gaps(read_csv(tmp_path / "pairs.csv"), min_pairs=1) == gaps
    assert (gaps.classes[0].pairs, gaps.classes[0].rho) == (2, 0.5)


@pytest.mark.parametrize("gamma", ["", "nan", "1.5", "-0.1", "inf", "much"])
def test_a_measured_row_without_a_gamma_is_refused_by_number(gamma: str) -> None:
    broken = [row("dog", 0.5), row("dog", 0.5) | {"gamma": gamma}]
    with pytest.raises(ValueError, match=rf"row 1 is measured: expected gamma in \[0, 1\].*'{gamma}'"):
        knowledge_gaps(broken)
    with pytest.raises(ValueError, match="after, row 1 is measured"):
        grounding_change(rows(dog=[0.5]), broken)
    with pytest.raises(ValueError, match="before, row 1 is measured"):
        grounding_change(broken, rows(dog=[0.5]))


@pytest.mark.parametrize("hit", ["", "2", "True", "0.5"])
def test_a_measured_row_without_a_hit_is_refused(hit: str) -> None:
    with pytest.raises(ValueError, match=f"row 0 is measured: .*hit '{hit}'"):
        knowledge_gaps([row("dog", 0.5) | {"hit": hit}])


def test_another_table_and_a_useless_minimum_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 0 has no \['reason', 'hit'\]; expected a table with one row per phrase"):
        knowledge_gaps([{"label": "dog", "gamma": "0.5"}])
    for minimum in (0, -1):
        with pytest.raises(ValueError, match=f"min_pairs: expected at least 1, got {minimum}"):
            knowledge_gaps([], min_pairs=minimum)
        with pytest.raises(ValueError, match=f"min_pairs: expected at least 1, got {minimum}"):
            grounding_change([], [], min_pairs=minimum)
