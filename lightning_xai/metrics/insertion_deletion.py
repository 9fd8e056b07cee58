"""Similarity while parts come and go in the order of a map: insertion and deletion curves (RISE paper, section 4.1).

Shape suffixes: M targets, N points of a curve, H x W the patch grid, F parts (patches or tokens), L tokens, K embedding
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.results.record import Score

__all__ = ["SPEC", "area", "constant", "insertion_deletion", "strongest"]


def insertion_deletion(targets: CaptionTargets, *, steps: int = 10) -> dict[str, Tensor]:
    """Measure the areas under the similarity while the most important parts are shown, or hidden, first.

    Insertion starts from nothing and adds parts from the most important one on; deletion starts from everything and
    takes them away in the same order (read backwards, it adds the least important ones first). Hidden patches are zero
    after normalisation, hidden tokens padding. Of equal parts the first one counts as more important.

    Args:
        targets: whole captions with their images.
        steps: equal steps from nothing to everything; an image is embedded 2 (steps + 1) times.

    Returns:
        The areas [M] of the curves, means of the cosine similarity over the share that is shown, in [-1, 1]:
        `image_insertion` and `image_deletion` with the whole caption, `text_insertion` and `text_deletion` with the
        whole image, and `insertion` and `deletion` of both at once; NaN for a caption without words, and for a constant
        map, which has no order.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps has to be at least 1; got {steps}")
    content = targets.content
    every_patch = torch.ones_like(targets.image_maps.flatten(1), dtype=torch.bool)
    shown = _curves(targets.image_maps.flatten(1), every_patch, steps)
    said = _curves(targets.text_maps, content, steps)
    image_MNK = targets.embed_images(shown.reshape(*shown.shape[:2], *targets.image_maps.shape[1:])).double()
    text_MNK = targets.embed_texts(said).double()
    # Insertion ends, and deletion starts, with everything.
    curves = {
        "image_": (image_MNK * text_MNK[:, steps : steps + 1]).sum(dim=2),
        "text_": (text_MNK * image_MNK[:, steps : steps + 1]).sum(dim=2),
        "": (image_MNK * text_MNK).sum(dim=2),
    }
    image, text = constant(targets.image_maps.flatten(1), every_patch), constant(targets.text_maps, content)
    missing = {"image_": image, "text_": text, "": image | text}
    values = {}
    for modality, curve in curves.items():
        for name, part in (("insertion", curve[:, : steps + 1]), ("deletion", curve[:, steps + 1 :])):
            values[modality + name] = area(part).masked_fill(missing[modality], torch.nan)
    return values


def constant(scores: Tensor, own: Tensor) -> Tensor:
    """Rows of scores [M, F] whose own parts cannot be put in an order: there are none, or several and all equal.

    >>> constant(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.tensor([[True, False], [True, True]]))
    tensor([False,  True])
    """
    least, most = (scores.masked_fill(~own, edge) for edge in (torch.inf, -torch.inf))
    equal = least.amin(dim=1) == most.amax(dim=1)
    count = own.sum(dim=1)
    return (count == 0) | ((count > 1) & equal)


def _curves(scores: Tensor, own: Tensor, steps: int) -> Tensor:
    """The parts at each point of the insertion curve and then of the deletion curve: [M, 2 (steps + 1), F] bool."""
    shares = torch.arange(steps + 1, device=scores.device) / steps
    inserted = torch.stack([strongest(scores, own, share) for share in shares.tolist()], dim=1)
    return torch.cat([inserted, own.unsqueeze(1) & ~inserted], dim=1)


def strongest(scores: Tensor, own: Tensor, share: float) -> Tensor:
    """The given share of a row's own parts with the largest scores, rounded to whole parts: [M, F] bool.

    >>> strongest(torch.tensor([[0.5, 3.0, 1.0]]), torch.tensor([[True, False, True]]), 0.5)
    tensor([[False, False,  True]])
    """
    order = scores.masked_fill(~own, -torch.inf).argsort(dim=1, descending=True, stable=True)
    count = (own.sum(dim=1, keepdim=True) * share).round()
    first = torch.arange(scores.shape[1], device=scores.device) < count
    return torch.zeros_like(own).scatter(1, order, first) & own


def area(curve: Tensor) -> Tensor:
    """The area under curves [M, N] over [0, 1], by the trapezoid rule: [M].

    >>> area(torch.tensor([[0.0, 1.0, 1.0]]))
    tensor([0.7500])
    """
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


SPEC = MetricSpec(
    name="insertion_deletion",
    kind="caption",
    compute=insertion_deletion,
    values=("image_insertion", "image_deletion", "text_insertion", "text_deletion", "insertion", "deletion"),
    scores=(
        Score(name="image_insertion", value="image_insertion", heading="image insertion", better="up"),
        Score(name="image_deletion", value="image_deletion", heading="image deletion", better="down"),
        Score(name="text_insertion", value="text_insertion", heading="text insertion", better="up"),
        Score(name="text_deletion", value="text_deletion", heading="text deletion", better="down"),
        Score(name="insertion", value="insertion", heading="insertion, both", better="up"),
        Score(name="deletion", value="deletion", heading="deletion, both", better="down"),
    ),
    title="Insertion and deletion",
    note=(
        "Mean similarity while patches, tokens or both are shown (insertion) or hidden (deletion) in the order of the "
        "map, the most important ones first."
    ),
    by_default=False,
    chart="bars",
)
