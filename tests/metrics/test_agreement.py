"""Agreement with a referee, against scipy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from lightning_xai.metrics import CaptionTargets, PhraseTargets
from lightning_xai.metrics.agreement import agreement
from lightning_xai.metrics.base import no_targets
from lightning_xai.metrics.completeness import completeness


def targets(maps: torch.Tensor, referee: torch.Tensor | None) -> PhraseTargets:
    return PhraseTargets(maps, torch.ones_like(maps, dtype=torch.bool), signed=True, referee=referee)


def test_agreement_is_scipys_spearman_of_each_phrase_with_ties() -> None:
    draw = torch.Generator().manual_seed(0)
    maps, referee = (torch.randint(-3, 4, (20, 4, 5), generator=draw).float() for _ in range(2))
    expected = [spearmanr(one.flatten(), other.flatten()).statistic for one, other in zip(maps, referee, strict=True)]
    assert agreement(targets(maps, referee))["agreement"].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_referee_agrees_with_itself_and_with_the_same_order_and_not_with_the_opposite() -> None:
    maps = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert agreement(targets(maps, maps))["agreement"].tolist() == [1, 1, 1]
    assert agreement(targets(maps, maps.exp()))["agreement"].tolist() == [1, 1, 1]
    assert agreement(targets(maps, -maps))["agreement"].tolist() == [-1, -1, -1]


def test_constant_and_missing_maps_have_no_agreement() -> None:
    maps, referee = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    maps[0], referee[1] = 0.25, torch.nan
    assert agreement(targets(maps, referee))["agreement"].isnan().tolist() == [True, True, False]
    assert agreement(targets(maps, None))["agreement"].isnan().all()


def test_maps_on_different_grids_are_averaged_to_the_coarser_one() -> None:
    coarse = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    fine = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    fine = fine + torch.tensor([0.1, -0.1]).repeat(3)  # nothing on average
    assert agreement(targets(fine, coarse))["agreement"].tolist() == [1, 1]
    assert agreement(targets(coarse, fine))["agreement"].tolist() == [1, 1]


def test_completeness_is_the_size_of_the_error_and_nothing_for_methods_without() -> None:
    nothing = no_targets("caption")
    assert isinstance(nothing, CaptionTargets)
    two = replace(nothing, image_maps=torch.zeros(2, 1, 1), similarity=torch.zeros(2))
    assert completeness(two)["completeness_error"].isnan().all()
    found = completeness(replace(two, completeness_error=torch.tensor([-0.5, 0.25])))
    assert found["completeness_error"].tolist() == [0.5, 0.25]
