"""Similarity of two heat maps, map by map: by rank (Spearman) and by structure (SSIM).

As the sanity check of saliency maps uses them (Adebayo et al., "Sanity Checks for Saliency Maps", 2018). Maps without a
pattern to compare have no similarity: the result is NaN, which callers count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_xai.heat_maps import min_max

__all__ = ["SSIM_WINDOW", "spearman", "ssim"]

SSIM_WINDOW = 3
"""Rows and columns of the uniform window of `ssim`: on grids of 7 x 7 patches the usual 11 would see no structure."""


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation of each map with its counterpart, over all entries; ties share their average rank.

    Args:
        maps: [B, ...], two or more entries each.
        others: of the same shape.

    Returns:
        [B] float64 in [-1, 1]; 1 for maps of the same order, NaN where a map is constant or not finite.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 90.0, 20.0]])).tolist()
        [0.5]
    """
    _check_same_shape(maps, others)
    ranks, other_ranks = _centred_ranks(maps), _centred_ranks(others)
    # A product of norms is zero for constant maps, whose correlation 0 / 0 is NaN, as it should be.
    correlation = (ranks * other_ranks).sum(dim=1) / (
        ranks.square().sum(dim=1) * other_ranks.square().sum(dim=1)
    ).sqrt()
    # Rounding may go past the ends.
    return correlation.clamp(-1, 1).where(_finite(maps) & _finite(others), torch.nan)


def ssim(maps: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each picture with its counterpart, both scaled to [0, 1] by their own extremes.

    The window is uniform, `SSIM_WINDOW` patches wide and moved over every patch, with the border mirrored.

    Args:
        maps: [B, H, W].
        others: of the same shape.

    Returns:
        [B] float64, at most 1, which equal pictures have; NaN where a map is constant or not finite, and for grids of
        a single row or column, on which the window does not fit.

    Raises:
        ValueError: the shapes differ, or are not [B, H, W].

    Example:
        >>> ramp = torch.arange(49.0).reshape(1, 7, 7)
        >>> ssim(ramp, 3 * ramp + 1).tolist()
        [1.0]
    """
    _check_same_shape(maps, others)
    if maps.ndim != 3:
        raise ValueError(f"expected pictures [B, H, W]; got {[*maps.shape]}")
    nothing = torch.full(maps.shape[:1], torch.nan, dtype=torch.float64, device=maps.device)
    comparable = _finite(maps) & _finite(others) & _varies(maps) & _varies(others)
    if min(maps.shape[1:]) < SSIM_WINDOW - 1 or not comparable.any():
        return nothing
    pictures, other_pictures = (min_max(x[comparable].double()).unsqueeze(1) for x in (maps, others))
    similarity = structural_similarity_index_measure(
        pictures, other_pictures, gaussian_kernel=False, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return nothing.masked_scatter(comparable, similarity.to(nothing))


def _centred_ranks(maps: Tensor) -> Tensor:
    """Average ranks of a map's entries, minus their mean: [B, entries] float64."""
    values = maps.flatten(1).double()
    ordered = values.sort(dim=1).values
    # Entries that are tied with one occupy the places from the first not smaller to the last not larger.
    places = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    ranks = sum(places, torch.zeros_like(values)) / 2
    return ranks - ranks.mean(dim=1, keepdim=True)


def _finite(maps: Tensor) -> Tensor:
    return maps.flatten(1).isfinite().all(dim=1)


def _varies(maps: Tensor) -> Tensor:
    flat = maps.flatten(1)
    return flat.amax(dim=1) > flat.amin(dim=1)


def _check_same_shape(maps: Tensor, others: Tensor) -> None:
    if maps.shape != others.shape or maps.ndim < 2:
        raise ValueError(f"expected two batches of maps of one shape [B, ...]; got {[*maps.shape]}, {[*others.shape]}")
