"""Localization: how well the strongest quarter of a map covers the boxes (M2IB paper, section 4.3, Eq. 16).

Shape suffixes: N maps, M boxes, h x w pixels. Boxes are (x0, y0, x1, y1) in pixels of the image that the model saw.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.heat_maps import upsample
from lightning_xai.metrics.base import CaptionTargets, MetricSpec, ScoreMetric
from lightning_xai.results.record import Score

__all__ = ["SPEC", "LocalizationMetric", "binarised", "box_union", "intersection_over_union", "localization"]

_ROUNDING = 1e-9  # 0.07 * 100 is 7.000000000000001


def binarised(maps: Tensor, quantile: float = 0.75) -> Tensor:
    """The places whose value is above a quantile of their own map.

    The threshold is the smallest value that at least this share of the map does not exceed: without ties exactly the
    other places remain. A constant map has none.

    Args:
        maps: [N, h, w].
        quantile: in [0, 1].

    Returns:
        [N, h, w] bool.

    Raises:
        ValueError: the maps are not [N, h, w] or not finite, or the quantile lies outside its range.

    >>> binarised(torch.tensor([[[0.1, 0.4], [0.3, 0.2]]])).int()
    tensor([[[0, 1],
             [0, 0]]], dtype=torch.int32)
    """
    if maps.ndim != 3 or not maps.isfinite().all():
        raise ValueError(f"expected finite maps [N, h, w]; got {list(maps.shape)}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile has to be in [0, 1]; got {quantile}")
    flat = maps.flatten(1)
    rank = max(math.ceil(quantile * flat.shape[1] - _ROUNDING), 1)
    return maps > flat.kthvalue(rank, dim=1).values[:, None, None]


def box_union(boxes: Tensor, owner: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """The pixels whose centre lies in one of the boxes of each map.

    Args:
        boxes: [M, 4].
        owner: [M] int64, which of the N maps a box belongs to.
        count: N.
        size: (h, w).

    Returns:
        [N, h, w] bool; all False for a map without a box.

    >>> box_union(torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]]), torch.tensor([0, 0]), 1, (1, 3)).int()
    tensor([[[1, 0, 1]]], dtype=torch.int32)
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(dim=1)
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    inside_Mh = (rows >= y0) & (rows < y1)
    inside_Mw = (columns >= x0) & (columns < x1)
    union = torch.zeros(count, *size, dtype=torch.bool, device=boxes.device)
    for row, down, across in zip(owner.tolist(), inside_Mh, inside_Mw, strict=True):
        union[row] |= down[:, None] & across
    return union


def intersection_over_union(predicted: Tensor, truth: Tensor) -> Tensor:
    """|predicted and truth| / |predicted or truth| (Eq. 16); higher is better.

    Args:
        predicted: [N, h, w] bool.
        truth: [N, h, w] bool.

    Returns:
        [N] float64 in [0, 1]; NaN where both are empty.

    >>> ours, theirs = torch.tensor([[[True, True, False]]]), torch.tensor([[[False, True, True]]])
    >>> intersection_over_union(ours, theirs)
    tensor([0.3333], dtype=torch.float64)
    """
    both = (predicted & truth).flatten(1).sum(dim=1)
    either = (predicted | truth).flatten(1).sum(dim=1)
    return both.double() / either.double()


def localization(targets: CaptionTargets, *, quantile: float = 0.75) -> dict[str, Tensor]:
    """Compute the IoU of each binarised map with the union of its boxes; NaN where there is neither.

    Args:
        targets: captions with their images.
        quantile: of a map's values, above which it is taken to point at something.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile has to be in [0, 1]; got {quantile}")
    ious = [torch.zeros(0, dtype=torch.float64, device=targets.image_maps.device)]
    for rows in targets.slices():
        here = (targets.box_owner >= rows.start) & (targets.box_owner < rows.stop)
        predicted = binarised(upsample(targets.image_maps[rows].float(), targets.image_size), quantile)
        owner = targets.box_owner[here] - rows.start
        truth = box_union(targets.boxes[here], owner, len(predicted), targets.image_size)
        ious.append(intersection_over_union(predicted, truth))
    boxes = torch.bincount(targets.box_owner, minlength=len(targets))
    # A box between the centres of pixels covers none of them: with a constant map, 0 / 0.
    return {"iou": torch.cat(ious).masked_fill(boxes == 0, torch.nan)}


SPEC = MetricSpec(
    name="localization",
    kind="caption",
    compute=localization,
    values=("iou",),
    scores=(Score(name="localization_iou", value="iou", heading="IoU", better="up", percent=True, bounds=(0, 1)),),
    title="Localization",
    note="IoU of the strongest quarter of a map with the boxes of all objects that the caption names.",
    needs_boxes=True,
    empty={"iou": Exclusion.NO_BOX},
    chart="bars",
)


class LocalizationMetric(ScoreMetric):
    """Mean IoU over the maps that have boxes; the same on one process and on many.

    Example:
        >>> metric = LocalizationMetric()
        >>> metric.update(torch.tensor([0.25, 0.5, float("nan")]))
        >>> metric.compute()
        {'localization_iou': 0.375}
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(SPEC, **kwargs)

    def update(self, iou: Tensor) -> None:  # type: ignore[override]
        """Add maps: `iou` [N], from `intersection_over_union`; NaN where there is no box."""
        super().update(iou=iou)
