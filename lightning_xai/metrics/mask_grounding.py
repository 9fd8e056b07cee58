"""Share of a phrase's attribution in the mask of the object it names: gamma and rho by mask instead of by box.

A box holds background, often half of it, and gamma counts what falls there as right. Section 4.2 of the feature-pair
paper measures by box; by mask, the same formulas are applied to the patches of the object itself.

Shapes: M objects, H x W the patch grid of the map, h x w the image in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import MetricSpec, PhraseTargets
from lightning_xai.metrics.grounding import gamma, grounding_scores, rho
from lightning_xai.results.record import Score

__all__ = ["SPEC", "mask_grounding", "mask_patches", "patch_shares"]


def patch_shares(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that some pixels cover.

    Args:
        pixels: [M, h, w] bool.
        grid: (H, W).

    Returns:
        [M, H, W] float64 in [0, 1].

    Example:
        >>> patch_shares(torch.tensor([[[True, True, True, False], [True, True, False, False]]]), (1, 2))
        tensor([[[1.0000, 0.2500]]], dtype=torch.float64)
    """
    return adaptive_avg_pool2d(pixels.double(), grid)


def mask_patches(masks: Tensor, box_shares: Tensor, mask_shares: Tensor) -> Tensor:
    """The patches of a box that belong to the mask in it, but never less than one.

    A patch belongs to it where the mask fills at least half of what the box covers of the patch. So the edges are
    rounded as those of the box are: a mask that fills its box has the box's patches, any other has some of them, and
    what gamma by box has more than gamma by mask is due to the object's shape, not to the grid. Where the mask fills
    half of nothing, as thin or small objects do, the patches that hold most of it are taken.

    Args:
        masks: [M, H, W] bool, the patches of the box, from `patch_mask`.
        box_shares: [M, H, W], from `patch_shares` of the box's pixels.
        mask_shares: [M, H, W], from `patch_shares` of the mask's pixels in the box.

    Returns:
        [M, H, W] bool.

    Example:
        >>> masks = torch.tensor([[[True, True, False]]]).expand(2, 1, 3)
        >>> box_shares = torch.tensor([[[1.0, 0.6, 0.2]]]).expand(2, 1, 3)
        >>> mask_patches(masks, box_shares, torch.tensor([[[0.4, 0.4, 0.1]], [[0.3, 0.2, 0.1]]])).int()
        tensor([[[0, 1, 0]],
        <BLANKLINE>
                [[1, 0, 0]]], dtype=torch.int32)
    """
    inside = masks & (mask_shares > 0)
    patches = inside & (2 * mask_shares >= box_shares)
    # Of a mask that lies where the box has no patch, the patches that hold most of it are all there is.
    held = torch.where(inside.flatten(1).any(dim=1)[:, None, None], mask_shares.where(inside, 0), mask_shares)
    most = (held > 0) & (held == held.flatten(1).amax(dim=1)[:, None, None])
    return torch.where(patches.flatten(1).any(dim=1)[:, None, None], patches, most)


def mask_grounding(targets: PhraseTargets) -> dict[str, Tensor]:
    """Compute gamma and rho by mask, both NaN where a map has no positive entry, and how much of the box is mask."""
    assert targets.box_shares is not None, "masks were asked for"
    assert targets.mask_shares is not None, "masks were asked for"
    patches = mask_patches(targets.masks, targets.box_shares, targets.mask_shares)
    shares = gamma(targets.maps, patches)
    hits = rho(targets.maps, patches).to(shares)
    filled = targets.mask_shares.sum(dim=(1, 2)) / targets.box_shares.sum(dim=(1, 2))
    return {"gamma_mask": shares, "rho_mask": hits.masked_fill(shares.isnan(), torch.nan), "mask_fill": filled}


SPEC = MetricSpec(
    name="mask_grounding",
    kind="phrase",
    compute=mask_grounding,
    values=("gamma_mask", "rho_mask", "mask_fill"),
    scores=(
        *grounding_scores("_mask"),
        Score(name="mask_fill", value="mask_fill", heading="box filled", percent=True, bounds=(0, 1)),
    ),
    title="Visual-linguistic grounding, by mask",
    note="γ and ρ as by box, of the patches that the object's segmentation mask covers; box filled: the mask's share "
    "of its box.",
    needs_boxes=True,
    needs_masks=True,
    empty={"gamma_mask": Exclusion.NO_POSITIVE, "rho_mask": Exclusion.NO_POSITIVE},
)
