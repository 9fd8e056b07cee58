"""Faithfulness against scipy, and where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, CoalitionValues, no_targets
from lightning_xai.metrics.faithfulness import determination, faithfulness, kendall
from lightning_xai.metrics.map_similarity import spearman


def drawn(levels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values and what is said of them [5, 40]; with few levels there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return tuple(torch.randint(levels, (5, 40), generator=generator).double() for _ in range(2))  # type: ignore[return-value]
    value = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    return value, value + torch.randn(5, 40, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("levels", [0, 2, 5])
def test_rank_correlations_are_scipys_with_and_without_ties(levels: int) -> None:
    value, explained = drawn(levels, seed=levels)
    for row in range(len(value)):
        one, other = value[row].numpy(), explained[row].numpy()
        expected = scipy.stats.spearmanr(one, other).statistic
        assert float(spearman(value, explained)[row]) == pytest.approx(expected, abs=1e-12)
        expected = scipy.stats.kendalltau(one, other).statistic
        assert float(kendall(value, explained)[row]) == pytest.approx(expected, abs=1e-12)
        residual, spread = ((one - other) ** 2).sum(), ((one - np.mean(one)) ** 2).sum()
        assert float(determination(value, explained)[row]) == pytest.approx(1 - residual / spread, abs=1e-12)


def test_what_is_constant_has_no_correlation() -> None:
    value, explained = drawn(0, seed=1)
    flat = torch.ones_like(value)
    assert spearman(value, flat).isnan().all()
    assert kendall(flat, explained).isnan().all()
    assert determination(flat, explained).isnan().all()
    assert determination(value, flat).isfinite().all()


def targets_of(found: CoalitionValues, asked: list[tuple[Any, ...]]) -> CaptionTargets:
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)

    def coalitions(*arguments: Any) -> CoalitionValues:
        asked.append(arguments)
        return found

    return replace(empty, coalitions=coalitions)


def test_values_are_compared_less_those_of_the_empty_coalition() -> None:
    value, explained = drawn(0, seed=2)
    shift, other = torch.arange(5).double(), 10 * torch.arange(5).double()
    asked: list[tuple[Any, ...]] = []
    moved = CoalitionValues(value + shift[:, None], explained + other[:, None], shift, other)
    result = faithfulness(targets_of(moved, asked), image_coalitions=10, text_coalitions=4, p=0.3, seed=7)
    torch.testing.assert_close(result["r2"], determination(value, explained))
    torch.testing.assert_close(result["spearman"], spearman(value, explained))
    torch.testing.assert_close(result["kendall"], kendall(value, explained))
    assert asked == [(10, 4, 0.3, 7)]


@pytest.mark.parametrize(
    ("options", "message"), [({"p": 1.0}, "between 0 and 1; got 1.0"), ({"text_coalitions": 1}, "got 128 and 1")]
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faithfulness(targets_of(CoalitionValues(*[torch.zeros(0)] * 4), []), **options)
