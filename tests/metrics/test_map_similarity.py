from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from lightning_xai.metrics.map_similarity import SSIM_WINDOW, spearman, ssim


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distinct", [6, 20, 10_000])
def test_rank_correlation_is_scipys_also_with_ties(distinct: int) -> None:
    one = (maps(6, 7, 7) * distinct / 8).round()
    other = ((maps(6, 7, 7, seed=1) + 0.5 * maps(6, 7, 7)) * distinct / 8).round()
    expected = [spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(spearman(one, other).numpy(), expected, rtol=1e-12)
    assert len({round(value, 6) for value in expected}) == 6


def test_rank_correlation_sees_order_alone() -> None:
    one = maps(4, 5, 3)
    assert spearman(one, one).tolist() == [1.0] * 4
    assert spearman(one, one.exp() * 1e-6).tolist() == [1.0] * 4
    assert spearman(one, -one).tolist() == [-1.0] * 4
    assert spearman(maps(3, 2), maps(3, 2, seed=1)).abs().tolist() == [1.0] * 3


def literal_ssim(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Wang et al. 2004, Eq. 13, with a uniform window, window by window."""
    one, other = ((x - x.min()) / (x.max() - x.min()) for x in (one, other))
    reach = SSIM_WINDOW // 2
    a, b = (np.pad(x, reach, mode="reflect") for x in (one, other))
    values = []
    for row in range(one.shape[0]):
        for column in range(one.shape[1]):
            u, v = (x[row : row + SSIM_WINDOW, column : column + SSIM_WINDOW] for x in (a, b))
            covariance = ((u - u.mean()) * (v - v.mean())).mean()
            numerator = (2 * u.mean() * v.mean() + 0.01**2) * (2 * covariance + 0.03**2)
            values.append(numerator / ((u.mean() ** 2 + v.mean() ** 2 + 0.01**2) * (u.var() + v.var() + 0.03**2)))
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(7, 7), (2, 2), (4, 14)])
def test_structural_similarity_is_that_of_every_window(size: tuple[int, int]) -> None:
    one = maps(4, *size).double()
    other = one + 0.7 * maps(4, *size, seed=1)
    expected = [literal_ssim(a.numpy(), b.numpy()) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(ssim(one, other).numpy(), expected, rtol=1e-9)
    assert max(expected) < 0.999


def test_structural_similarity_does_not_see_scale_and_offset() -> None:
    one = maps(3, 7, 7)
    torch.testing.assert_close(ssim(one, 5 * one - 2), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (ssim(one, -one) < 0.5).all()


@pytest.mark.parametrize("similarity", [spearman, ssim])
@pytest.mark.parametrize("value", [0.0, 0.1, math.nan, math.inf])
def test_a_map_without_a_pattern_is_nan_and_its_neighbours_are_as_alone(
    similarity: Callable[[Tensor, Tensor], Tensor], value: float
) -> None:
    one, other = maps(3, 7, 7), maps(3, 7, 7, seed=1)
    alone = similarity(one[1:], other[1:])
    one[0] = 0.1
    one[0, 0, 0] = value if not math.isfinite(value) else 0.1
    for result in (similarity(one, other), similarity(other, one)):
        assert result.isnan().tolist() == [True, False, False]
        torch.testing.assert_close(result[1:], alone)
    assert similarity(one[:1], other[:1]).isnan().all()


def test_a_grid_that_is_narrower_than_the_window_has_no_structure() -> None:
    assert ssim(maps(2, 1, 7), maps(2, 1, 7, seed=1)).isnan().all()
    assert spearman(maps(2, 1, 7), maps(2, 1, 7, seed=1)).isfinite().all()


def test_shapes_that_do_not_fit_are_errors_in_words() -> None:
    for similarity in (spearman, ssim):
        with pytest.raises(ValueError, match=r"one shape .*got \[2, 7, 7\], \[2, 7, 6\]"):
            similarity(maps(2, 7, 7), maps(2, 7, 6))
    with pytest.raises(ValueError, match=r"pictures \[B, H, W\]; got \[2, 7\]"):
        ssim(maps(2, 7), maps(2, 7))
