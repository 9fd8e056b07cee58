"""Heat maps: from patches to pixels, to a common scale, and to the parts that matter most.

Shape suffixes: L caption tokens, H x W patches, h x w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["important_pixels", "important_tokens", "in_steps", "min_max", "upsample"]

_STEPS = 1e5  # of a map's largest value
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps at patch resolution, interpolated to pixels (bilinear between patch centres; adds no extremum, no sign).

    Args:
        maps: [..., H, W].
        size: (height, width) in pixels.

    Returns:
        [..., height, width]

    Example:
        >>> upsample(torch.tensor([[0.0, 1.0]]), (1, 4)).tolist()
        [[0.0, 0.25, 0.75, 1.0]]
    """
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def in_steps(heat: Tensor) -> Tensor:
    """Maps in whole steps of their largest magnitude / 100,000, to rank pixels by.

    Interpolation gives many pixels one value but for rounding, which would put them into some order: another one in
    another batch.

    Args:
        heat: [..., height, width].

    Example:
        >>> in_steps(torch.tensor([[0.5, 0.5 + 1e-7, -1.0]])).tolist()
        [[50000.0, 50000.0, -100000.0]]
    """
    largest = heat.abs().amax(dim=(-2, -1), keepdim=True)
    return (heat / largest.where(largest > 0, 1) * _STEPS).round()


def min_max(maps: Tensor, dims: int = 2) -> Tensor:
    """Each map scaled to [0, 1]: its smallest entry is 0, its largest 1; a constant map is 0 everywhere.

    Args:
        maps: [..., H, W], or [..., L] with `dims=1`.
        dims: how many of the last axes make one map.

    Example:
        >>> min_max(torch.tensor([[-1.0, 0.0, 3.0]]), dims=1).tolist()
        [[0.0, 0.25, 1.0]]
    """
    axes = tuple(range(-dims, 0))
    low, high = maps.amin(dim=axes, keepdim=True), maps.amax(dim=axes, keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1.0)


def important_tokens(scores: Tensor, content_mask: Tensor, fraction: float, *, round_up: bool = False) -> Tensor:
    """The share of a caption's own tokens with the largest scores.

    Of n own tokens floor(fraction * n) are chosen. Of equal scores the earlier token is chosen.

    Args:
        scores: [..., L] float; only those of own tokens count, and only they have to be finite.
        content_mask: [..., L] bool, the caption's own tokens (`CaptionTokenizer.content_mask`).
        fraction: in [0, 1].
        round_up: choose ceil(fraction * n), so that a caption never loses all its tokens where the rest is dropped.

    Returns:
        [..., L] bool, true only where `content_mask` is.

    Raises:
        ValueError: shapes that differ, a fraction outside [0, 1], or a score that is not finite.

    Example:
        >>> scores, own = torch.tensor([9.0, 0.2, 0.7, 0.5, 0.0]), torch.tensor([False, True, True, True, False])
        >>> important_tokens(scores, own, 0.5).tolist()
        [False, False, True, False, False]
        >>> important_tokens(scores, own, 0.5, round_up=True).tolist()
        [False, False, True, True, False]
    """
    if scores.shape != content_mask.shape or content_mask.dtype != torch.bool:
        raise ValueError(
            f"expected scores and a bool mask of one shape; got {list(scores.shape)} and {list(content_mask.shape)} "
            f"of {content_mask.dtype}"
        )
    _check(scores[content_mask], fraction)
    counts = content_mask.sum(dim=-1, keepdim=True).double() * fraction
    counts = (counts - _ROUNDING).ceil() if round_up else (counts + _ROUNDING).floor()
    order = scores.masked_fill(~content_mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < counts


def important_pixels(heat: Tensor, fraction: float) -> Tensor:
    """The share of an image's pixels with the largest values.

    Of h * w pixels floor(fraction * h * w) are chosen; of equal values those further up, then those further left.

    Args:
        heat: [..., h, w] float, a map at pixel resolution.
        fraction: in [0, 1].

    Returns:
        [..., h, w] bool.

    Raises:
        ValueError: a fraction outside [0, 1], or a value that is not finite.

    Example:
        >>> important_pixels(torch.tensor([[0.0, 3.0], [1.0, 1.0]]), 0.5).tolist()
        [[False, True], [True, False]]
    """
    flat = heat.flatten(-2)
    return important_tokens(flat, torch.ones_like(flat, dtype=torch.bool), fraction).reshape(heat.shape)


def _check(values: Tensor, fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction has to be in [0, 1]; got {fraction}")
    if not values.isfinite().all():
        raise ValueError("scores have to be finite; look for NaN or infinity in the map")
