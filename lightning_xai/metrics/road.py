"""Similarity after pixels were removed and filled in from their neighbours: ROAD, without retraining.

Rong et al., "A consistent and efficient evaluation strategy for attribution methods", ICML 2022.

Shape suffixes: N images, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_xai.heat_maps import important_pixels, in_steps, upsample
from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.metrics.insertion_deletion import constant
from lightning_xai.results.record import Score

__all__ = ["SPEC", "impute", "road"]

_CHECKED_EVERY = 8  # steps, since a device would be waited for each time


def road(
    targets: CaptionTargets,
    *,
    fractions: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    noise: float = 0.01,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Remove the most important pixels, and the least important ones, and see what is left of the similarity.

    Removed pixels are filled in by `impute`, so that neither their place nor their edges tell what was there, as those
    of pixels in one color do. Maps are interpolated to pixels, as for ROAR+.

    Args:
        targets: whole captions with their images.
        fractions: shares of the pixels that are removed, between 0 and 1; two forward passes each.
        noise: standard deviation of the noise on pixels that are filled in, in units of normalised pixels.
        seed: of the noise, together with the item; the same for all methods and fractions.

    Returns:
        Means of the similarity over the fractions, [M] in [-1, 1]: `road_most` without the most important pixels (lower
        is better), `road_least` without the least important ones (higher is better), and `road`, the latter less the
        former, in [-2, 2] (higher is better; 0 by chance). NaN for a constant map, which has no order.

    Raises:
        ValueError: no fractions, one that is not between 0 and 1, or negative noise.
    """
    if not fractions or not all(0 < fraction < 1 for fraction in fractions) or not noise >= 0:
        raise ValueError(f"road needs fractions between 0 and 1, and noise >= 0; got {list(fractions)} and {noise}")
    columns: dict[str, list[Tensor]] = {name: [targets.similarity.double()[:0]] for name in ("most", "least")}
    for rows in targets.slices():
        images = targets.pixels(rows)
        drawn = noise * targets.noise(rows, images.shape[1:], seed).to(images)
        heat = in_steps(upsample(targets.image_maps[rows], (images.shape[2], images.shape[3])))
        for name, order in (("most", heat), ("least", -heat)):
            total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
            for fraction in fractions:
                removed = important_pixels(order, fraction)
                filled = impute(images, removed) + drawn * removed.unsqueeze(1)
                total += targets.similarity_of(rows, filled).double()
            columns[name].append(total / len(fractions))
    maps = targets.image_maps.flatten(1)
    missing = constant(maps, torch.ones_like(maps, dtype=torch.bool))
    most, least = (torch.cat(columns[name]).masked_fill(missing, torch.nan) for name in ("most", "least"))
    return {"road": least - most, "road_most": most, "road_least": least}


def impute(images: Tensor, removed: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Fill in pixels so that each is the weighted mean of its eight neighbours, without the noise of ROAD.

    Neighbours above, below, left and right weigh 1/6, the others 1/12; at the image's border, those that are there
    share the weight. This is a sparse, symmetric, positive definite linear system for all removed pixels at once,
    which conjugate gradients solve; each channel of each image stops by itself.

    Args:
        images: [N, C, h, w].
        removed: [N, h, w] bool; at least one pixel of each image stays.
        tolerance: of the residual, relative to that of a fill with the mean of what stays; the default is well below
            the noise.

    Returns:
        [N, C, h, w], pixels that stay as they were.

    Raises:
        ValueError: an image of which nothing stays.

    Example:
        >>> image = torch.tensor([[[[0.0, 6.0, 0.0], [6.0, -9.0, 12.0], [0.0, 12.0, 12.0]]]])
        >>> removed = torch.zeros(1, 3, 3, dtype=torch.bool)
        >>> removed[0, 1, 1] = True
        >>> round(impute(image, removed)[0, 0, 1, 1].item(), 4)
        7.0
    """
    if bool(removed.flatten(1).all(dim=1).any()):
        raise ValueError("an image whose pixels are all removed cannot be filled in; leave some")
    wide = torch.promote_types(images.dtype, torch.float32)
    open_N1hw, kept = removed.unsqueeze(1).to(wide), (~removed).unsqueeze(1).to(wide)
    known = images.to(wide) * kept
    mean = known.sum(dim=(2, 3), keepdim=True) / kept.sum(dim=(2, 3), keepdim=True)
    weight = _neighbours(torch.ones_like(kept))
    right = open_N1hw * _neighbours((images.to(wide) - mean) * kept)
    solution = _conjugate_gradients(lambda x: open_N1hw * (weight * x - _neighbours(x)), right, tolerance)
    return torch.where(removed.unsqueeze(1), (solution + mean).to(images), images)


def _neighbours(pixels: Tensor) -> Tensor:
    """The weighted sum over the neighbours of each pixel: [..., h, w], nothing beyond the border."""
    padded = pad(pixels, (1, 1, 1, 1))
    # The weights are those of [1, 2, 1] down times [1, 2, 1] across, but for the pixel itself.
    down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:] - 4 * pixels) / 12


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, tolerance: float) -> Tensor:
    """Solve apply(x) = right for each [h, w] of [N, C, h, w], from 0 on, up to the relative residual."""

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(dim=(2, 3), keepdim=True)

    solution, residual, direction = torch.zeros_like(right), right, right
    size = dot(right, right)
    least = tolerance**2 * size
    for step in range(right.shape[2] * right.shape[3]):  # exact by then, but for rounding
        active = size > least
        if step % _CHECKED_EVERY == 0 and not bool(active.any()):
            break
        image = apply(direction)
        length = torch.where(active, size / dot(direction, image).where(active, 1), 0)
        solution, residual = solution + length * direction, residual - length * image
        after = torch.where(active, dot(residual, residual), size)
        direction = torch.where(active, residual + after / size.where(active, 1) * direction, direction)
        size = after
    return solution


SPEC = MetricSpec(
    name="road",
    kind="caption",
    compute=road,
    values=("road", "road_most", "road_least"),
    scores=(
        Score(name="road", value="road", heading="ROAD", better="up"),
        Score(name="road_most", value="road_most", heading="without the most important", better="down"),
        Score(name="road_least", value="road_least", heading="without the least important", better="up"),
    ),
    title="ROAD",
    note=(
        "Mean similarity after the most, or the least, important pixels were removed and filled in from their "
        "neighbours; ROAD is the difference."
    ),
    by_default=False,
    chart="bars",
)
