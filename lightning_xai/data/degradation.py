"""Removal of pixels and tokens, to see whether a heat map found what matters.

The M2IB paper replaces the most important pixels by the channel mean and the most important tokens by padding
(sections 4.3 and 4.4). How many are taken is exact whatever the values: a map with equal values around the cut loses as
many pixels as any other, so that methods stay comparable.

Shape suffixes: L caption tokens, h x w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cut_through_ties", "degrade_image", "important_pixels", "important_tokens"]

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


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


def cut_through_ties(scores: Tensor, content_mask: Tensor, fraction: float) -> Tensor:
    """True where `important_tokens` leaves a token with the score of one that it takes, so that place decides.

    Args:
        scores: [..., L] float.
        content_mask: [..., L] bool, the caption's own tokens (or, of a flattened map, every pixel).
        fraction: in [0, 1].

    Returns:
        [...] bool.

    Raises:
        ValueError: see `important_tokens`.

    Example:
        >>> own = torch.ones(2, 4, dtype=torch.bool)
        >>> cut_through_ties(torch.tensor([[3.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]), own, 0.5).tolist()
        [True, False]
    """
    chosen = important_tokens(scores, content_mask, fraction)
    lowest_taken = scores.masked_fill(~chosen, torch.inf).amin(dim=-1)
    highest_left = scores.masked_fill(chosen | ~content_mask, -torch.inf).amax(dim=-1)
    return lowest_taken == highest_left


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


def degrade_image(pixels: Tensor, heat: Tensor, fraction: float, fill: Tensor | None = None) -> Tensor:
    """An image whose most important pixels (`important_pixels`) show one color.

    Args:
        pixels: [3, h, w], of any type.
        heat: [h, w] float, a map at pixel resolution.
        fraction: of the pixels that are replaced, in [0, 1].
        fill: [3], the color in the units of `pixels`, rounded where those are integers; None for the mean of each
            channel over the whole image, before anything is replaced.

    Returns:
        [3, h, w], of the type of `pixels`, which stays as it was.

    Raises:
        ValueError: shapes that do not match, a fraction outside [0, 1], or a value of the map that is not finite.

    Example:
        >>> pixels = torch.tensor([[[0, 200]], [[10, 10]], [[1, 4]]], dtype=torch.uint8)
        >>> degrade_image(pixels, torch.tensor([[0.0, 1.0]]), 0.5).tolist()
        [[[0, 100]], [[10, 10]], [[1, 2]]]
    """
    if pixels.ndim != 3 or pixels.shape[1:] != heat.shape or (fill is not None and fill.shape != pixels.shape[:1]):
        raise ValueError(
            "expected pixels [channels, h, w], a map [h, w] and a color [channels]; got "
            f"{list(pixels.shape)}, {list(heat.shape)} and {'none' if fill is None else list(fill.shape)}"
        )
    color = pixels.double().mean(dim=(1, 2)) if fill is None else fill.double()
    if not pixels.is_floating_point():
        color = color.round()
    return torch.where(important_pixels(heat, fraction), color.to(pixels)[:, None, None], pixels)


def _check(values: Tensor, fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction has to be in [0, 1]; got {fraction}")
    if not values.isfinite().all():
        raise ValueError("scores have to be finite; look for NaN or infinity in the map")
