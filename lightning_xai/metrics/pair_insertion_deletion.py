"""Insertion and deletion in the order of interactions: which patch or token matters next depends on what is there.

After FIxLIP (Baniecki et al., NeurIPS 2025).

Shape suffixes: M targets, N points of a curve, P patches, L tokens, F = P + L parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.metrics.insertion_deletion import area
from lightning_xai.results.record import Score

__all__ = ["SPEC", "greedy_order", "pair_insertion_deletion"]


def pair_insertion_deletion(targets: CaptionTargets, *, steps: int = 10) -> dict[str, Tensor]:
    """Measure the areas under the similarity while patches and tokens come or go in the order of `greedy_order`.

    Hidden patches are zero after normalisation, hidden tokens padding; the marks of a caption's start and end stay.

    Args:
        targets: whole captions with their images, and interactions.
        steps: equal steps from no part to all parts; image and caption are embedded 4 steps - 2 times.

    Returns:
        The areas [M] of the curves, means of the cosine similarity over the share of the parts that is there, in
        [-1, 1]: `pair_insertion` and `pair_deletion` where the part that matters most comes (higher is better), or goes
        (lower is better), first; `pair_insertion_least` (lower is better) and `pair_deletion_least` (higher is better)
        where the one that matters least does. NaN without interactions, where all are
        zero, and for a caption without words.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps has to be at least 1; got {steps}")
    interactions, content = targets.interactions.flatten(2).double(), targets.content
    patches = interactions.shape[2]
    own_MF = torch.cat([torch.ones_like(interactions[:, 0], dtype=torch.bool), content], dim=1)
    counts = (own_MF.sum(dim=1, keepdim=True) * torch.arange(1, steps).to(content.device) / steps).round()
    points = [torch.zeros_like(own_MF).unsqueeze(1), own_MF.unsqueeze(1)]
    for insertion in (True, False):
        for most in (True, False):
            place_MF = greedy_order(interactions, targets.prefix.double(), content, insertion=insertion, most=most)
            first_MNF = (place_MF.unsqueeze(1) < counts.unsqueeze(2)) & own_MF.unsqueeze(1)
            points.append(first_MNF if insertion else own_MF.unsqueeze(1) & ~first_MNF)
    there_MNF = torch.cat(points, dim=1)
    shown = there_MNF[..., :patches].reshape(*there_MNF.shape[:2], *targets.image_maps.shape[1:])
    said = there_MNF[..., patches:]
    similarity_MN = (targets.embed_images(shown).double() * targets.embed_texts(said).double()).sum(dim=2)
    nothing, everything, *curves = torch.split(similarity_MN, [1, 1, *[steps - 1] * 4], dim=1)
    # Where all are zero (NaN without interactions), there is no order.
    missing = ~content.any(dim=1) | ~(interactions.flatten(1).abs().amax(dim=1) > 0)
    found = {}
    for name, curve in zip(SPEC.values, curves, strict=True):
        ends = (nothing, everything) if "insertion" in name else (everything, nothing)
        found[name] = area(torch.cat([ends[0], curve, ends[1]], dim=1)).masked_fill(missing, torch.nan)
    return found


def greedy_order(interactions: Tensor, prefix: Tensor, own: Tensor, *, insertion: bool, most: bool) -> Tensor:
    """The place of each patch and token in the order in which they come, or go.

    In each step that part comes (goes) which raises (lowers) the sum of the interactions between present tokens and
    present patches, and prefix tokens, most: or least, which may be a negative change. Tokens that mark start and end,
    and the image's prefix tokens, are always present. Of equal parts that one goes first whose interactions with all
    others have the larger (where the least goes first, smaller) sum, then the one with the lower number.

    Args:
        interactions: [M, L, P].
        prefix: [M, L].
        own: [M, L] bool, the tokens that come and go; others are present, and padding has no interactions.
        insertion: whether parts come, starting from nothing; else they go, starting from everything.
        most: whether the largest change is first.

    Returns:
        [M, P + L] int64, patches and then tokens, from 0 on; of tokens that are not `own`, P + L.

    >>> interactions = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    >>> own = torch.ones(1, 2, dtype=torch.bool)
    >>> greedy_order(interactions, torch.zeros(1, 2), own, insertion=True, most=True)
    tensor([[2, 0, 1, 3]])
    """
    sign = 1 if most else -1
    rows, (patches, length) = torch.arange(len(own), device=own.device), (interactions.shape[2], own.shape[1])
    free = torch.cat([own.new_ones(len(own), patches), own], dim=1)
    there = torch.cat([torch.zeros_like(free[:, :patches]), ~own], dim=1) if insertion else torch.ones_like(free)
    total = sign * torch.cat([interactions.sum(dim=1), interactions.sum(dim=2) + prefix], dim=1)
    gain = sign * torch.cat(
        [
            (there[:, patches:, None] * interactions).sum(dim=1),
            (there[:, None, :patches] * interactions).sum(dim=2) + prefix,
        ],
        dim=1,
    )
    place = torch.full_like(free, patches + length, dtype=torch.int64)
    for step in range(patches + length):
        left = free.any(dim=1)
        chosen = _first_of_largest(gain, total, free)
        place[rows, chosen] = torch.where(left, step, place[rows, chosen])
        change = sign * left * (1 if insertion else -1)
        is_patch, at = chosen < patches, chosen.clamp(max=patches - 1)
        of_tokens = interactions[rows, :, at] * (change * is_patch).unsqueeze(1)
        of_patches = interactions[rows, (chosen - patches).clamp(min=0)] * (change * ~is_patch).unsqueeze(1)
        gain = gain + torch.cat([of_patches, of_tokens], dim=1)
        free[rows, chosen] = False
    return place


def _first_of_largest(gain: Tensor, total: Tensor, free: Tensor) -> Tensor:
    """The free part [M] with the largest gain, of equal ones that with the largest total, then the first."""
    for value in (gain, total):
        value = value.masked_fill(~free, -torch.inf)
        free = free & (value == value.amax(dim=1, keepdim=True))
    return torch.where(free, torch.arange(free.shape[1], device=free.device), free.shape[1] - 1).amin(dim=1)


SPEC = MetricSpec(
    name="pair_insertion_deletion",
    kind="caption",
    compute=pair_insertion_deletion,
    values=("pair_insertion", "pair_insertion_least", "pair_deletion", "pair_deletion_least"),
    scores=(
        Score(name="pair_insertion", value="pair_insertion", heading="insertion", better="up"),
        Score(name="pair_insertion_least", value="pair_insertion_least", heading="insertion, reverse", better="down"),
        Score(name="pair_deletion", value="pair_deletion", heading="deletion", better="down"),
        Score(name="pair_deletion_least", value="pair_deletion_least", heading="deletion, reverse", better="up"),
    ),
    title="Insertion and deletion in the order of pairs",
    note=(
        "Mean similarity while patches and tokens are shown (insertion) or hidden (deletion), each time the one that "
        "changes the sum of the interactions of what is present most; or, in reverse, least."
    ),
    needs_interactions=True,
    by_default=False,
    chart="bars",
)
