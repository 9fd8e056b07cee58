from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from lightning_xai.metrics.caption_choice import Choice, choice_scores, pair_choice


def literal_pair(similarity: Tensor) -> tuple[bool, bool, bool]:
    """Eqs. 1 to 3 of the paper; similarity[c, i] of caption c and image i."""
    s = similarity.tolist()
    text = s[0][0] > s[1][0] and s[1][1] > s[0][1]
    image = s[0][0] > s[0][1] and s[1][1] > s[1][0]
    return text, image, text and image


def test_scores_of_pairs_are_those_of_the_paper() -> None:
    similarities = torch.randint(0, 4, (300, 2, 2), generator=torch.Generator().manual_seed(0)).double()  # many ties
    own = similarities.diagonal(dim1=1, dim2=2)
    wrong = torch.stack([similarities[:, 1, 0], similarities[:, 0, 1]], dim=1)
    found = pair_choice(own, wrong)
    literal = [literal_pair(each) for each in similarities]
    for name, expected in zip(("text", "image", "group"), zip(*literal, strict=True), strict=True):
        assert found[name].tolist() == list(expected)
    choices = [
        Choice("", str(pair), float(own[pair, side]), float(wrong[pair, side]))
        for pair in range(300)
        for side in (0, 1)
    ]
    random.Random(0).shuffle(choices)
    scores = choice_scores(choices)
    assert scores.pairs == {name: int(value.sum()) for name, value in found.items()}
    assert (scores.pairs_asked, scores.incomplete) == (300, 0)


def test_kinds_are_counted_one_by_one_and_a_tie_or_no_number_is_a_miss() -> None:
    values = [("swap", 0.5, 0.4), ("swap", 0.4, 0.4), ("add", 0.1, 0.2), ("swap", math.nan, 0.1), ("add", 0.3, -0.3)]
    scores = choice_scores(Choice(kind, "", true, wrong) for kind, true, wrong in values)
    assert scores.asked == Counter(kind for kind, _, _ in values)
    assert scores.right == {"add": 1, "swap": 1}
    assert scores.micro == 2 / 5
    assert scores.macro == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_a_group_that_is_no_pair_is_counted_and_has_no_score() -> None:
    scores = choice_scores([Choice("", "alone", 1, 0), *[Choice("", "three", 1, 0)] * 3])
    assert (scores.pairs_asked, scores.incomplete, scores.asked) == (0, 2, {"": 4})
    empty = choice_scores([])
    assert math.isnan(empty.micro)
    assert math.isnan(empty.macro)
    assert (empty.asked, empty.pairs_asked) == ({}, 0)
