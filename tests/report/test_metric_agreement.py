"""The page that says which metrics agree on the order of methods."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from result_folders import SKILLS, write_evaluation
from scipy.stats import spearmanr

from lightning_xai.metrics import METRICS
from lightning_xai.report.page import Chart, Note
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.sections.metric_agreement import (
    agreement_blocks,
    agreement_sentence,
    method_scores,
    rank_agreement,
    truth_names,
)
from lightning_xai.results.runs import Run, load_runs

FIVE = {"feature_pair": 0.3, "m2ib": 0.5, "kernel_shap": 0.6, "integrated_gradients": 0.7, "saliency": 0.4}
BASELINE = {"random": 0.1}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write_evaluation(tmp_path, FIVE | BASELINE, speed={"seconds_per_pair": 0.5, "seconds_per_pair/m2ib": 4.0})
    return load_runs([tmp_path])[0]


def test_agreement_is_scipys_rank_correlation_over_the_methods_that_have_both_baselines_left_out(run: Run) -> None:
    frame = method_scores(run.measurements[0])
    assert set(frame.index) == set(FIVE)
    matrix = rank_agreement(frame)
    for one in frame:
        for other in frame:
            both = frame[[one, other]].dropna()
            if len(both) >= 4:
                expected = spearmanr(both[one], both[other]).statistic
                assert matrix.loc[one, other] == pytest.approx(expected, abs=1e-12)
            else:
                assert pd.isna(matrix.loc[one, other])


def test_smaller_is_better_where_the_metric_says_so_and_scores_of_no_direction_are_left_out(run: Run) -> None:
    frame, measurement = method_scores(run.measurements[0]), run.measurements[0]
    drop = {label: found["image_drop"].mean for label, found in measurement.estimates("confidence").items()}
    assert frame["image_drop"].to_dict() == {label: -drop[label] for label in frame.index}
    assert "gamma_std" not in frame


def test_the_sentence_says_which_scores_agree_with_where_the_objects_are() -> None:
    order = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    frame = pd.DataFrame({"gamma": order, "good": order, "bad": order[::-1], "odd": [3.0, 5.0, 1.0, 6.0, 2.0, 4.0]})
    sentence = agreement_sentence(frame, ["gamma"])
    assert "these agree: good (1.00)" in sentence
    assert "these cannot be distinguished from chance: odd (0.03)" in sentence
    assert "these have the opposite order: bad (-1.00)" in sentence


def test_scores_of_few_methods_are_named_but_not_compared_with_the_chance_of_many() -> None:
    order = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    frame = pd.DataFrame({"gamma": order, "good": order, "pairwise": [1.0, 2.0, 3.0, 4.0, math.nan, math.nan]})
    sentence = agreement_sentence(frame, ["gamma"])
    assert "these agree: good (1.00)." in sentence
    assert "Too few methods have pairwise (4)." in sentence


def test_boxes_and_masks_are_the_truth_and_a_referee_is_not() -> None:
    knows = {
        name: METRICS[name].record({}).knows_objects for name in ("grounding", "mask_grounding", "agreement", "road")
    }
    assert knows == {"grounding": True, "mask_grounding": True, "agreement": False, "road": False}
    by_mask_alone = replace(METRICS["mask_localization"], needs_boxes=False)
    assert by_mask_alone.record({}).knows_objects


def test_the_page_has_every_score_the_matrix_and_the_cost_in_forward_passes(run: Run) -> None:
    every, note, chart, cost = agreement_blocks([run])
    assert isinstance(every, PaperTable)
    assert [row[0] for row in every.rows] == [*FIVE, *BASELINE]
    assert every.baselines == 1
    assert isinstance(note, Note)
    assert isinstance(chart, Chart)
    assert chart.figure.axes[0].get_yticklabels()[0].get_text() in truth_names(run.measurements[0])
    assert isinstance(cost, PaperTable)
    assert cost.rows == [["m2ib", 4.0, 8.0]]


def test_two_methods_have_no_order_to_agree_on(tmp_path: Path) -> None:
    write_evaluation(tmp_path, SKILLS)
    assert agreement_blocks(load_runs([tmp_path])) == []
