"""Gamma and rho by mask: known answers, and the formulas written out pixel by pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_xai.metrics import gamma, mask_patches, patch_mask, patch_shares, pixel_average_precision
from lightning_xai.metrics.base import CaptionTargets, PhraseTargets, no_targets
from lightning_xai.metrics.localization import box_union
from lightning_xai.metrics.mask_grounding import mask_grounding
from lightning_xai.metrics.mask_localization import mask_localization

GRID, SIZE = (6, 4), (48, 32)


def shares_of(boxes: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside = box_union(boxes, torch.arange(len(boxes)), len(boxes), SIZE)
    return patch_mask(boxes, GRID, SIZE), patch_shares(inside, GRID), patch_shares(inside & pixels, GRID)


def random_boxes(generator: torch.Generator, count: int) -> Tensor:
    height, width = SIZE
    start = torch.rand(count, 2, generator=generator) * torch.tensor([width - 12.0, height - 12.0])
    size = 3 + torch.rand(count, 2, generator=generator) * torch.tensor([20.0, 30.0])
    return torch.cat([start, torch.minimum(start + size, torch.tensor([float(width), float(height)]))], dim=1).round()


def test_a_mask_that_fills_its_box_has_the_patches_of_the_box() -> None:
    boxes = random_boxes(torch.Generator().manual_seed(0), 200)
    masks, box_shares, mask_shares = shares_of(boxes, torch.ones(200, *SIZE, dtype=torch.bool))
    assert torch.equal(mask_patches(masks, box_shares, mask_shares), masks)


def test_patches_of_masks_are_as_counted_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(1)
    boxes = random_boxes(generator, 60)
    pixels = torch.rand(60, 1, *SIZE, generator=generator)
    pixels = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)[:, 0] > torch.linspace(0.3, 0.7, 60)[:, None, None]
    masks, box_shares, mask_shares = shares_of(boxes, pixels)
    found = mask_patches(masks, box_shares, mask_shares)
    for row, (x0, y0, x1, y1) in enumerate(boxes.long().tolist()):
        of_box, of_mask = np.zeros(GRID, dtype=int), np.zeros(GRID, dtype=int)
        for y in range(y0, y1):
            for x in range(x0, x1):
                of_box[y // 8, x // 8] += 1
                of_mask[y // 8, x // 8] += int(pixels[row, y, x])
        patches = {
            (i, j)
            for i, j in np.argwhere(masks[row].numpy()).tolist()
            if of_mask[i, j] and 2 * of_mask[i, j] >= of_box[i, j]
        }
        if not patches:
            allowed = masks[row].numpy() if (of_mask * masks[row].numpy()).any() else np.ones(GRID, dtype=bool)
            most = (of_mask * allowed).max()
            patches = {(i, j) for i, j in np.argwhere((of_mask == most) & allowed).tolist()} if most else set()
        assert {tuple(place) for place in found[row].nonzero().tolist()} == patches


def test_gamma_by_mask_counts_what_the_box_holds_beside_the_object_as_wrong() -> None:
    # The object is the left half of its box, where a quarter of the attribution to the box is.
    maps = torch.zeros(1, *GRID)
    maps[0, 1, :3] = torch.tensor([1.0, 3.0, 4.0])
    maps[0, 5, 3] = -8.0
    boxes = torch.tensor([[0.0, 8.0, 16.0, 16.0]])
    pixels = torch.zeros(1, *SIZE, dtype=torch.bool)
    pixels[0, :, :8] = True
    masks, box_shares, mask_shares = shares_of(boxes, pixels)
    values = mask_grounding(PhraseTargets(maps, masks, True, box_shares, mask_shares))
    assert {name: value.tolist() for name, value in values.items()} == {
        "gamma_mask": [1 / 8],
        "rho_mask": [0],
        "mask_fill": [0.5],
    }
    assert gamma(maps, masks).tolist() == [0.5]


def test_gamma_by_mask_is_at_most_gamma_by_box_where_the_mask_has_patches_of_it() -> None:
    generator = torch.Generator().manual_seed(2)
    boxes, maps = random_boxes(generator, 100), torch.randn(100, *GRID, generator=generator)
    pixels = torch.rand(100, *SIZE, generator=generator) > 0.5
    masks, box_shares, mask_shares = shares_of(boxes, pixels)
    values = mask_grounding(PhraseTargets(maps, masks, True, box_shares, mask_shares))
    assert (values["gamma_mask"] <= gamma(maps, masks)).all()
    assert values["mask_fill"].numpy() == pytest.approx(0.5, abs=0.3)


def test_a_small_object_has_the_patch_that_holds_most_of_it() -> None:
    boxes = torch.tensor([[2.0, 2.0, 22.0, 14.0]])
    pixels = torch.zeros(1, *SIZE, dtype=torch.bool)
    pixels[0, 10, 6:9] = True  # two pixels of patch (1, 0), one of patch (1, 1)
    masks, box_shares, mask_shares = shares_of(boxes, pixels)
    assert mask_patches(masks, box_shares, mask_shares).nonzero().tolist() == [[0, 1, 0]]


def average_precision(values: list[float], truth: list[bool]) -> float:
    """Written out: precision at each distinct value, weighted by what recall gains there."""
    total, recall_before = 0.0, 0.0
    for value in sorted(set(values), reverse=True):
        reached = [wanted for other, wanted in zip(values, truth, strict=True) if other >= value]
        recall = sum(reached) / sum(truth)
        total += (recall - recall_before) * sum(reached) / len(reached)
        recall_before = recall
    return total


def test_average_precision_of_pixels_is_as_written_out_at_any_scale() -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(6, 9, 7, generator=generator)
    maps[1] = maps[1].round()
    maps[2] = 0.0
    maps[3] *= 1e-30
    maps[4] += 1e6
    truth = torch.rand(6, 9, 7, generator=generator) > 0.7
    truth[5] = False
    found = pixel_average_precision(maps, truth)
    for row in range(5):
        expected = average_precision(maps[row].flatten().tolist(), truth[row].flatten().tolist())
        assert found[row].item() == pytest.approx(expected, rel=1e-6)
    assert found[2].item() == pytest.approx(truth[2].double().mean().item(), rel=1e-6)
    assert found[5].isnan()


def test_average_precision_by_box_is_of_the_captions_that_have_it_by_mask() -> None:
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)
    truth = torch.zeros(2, *SIZE, dtype=torch.bool)
    truth[0, 10:20, 4:12] = True  # of the other caption, the crop leaves the box alone
    targets = replace(
        empty,
        image_maps=torch.randn(2, *GRID, generator=torch.Generator().manual_seed(4)),
        boxes=torch.tensor([[4.0, 10.0, 12.0, 20.0], [0.0, 0.0, 3.0, 3.0]]),
        box_owner=torch.tensor([0, 1]),
        image_size=SIZE,
        mask_pixels=lambda rows: truth[rows],
    )
    for name, values in mask_localization(targets).items():
        assert values.isnan().tolist() == [False, True], name


def test_average_precision_does_not_hang_on_rounding() -> None:
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)
    generator = torch.Generator().manual_seed(5)
    maps = torch.randint(-2, 3, (20, *GRID), generator=generator) / 3
    truth = torch.rand(20, *SIZE, generator=generator) > 0.7
    boxes, owner = random_boxes(generator, 20), torch.arange(20)
    found = [
        mask_localization(
            replace(
                empty,
                image_maps=maps * (1 + noise * torch.rand(20, *GRID, generator=generator)),
                boxes=boxes,
                box_owner=owner,
                image_size=SIZE,
                mask_pixels=lambda rows: truth[rows],
                batch_size=20,
            )
        )
        for noise in (0.0, 2e-7)
    ]
    for name in ("ap_mask", "ap_box"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-4)
