"""Removal of pixels and tokens, to see whether a heat map found what matters.

The M2IB paper replaces the most important pixels by the channel mean and the most important tokens by padding
(sections 4.3 and 4.4). How many are taken is exact whatever the values: a map with equal values around the cut loses as
many pixels as any other, so that methods stay comparable.

Shape suffixes: L caption tokens, h x w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.heat_maps import important_pixels, important_tokens

__all__ = ["cut_through_ties", "degrade_image", "important_pixels", "important_tokens"]


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
