"""Infidelity against Captum's and against plain loops."""

from __future__ import annotations

from dataclasses import replace

import captum.metrics
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, no_targets
from lightning_xai.metrics.infidelity import infidelity, squared_error


def similarity_of(present: Tensor) -> Tensor:
    """A game of six players with interactions: [N, 6] -> [N]."""
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    return torch.tanh((present.double() * weights).sum(dim=1)) + 0.3 * present[:, 0] * present[:, 5]


@pytest.fixture(scope="module")
def targets() -> CaptionTargets:
    """Two images of 2 x 3 patches and captions of six tokens, whose similarity is a known game of either."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    present = torch.rand(2, 40, 6, generator=generator) < 0.5
    left = torch.stack([similarity_of(each) for each in present])
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)
    return replace(
        empty,
        image_maps=maps.reshape(2, 2, 3),
        text_maps=maps.flip(0),
        content=torch.ones(2, 6, dtype=torch.bool),
        similarity=similarity_of(torch.ones(2, 6)),
        image_coalitions=lambda count, p, seed: (present[:, :count].reshape(2, count, 2, 3), left[:, :count]),
        text_coalitions=lambda count, p, seed: (present[:, :count], left[:, :count]),
    )


def test_it_is_captums_on_vectors_of_present_parts(targets: CaptionTargets) -> None:
    found = infidelity(targets, image_coalitions=40, text_coalitions=30)
    for name, maps, count in (("image", targets.image_maps.flatten(1), 40), ("text", targets.text_maps, 30)):
        shown, _ = targets.text_coalitions(count, 0.5, 0)
        for row in range(2):
            absent = iter((~shown[row]).double())

            def taken_away(inputs: Tensor, absent: object = absent) -> tuple[Tensor, Tensor]:
                gone = torch.stack([next(absent) for _ in inputs])  # type: ignore[call-overload]
                return gone, inputs - gone

            expected = captum.metrics.infidelity(
                similarity_of,
                taken_away,
                torch.ones(1, 6, dtype=torch.float64),
                maps[row, None],
                n_perturb_samples=count,
                max_examples_per_batch=count,
            )
            assert float(found[f"{name}_infidelity"][row]) == pytest.approx(
                float(expected), rel=1e-6
            )  # it averages in float32


def test_the_scaled_one_takes_the_best_scale_that_is_not_negative() -> None:
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    explained = change * torch.tensor([[5.0], [-5.0], [0.0], [1.0]])
    explained[3] += torch.randn(50, generator=generator, dtype=torch.float64)
    plain, scaled = squared_error(change, explained)
    torch.testing.assert_close(plain, (explained - change).square().mean(dim=1))
    assert scaled[:3].tolist() == pytest.approx([0, 1, 1], abs=1e-12)
    one, other = explained[3].numpy(), change[3].numpy()
    tried = [np.sum((scale * one - other) ** 2) / np.sum(other**2) for scale in np.linspace(0, 3, 30_001)]
    assert float(scaled[3]) == pytest.approx(min(tried), rel=1e-6)


def test_a_similarity_that_never_changes_has_none() -> None:
    assert all(each.isnan().all() for each in squared_error(torch.zeros(2, 3), torch.ones(2, 3)))


def test_a_caption_without_words_has_none(targets: CaptionTargets) -> None:
    content = torch.tensor([[True] * 6, [False] * 6])
    found = infidelity(replace(targets, content=content), image_coalitions=40, text_coalitions=30)
    missing = {name: each.isnan().tolist() for name, each in found.items()}
    assert missing["text_infidelity"] == missing["text_infidelity_scaled"] == [False, True]
    assert missing["image_infidelity"] == missing["image_infidelity_scaled"] == [False, False]


@pytest.mark.parametrize(
    ("options", "message"), [({"p": 1.0}, "between 0 and 1; got 1.0"), ({"image_coalitions": 0}, "got 0 and 64")]
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infidelity(no_targets("caption"), **options)  # type: ignore[arg-type]
