"""Attributions to the boxes of other objects (section 4.3): the pairs."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_xai.metrics.other_objects import OtherObjectsMetric, directed_pairs


def test_pairs_agree_with_a_plain_loop_and_come_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    caption, label = torch.randint(5, (30,), generator=generator), torch.randint(4, (30,), generator=generator)
    expected = [
        [selected, other]
        for selected in range(30)
        for other in range(30)
        if caption[selected] == caption[other] and label[selected] != label[other]
    ]
    pairs = directed_pairs(caption, label).tolist()
    assert pairs == expected
    assert all([other, selected] in pairs for selected, other in pairs)
    assert len(pairs) > 30


@pytest.mark.parametrize(("caption", "label"), [([], []), ([0], [1]), ([0, 1], [0, 1]), ([2, 2], [7, 7])])
def test_phrases_alone_in_their_caption_or_of_one_class_make_no_pair(caption: list[int], label: list[int]) -> None:
    pairs = directed_pairs(torch.tensor(caption).long(), torch.tensor(label).long())
    assert pairs.shape == (0, 2)
    assert pairs.dtype == torch.int64


def test_zero_is_neither_positive_nor_negative() -> None:
    metric = OtherObjectsMetric()
    metric.update(torch.tensor([0.0, -0.0, 1e-30, -1.0, 5.0]), torch.tensor([-1e-30, 0.0, -0.0, 1.0, -2.0]))
    assert metric.compute() == {"own_positive": 2 / 5, "other_negative": 2 / 5}


@pytest.mark.parametrize("side", ["own", "other"])
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_attributions_that_are_not_finite_are_refused_by_name(side: str, broken: float) -> None:
    metric = OtherObjectsMetric()
    values = {"own": torch.zeros(2), "other": torch.zeros(2), side: torch.tensor([0.0, broken])}
    with pytest.raises(ValueError, match=f"the {side} box has to be finite"):
        metric.update(**values)
    assert len(metric.rows()) == 0
