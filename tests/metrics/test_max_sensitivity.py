from __future__ import annotations

from dataclasses import replace

import captum.metrics
import pytest
import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, no_targets
from lightning_xai.metrics.max_sensitivity import max_sensitivity


def targets_of(images: Tensor, items: list[int], seen: list[Tensor], *, size: int = 2) -> CaptionTargets:
    """A method whose map is the first channel."""
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)

    def attribute(rows: slice, given: Tensor) -> Tensor:
        seen.append(given)
        return given[:, 0]

    return replace(
        empty,
        image_maps=images[:, 0],
        similarity=images[:, 0, 0, 0],
        item=torch.tensor(items),
        pixels=lambda rows: images[rows],
        attribute=attribute,
        batch_size=size,
    )


def test_it_is_the_largest_relative_change_of_the_map_under_noise_of_the_item() -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[1] = 0
    seen: list[Tensor] = []
    found = max_sensitivity(targets_of(images, [5, 6, 7], seen), samples=4, radius=0.1)["max_sensitivity"]
    noisy = torch.stack([torch.cat([seen[sample], seen[4 + sample]]) for sample in range(4)])
    noise = noisy - images
    assert 0.09 < float(noise.abs().max()) <= 0.1 + 1e-6
    assert (noise[0] - noise[1]).abs().min() > 0
    expected = noise[:, :, 0].flatten(2).norm(dim=2).amax(dim=0) / images[:, 0].flatten(1).norm(dim=1)
    assert found[[0, 2]].tolist() == pytest.approx(expected[[0, 2]].tolist(), rel=1e-5)
    assert found[1].isnan(), "a map of zeros"
    alone = max_sensitivity(targets_of(images[[2]], [7], []), samples=4, radius=0.1)["max_sensitivity"]
    assert float(alone) == float(found[2])


def test_it_is_captums_for_the_same_noise() -> None:
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    found = max_sensitivity(targets_of(images, [5], seen), samples=6, radius=0.1)["max_sensitivity"]

    def explained(given: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        inputs = given if isinstance(given, Tensor) else given[0]
        return (inputs[:, :1].repeat(1, 3, 1, 1),)  # of the inputs' shape, which scales both norms alike

    expected = captum.metrics.sensitivity_max(
        explained, images, perturb_func=lambda given, radius: torch.cat(seen), n_perturb_samples=6
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="samples >= 1 and radius > 0; got 0 and"):
        max_sensitivity(no_targets("caption"), samples=0)  # type: ignore[arg-type]
