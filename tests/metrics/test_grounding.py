from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import PhraseTargets
from lightning_xai.metrics.grounding import (
    box_attribution,
    gamma,
    grounding,
    measurable,
    patch_mask,
    rho,
)

GRID, IMAGE = (3, 4), (48, 64)  # patches of 16 pixels


def random_maps(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signed maps [rows, 5, 7] and masks of random boxes."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(rows, 5, 7, generator=generator)
    corners = torch.rand(rows, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([70.0, 50.0])
    return maps, patch_mask(corners.flatten(1), (5, 7), (50, 70))


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0, 0, 64, 48), [0, 1, 2], [0, 1, 2, 3]),
        ((16, 16, 48, 32), [1], [1, 2]),
        ((9, 0, 55, 16), [0], [1, 2]),  # touches four patches, its edges are nearest to 16 and 48
        ((7, 0, 57, 16), [0], [0, 1, 2, 3]),
        ((8, 0, 40, 16), [0], [1, 2]),  # halves move up, both of them: two patches wide stays two patches wide
        ((24, 0, 56, 16), [0], [2, 3]),
        ((17, 17, 21, 22), [1], [1]),  # smaller than a patch: the one under the centre
        ((26, 0, 38, 48), [0, 1, 2], [2]),  # narrow but tall; the centre x = 32 opens the third column
        ((-30, -30, 16, 16), [0], [0]),  # the outside is cut off
        ((48, 32, 90, 90), [2], [3]),
        ((64, 48, 64, 48), [2], [3]),  # no area at the far corner still gives a patch inside the grid
        ((100, 100, 120, 120), [2], [3]),
    ],
)
def test_box_edges_move_to_the_nearest_patch_edge(box: tuple[int, ...], rows: list[int], columns: list[int]) -> None:
    expected = torch.zeros(GRID, dtype=torch.bool)
    for row in rows:
        expected[row, columns] = True
    assert patch_mask(torch.tensor([box], dtype=torch.float32), GRID, IMAGE)[0].tolist() == expected.tolist()


def test_the_grid_is_rows_by_columns_and_the_image_height_by_width() -> None:
    mask = patch_mask(torch.tensor([[0.0, 0.0, 10.0, 40.0]]), (4, 2), (40, 20))
    assert mask.int().tolist() == [[[1, 0]] * 4]


def test_the_mask_keeps_the_area_of_a_box_on_average_over_its_positions() -> None:
    offsets = torch.arange(0, 32, 0.25)
    boxes = torch.stack([offsets, offsets, offsets + 25, offsets + 25], dim=1)
    covered = patch_mask(boxes, (6, 6), (96, 96)).any(dim=1).sum(dim=1).double()
    assert covered.mean().item() == pytest.approx(25 / 16, abs=1e-9)


def test_a_box_has_to_be_larger_than_one_patch_in_area_not_in_width() -> None:
    boxes = torch.tensor([[0, 0, 16, 16], [0, 0, 4, 64], [0, 0, 4, 65], [-16, 0, 15, 16], [9, 9, 2, 2]])
    reason = measurable(torch.zeros(5).long(), boxes.float(), (8, 4), (128, 64))
    assert (reason == Exclusion.MEASURED).tolist() == [False, False, True, False, False]


def test_only_measured_rows_become_smaller_than_a_patch() -> None:
    reason = torch.tensor([Exclusion.MEASURED, Exclusion.MEASURED, Exclusion.OUTSIDE_CROP])
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 17, 16], [0, 0, 0, 0]])
    result = measurable(reason, boxes, GRID, IMAGE)
    assert result.tolist() == [Exclusion.SMALLER_THAN_PATCH, Exclusion.MEASURED, Exclusion.OUTSIDE_CROP]
    assert reason[0] == Exclusion.MEASURED


@pytest.mark.parametrize("boxes", [torch.zeros(4), torch.zeros(2, 5), torch.tensor([[0.0, 0.0, math.nan, 1.0]])])
def test_boxes_that_are_none_are_refused(boxes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"box"):
        patch_mask(boxes, GRID, IMAGE)


def test_gamma_and_rho_agree_with_a_plain_loop() -> None:
    maps, masks = random_maps(40)
    for row, (value, hit) in enumerate(zip(gamma(maps, masks).tolist(), rho(maps, masks).tolist(), strict=True)):
        inside = total = 0.0
        best, best_inside = -math.inf, False
        for y in range(5):
            for x in range(7):
                entry = maps[row, y, x].item()
                total += max(entry, 0.0)
                inside += max(entry, 0.0) if masks[row, y, x] else 0.0
                if entry > best:
                    best, best_inside = entry, bool(masks[row, y, x])
        assert value == pytest.approx(inside / total, abs=1e-14)
        assert hit == best_inside


def test_the_attribution_of_a_box_is_the_sum_of_both_signs_inside_it() -> None:
    maps, masks = random_maps(40)
    for row, value in enumerate(box_attribution(maps, masks).tolist()):
        inside = [maps[row, y, x].item() for y in range(5) for x in range(7) if masks[row, y, x]]
        assert value == pytest.approx(math.fsum(inside), abs=1e-13)
    everything = box_attribution(maps, torch.ones_like(masks))
    torch.testing.assert_close(box_attribution(maps, masks) + box_attribution(maps, ~masks), everything)


def test_attributions_of_boxes_are_summed_in_double_precision_and_without_graph() -> None:
    maps = torch.tensor([[[1.0, 2.0**-12], [2.0**-12, -1.0]]], dtype=torch.float16).requires_grad_()
    total = box_attribution(maps, torch.ones(1, 2, 2).bool())
    assert total.tolist() == [2.0**-11]
    assert not total.requires_grad


def test_attributions_of_boxes_refuse_what_is_no_map() -> None:
    with pytest.raises(ValueError, match="not finite"):
        box_attribution(torch.tensor([[[math.nan]]]), torch.ones(1, 1, 1).bool())
    with pytest.raises(ValueError, match="bool masks"):
        box_attribution(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))


def test_gamma_does_not_change_when_the_map_is_scaled() -> None:
    maps, masks = random_maps(20)
    torch.testing.assert_close(gamma(maps * 2.0**-60, masks), gamma(maps, masks), rtol=0, atol=0)
    assert ((gamma(maps, masks) >= 0) & (gamma(maps, masks) <= 1)).all()


def test_gamma_of_a_uniform_map_is_the_share_of_the_area() -> None:
    _, masks = random_maps(20)
    uniform = torch.full(masks.shape, 0.1)
    torch.testing.assert_close(gamma(uniform, masks), masks.double().mean(dim=(1, 2)), rtol=0, atol=1e-15)


def test_a_box_around_everything_holds_everything() -> None:
    maps, masks = random_maps(20)
    everything = torch.ones_like(masks)
    assert gamma(maps, everything).tolist() == [1.0] * 20
    assert rho(maps, everything).all()
    assert gamma(maps, ~everything).tolist() == [0.0] * 20
    assert not rho(maps, ~everything).any()


def test_a_tie_is_a_hit_only_if_every_largest_entry_is_inside() -> None:
    maps = torch.tensor([[[5.0, 5.0, 1.0]]]).expand(3, 1, 3)
    masks = torch.tensor([[[True, True, False]], [[True, False, False]], [[False, True, True]]])
    assert rho(maps, masks).tolist() == [True, False, False]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_a_positive_entry_has_no_gamma_and_no_hit(value: float) -> None:
    maps, masks = torch.full((1, 2, 2), value), torch.ones(1, 2, 2, dtype=torch.bool)
    assert gamma(maps, masks).isnan().all()
    assert not rho(maps, masks).any()


@pytest.mark.parametrize("function", [gamma, rho])
def test_a_map_that_is_not_finite_is_refused(function: Any) -> None:
    maps = torch.ones(3, 2, 2)
    maps[1, 0, 0], maps[2, 1, 1] = math.nan, -math.inf
    with pytest.raises(ValueError, match=r"2 of 3 rows is not finite.*weights"):
        function(maps, torch.ones(3, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[R, H, W\]"):
        function(torch.ones(3, 2, 2), torch.ones(3, 2, 2))


def test_the_long_table_has_no_value_where_a_map_has_no_positive_entry() -> None:
    maps, masks = random_maps(3)
    maps[1] = -1
    found = grounding(PhraseTargets(maps, masks, signed=True))
    assert found["rho"].isnan().tolist() == found["gamma"].isnan().tolist() == [False, True, False]
    assert found["gamma"][0] == gamma(maps, masks)[0]
    assert found["rho"][0] == rho(maps, masks)[0]
