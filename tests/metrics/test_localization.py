"""Localization against numpy's quantile and plain loops over pixels (M2IB paper, Eq. 16)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_xai.metrics.localization import LocalizationMetric, binarised, box_union, intersection_over_union


def random_maps(seed: int, size: tuple[int, int] = (7, 9), levels: int = 0) -> Tensor:
    """Maps [6, h, w]; with few levels there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (6, *size), generator=generator).float()
    return torch.randn(6, *size, generator=generator)


@pytest.mark.parametrize("levels", [0, 2, 5])
@pytest.mark.parametrize("quantile", [0.0, 0.125, 0.5, 0.75, 0.9375, 1.0])
def test_places_above_numpys_quantile_remain(quantile: float, levels: int) -> None:
    maps = random_maps(levels, levels=levels)
    for one, places in zip(maps.numpy(), binarised(maps, quantile).numpy(), strict=True):
        assert (places == (one > np.quantile(one, quantile, method="inverted_cdf"))).all()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (3, 1)])
def test_a_quarter_remains_without_ties(size: tuple[int, int]) -> None:
    count = size[0] * size[1]
    maps = torch.randperm(count).reshape(1, *size).float()
    places = binarised(maps)
    assert int(places.sum()) == count - math.ceil(0.75 * count) == count // 4
    assert maps[places].tolist() == [] or maps[places].min() > maps[~places].max()


@pytest.mark.parametrize(("quantile", "remaining"), [(0.07, 93), (0.14, 86), (0.28, 72), (0.29, 71), (0.57, 43)])
def test_a_share_that_binary_fractions_miss_is_still_exact(quantile: float, remaining: int) -> None:
    assert int(binarised(torch.arange(100.0).reshape(1, 10, 10), quantile).sum()) == remaining


def test_each_map_has_a_threshold_of_its_own_and_a_constant_one_no_place() -> None:
    ramp = torch.arange(16.0).reshape(4, 4)
    maps = torch.stack([ramp, 100 + ramp / 100, torch.full((4, 4), 3.0), -ramp])
    places = binarised(maps)
    assert places.flatten(1).sum(dim=1).tolist() == [4, 4, 0, 4]
    assert torch.equal(places[0], places[1])
    assert torch.equal(places[0], places[3].flip(0, 1))


def test_values_equal_to_the_threshold_do_not_remain() -> None:
    assert binarised(torch.tensor([[[0.0, 1.0, 1.0, 1.0]]])).tolist() == [[[False] * 4]]
    assert binarised(torch.tensor([[[0.0, 0.0, 0.0, 1.0]]])).tolist() == [[[False, False, False, True]]]


def test_no_maps_have_no_places() -> None:
    assert binarised(torch.zeros(0, 4, 4)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("maps", "quantile", "message"),
    [
        (torch.zeros(4, 4), 0.75, r"\[N, h, w\]; got \[4, 4\]"),
        (torch.tensor([[[0.0, math.nan]]]), 0.75, "finite"),
        (torch.tensor([[[0.0, math.inf]]]), 0.75, "finite"),
        (torch.zeros(1, 2, 2), 1.01, r"\[0, 1\]; got 1.01"),
        (torch.zeros(1, 2, 2), -0.5, "got -0.5"),
        (torch.zeros(1, 2, 2), math.nan, "got nan"),
    ],
)
def test_maps_and_quantiles_that_make_no_sense_are_refused(maps: Tensor, quantile: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        binarised(maps, quantile)


def test_the_union_of_boxes_agrees_with_a_plain_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(9, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([11.0, 7.0])
    corners[3] = torch.tensor([[2.5, 1.5], [4.5, 3.5]])  # edges on the centres of pixels
    corners[4] = torch.tensor([[-5.0, -5.0], [3.0, 99.0]])  # sticks out
    boxes, owner = corners.flatten(1), torch.tensor([0, 3, 0, 1, 1, 3, 3, 0, 1])
    union = box_union(boxes, owner, 4, (7, 11))
    for number in range(4):
        own = boxes[owner == number].tolist()
        for row in range(7):
            for column in range(11):
                x, y = column + 0.5, row + 0.5
                inside = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in own)
                assert bool(union[number, row, column]) is inside
    assert not union[2].any()
    assert union[0].any()


def test_boxes_that_overlap_count_once_and_a_box_between_centres_not_at_all() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [0.6, 0.6, 1.4, 1.4]])
    assert int(box_union(boxes[:2], torch.tensor([0, 0]), 1, (4, 4)).sum()) == 6
    assert not box_union(boxes[2:], torch.tensor([0]), 1, (4, 4)).any()


def test_no_boxes_at_all_cover_nothing() -> None:
    union = box_union(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, (3, 5))
    assert union.shape == (2, 3, 5)
    assert not union.any()


def test_the_ratio_agrees_with_sets_of_places() -> None:
    ours, theirs = random_maps(0) > 0.3, random_maps(1) > 0
    theirs[2] = False
    for row, value in enumerate(intersection_over_union(ours, theirs).tolist()):
        first, second = ({tuple(place) for place in part[row].nonzero().tolist()} for part in (ours, theirs))
        assert value == len(first & second) / len(first | second)


def test_a_perfect_map_has_one_a_wrong_one_zero_and_nothing_against_nothing_no_number() -> None:
    box = box_union(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([0]), 1, (4, 4))
    heat = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert intersection_over_union(binarised(heat + 2 * box), box).tolist() == [1.0]
    assert intersection_over_union(binarised(heat - 2 * box), box).tolist() == [0.0]
    assert intersection_over_union(binarised(torch.ones(1, 4, 4)), box).tolist() == [0.0]
    assert math.isnan(intersection_over_union(torch.zeros(1, 4, 4).bool(), torch.zeros(1, 4, 4).bool()).item())


def test_the_mean_is_over_maps_with_boxes_alone() -> None:
    metric = LocalizationMetric()
    metric.update(torch.tensor([0.25, math.nan, 1.0]))
    metric.update(torch.tensor([math.nan, 0.5, 0.25]))
    assert metric.compute() == {"localization_iou": 0.5}
