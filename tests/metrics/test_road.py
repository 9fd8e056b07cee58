"""ROAD: the imputation against a dense solution of the published equations, and where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, no_targets
from lightning_xai.metrics.road import impute, road

NEIGHBOURS = {(y, x): 1 / 6 if 0 in (y, x) else 1 / 12 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}


def densely(image: NDArray[np.float64], removed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Each removed pixel of an image [C, h, w] as the weighted mean of its neighbours, by one dense system."""
    height, width = removed.shape
    places = {tuple(place): row for row, place in enumerate(np.argwhere(removed).tolist())}
    matrix, right = np.eye(len(places)), np.zeros((len(places), len(image)))
    for (y, x), row in places.items():
        there = {
            (y + down, x + across): weight
            for (down, across), weight in NEIGHBOURS.items()
            if 0 <= y + down < height and 0 <= x + across < width
        }
        for place, weight in there.items():
            share = weight / sum(there.values())
            if place in places:
                matrix[row, places[place]] -= share
            else:
                right[row] += share * image[:, place[0], place[1]]
    filled: NDArray[np.float64] = image.copy()
    filled[:, removed] = np.linalg.solve(matrix, right).T
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_removed_pixels_are_those_of_a_dense_solution(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 9, 7, generator=generator, dtype=torch.float64)
    removed = torch.rand(3, 9, 7, generator=generator) < share
    removed[:, 4, 2] = False
    removed[2] = False
    found = impute(images, removed, tolerance=1e-12)
    for image, gone, filled in zip(images, removed, found, strict=True):
        np.testing.assert_allclose(filled.numpy(), densely(image.numpy(), gone.numpy()), atol=1e-9)
    alone = torch.cat([impute(images[[row]], removed[[row]]) for row in range(3)])
    assert torch.equal(impute(images, removed), alone), "neighbours in a batch change nothing"


def test_a_constant_image_stays_constant_and_the_default_tolerance_is_below_the_noise() -> None:
    removed = torch.ones(1, 32, 32, dtype=torch.bool)
    removed[:, :3] = False
    constant = torch.full((1, 3, 32, 32), 0.7)
    torch.testing.assert_close(impute(constant, removed), constant)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exact = impute(images.double(), removed, tolerance=1e-12)
    assert float((impute(images, removed) - exact).abs().max()) < 5e-3


def test_nothing_to_fill_in_from_is_refused() -> None:
    with pytest.raises(ValueError, match="all removed"):
        impute(torch.zeros(1, 1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))


def targets_of(images: Tensor, maps: Tensor, seen: list[Tensor]) -> CaptionTargets:
    """The similarity is the mean of the first channel; seen images are kept."""
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)

    def similarity_of(rows: slice, given: Tensor) -> Tensor:
        seen.append(given)
        return given[:, 0].mean(dim=(1, 2))

    return replace(
        empty,
        image_maps=maps,
        similarity=images[:, 0].mean(dim=(1, 2)),
        item=torch.arange(len(images)) + 7,
        pixels=lambda rows: images[rows],
        similarity_of=similarity_of,
        batch_size=2,
    )


def test_the_most_and_the_least_important_pixels_are_replaced_and_the_rest_is_not() -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images[:, 0, :, :2] += 3  # what speaks for the caption is on the left
    maps = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64).reshape(3, 1, 2)
    seen: list[Tensor] = []
    found = road(targets_of(images, maps, seen), fractions=[0.25, 0.5], noise=0.0)
    assert float(found["road"][0]) > 0 > float(found["road"][1])
    assert all(found[name][2].isnan() for name in found), "a constant map has no order"
    torch.testing.assert_close(found["road"], found["road_least"] - found["road_most"], equal_nan=True)
    # Two slices, of which each sees the most important removed at both fractions, then the least important.
    assert [len(each) for each in seen] == [2] * 4 + [1] * 4
    half = seen[1][0]
    assert torch.equal(half[:, :, 2:], images[0, :, :, 2:])
    gone = np.zeros((4, 4), dtype=np.bool_)
    gone[:, :2] = True
    np.testing.assert_allclose(half.numpy(), densely(images[0].numpy(), gone), atol=1e-3)
    similarities = torch.stack([each[0, 0].mean() for each in seen[:2]])
    assert float(found["road_most"][0]) == pytest.approx(float(similarities.mean()))


def test_noise_is_that_of_the_item_alone() -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    maps = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(3))
    whole, alone, quiet = [], [], []  # type: list[Tensor], list[Tensor], list[Tensor]
    road(targets_of(images, maps, whole), fractions=[0.5])
    road(replace(targets_of(images[[2]], maps[[2]], alone), item=torch.tensor([9])), fractions=[0.5])
    road(targets_of(images, maps, quiet), fractions=[0.5], noise=0.0)
    assert torch.equal(whole[2], alone[0])
    noise = (whole[2] - quiet[2]) / 0.01
    assert 0.5 < float(noise[noise != 0].std()) < 2


@pytest.mark.parametrize("options", [{"fractions": []}, {"fractions": [1.0]}, {"noise": -1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fractions between 0 and 1, and noise >= 0"):
        road(no_targets("caption"), **options)  # type: ignore[arg-type]
