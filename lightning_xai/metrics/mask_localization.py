"""Localization by mask: the IoU of a map's strongest quarter, and how well its values rank the pixels.

Shapes: N maps, h x w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.heat_maps import in_steps, upsample
from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.metrics.localization import binarised, box_union, intersection_over_union
from lightning_xai.results.record import Score

__all__ = ["SPEC", "mask_localization", "pixel_average_precision"]


def pixel_average_precision(maps: Tensor, truth: Tensor) -> Tensor:
    """Average precision of a map's values as scores of which pixels belong to an object.

    `AP = sum_n (R_n - R_{n-1}) P_n` over the map's distinct values, largest first: P_n and R_n are precision and recall
    of the pixels that reach the n-th value. Unlike IoU it needs no threshold. A constant map has the share of pixels
    that belong to the object, which is what a random one has on average.

    Args:
        maps: [N, h, w], finite.
        truth: [N, h, w] bool.

    Returns:
        [N] float64 in [0, 1], higher is better; NaN where no pixel belongs to an object.

    Example:
        >>> pixel_average_precision(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[True, False, True]]]))
        tensor([0.8333], dtype=torch.float64)
    """
    values, order = maps.detach().flatten(1).sort(dim=1, descending=True)
    hits = truth.flatten(1).gather(1, order)
    reached = torch.arange(1, values.shape[1] + 1, device=values.device)
    precision = hits.cumsum(dim=1).double() / reached
    # Pixels of one value are reached together: of each, the last place with its value.
    is_last = torch.ones_like(hits)
    is_last[:, :-1] = values[:, :-1] > values[:, 1:]
    last = (reached - 1).where(is_last, values.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return (precision.gather(1, last) * hits).sum(dim=1) / hits.sum(dim=1)


def mask_localization(targets: CaptionTargets, *, quantile: float = 0.75) -> dict[str, Tensor]:
    """Compute the IoU of each binarised map with the union of its masks, and average precisions by mask and by box.

    Args:
        targets: captions with their images.
        quantile: of a map's values, above which it is taken to point at something.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile has to be in [0, 1]; got {quantile}")
    columns: dict[str, list[Tensor]] = {name: [targets.prefix.new_zeros(0).double()] for name in SPEC.values}
    for rows in targets.slices():
        maps = upsample(targets.image_maps[rows].float(), targets.image_size)
        truth = targets.mask_pixels(rows)
        here = (targets.box_owner >= rows.start) & (targets.box_owner < rows.stop)
        boxes = box_union(targets.boxes[here], targets.box_owner[here] - rows.start, len(maps), targets.image_size)
        iou = intersection_over_union(binarised(maps, quantile), truth)
        # Of the same captions by box as by mask.
        gone = ~truth.flatten(1).any(dim=1)
        columns["iou_mask"].append(iou.masked_fill(gone, torch.nan))
        ranked = in_steps(maps)
        columns["ap_mask"].append(pixel_average_precision(ranked, truth))
        columns["ap_box"].append(pixel_average_precision(ranked, boxes).masked_fill(gone, torch.nan))
    return {name: torch.cat(parts) for name, parts in columns.items()}


SPEC = MetricSpec(
    name="mask_localization",
    kind="caption",
    compute=mask_localization,
    values=("iou_mask", "ap_mask", "ap_box"),
    scores=(
        Score(name="iou_mask", value="iou_mask", heading="IoU", better="up", percent=True, bounds=(0, 1)),
        Score(name="ap_mask", value="ap_mask", heading="AP", better="up", percent=True, bounds=(0, 1)),
        Score(name="ap_box", value="ap_box", heading="AP by box", better="up", percent=True, bounds=(0, 1)),
    ),
    title="Localization, by mask",
    note="IoU of the strongest quarter of a map with the masks of all objects that the caption names; AP: average "
    "precision of its values over pixels, by mask and by box.",
    needs_boxes=True,
    needs_masks=True,
    empty=dict.fromkeys(("iou_mask", "ap_mask", "ap_box"), Exclusion.OUTSIDE_CROP),
    chart="bars",
)
