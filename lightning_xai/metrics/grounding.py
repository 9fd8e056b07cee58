"""How much of a phrase's attribution falls into the box of the object it names: gamma and rho.

Definitions: "Explaining caption-image interactions in CLIP models with second-order attributions", section 4.2. The
formulas stand here once, as functions; `GroundingMetric` only accumulates what they return.

Shapes: R rows (a phrase and the object it names), H x W the patch grid of the map, h x w the image in pixels.
Boxes are (x0, y0, x1, y1) in pixels of the image that the model saw, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.exact_means import FRACTION_BITS, to_fixed

__all__ = [
    "ClassGrounding",
    "GroundingMetric",
    "GroundingSummary",
    "box_attribution",
    "gamma",
    "larger_than_patch",
    "measurable",
    "patch_mask",
    "rho",
]


def patch_mask(boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """The patches that a box covers: its edges moved to the nearest patch edge, but never less than one patch.

    Rounding both edges keeps a box's area right on average over its positions; taking every patch that the box
    touches would enlarge it by about a patch per axis, and gamma with it. An edge in the middle of a patch moves up,
    whichever edge it is, so that a shift by one patch shifts the mask by one patch. On an axis where both edges meet,
    the patch under the box's centre is taken.

    Args:
        boxes: [R, 4] pixels; the part outside the image is cut off.
        grid: (H, W).
        image_size: (h, w) pixels.

    Returns:
        [R, H, W] bool.

    Raises:
        ValueError: boxes are not [R, 4] or not finite.

    Example:
        >>> patch_mask(torch.tensor([[7.0, 0.0, 25.0, 9.0]]), (2, 3), (32, 48)).int()
        tensor([[[1, 1, 0],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    x0, y0, x1, y1 = _in_patches(boxes, grid, image_size)
    columns = _covered(x0, x1, grid[1])
    rows = _covered(y0, y1, grid[0])
    return rows[:, :, None] & columns[:, None, :]


def larger_than_patch(boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Whether the part of a box inside the image has more area than one patch.

    Args:
        boxes: [R, 4] pixels.
        grid: (H, W).
        image_size: (h, w) pixels.

    Returns:
        [R] bool; a box of exactly one patch's area is not larger.

    Raises:
        ValueError: boxes are not [R, 4] or not finite.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 16.0, 17.0]])
        >>> larger_than_patch(boxes, (2, 3), (32, 48))
        tensor([False,  True])
    """
    x0, y0, x1, y1 = _in_patches(boxes, grid, image_size)
    return (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0) > 1


def measurable(reason: Tensor, boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Turn MEASURED into SMALLER_THAN_PATCH where the box has no more area than a patch; keep every other reason.

    Args:
        reason: [R] int64, values of `Exclusion`.
        boxes: [R, 4] pixels.
        grid: (H, W).
        image_size: (h, w) pixels.

    Returns:
        [R] int64.

    Raises:
        ValueError: boxes are not [R, 4] or not finite.

    Example:
        >>> reason = torch.tensor([Exclusion.MEASURED, Exclusion.MEASURED, Exclusion.NOT_MENTIONED])
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 5.0, 5.0]])
        >>> [Exclusion(value).name for value in measurable(reason, boxes, (4, 4), (32, 32)).tolist()]
        ['MEASURED', 'SMALLER_THAN_PATCH', 'NOT_MENTIONED']
    """
    small = (reason == Exclusion.MEASURED) & ~larger_than_patch(boxes, grid, image_size)
    return reason.masked_fill(small, int(Exclusion.SMALLER_THAN_PATCH))


def gamma(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of a map's positive part that lies inside the mask (section 4.2 of the paper).

    Args:
        maps: [R, H, W] signed attributions.
        masks: [R, H, W] bool, from `patch_mask`.

    Returns:
        [R] float64 (float32 on devices without it) in [0, 1], higher is better; NaN where the map has no positive
        entry.

    Raises:
        ValueError: the shapes differ, or an attribution is not finite.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]], [[-1.0, 0.0], [0.0, -2.0]]])
        >>> masks = torch.tensor([[[True, False], [True, False]]]).expand(2, 2, 2)
        >>> gamma(maps, masks)
        tensor([0.7500,    nan], dtype=torch.float64)
    """
    _check_maps(maps, masks)
    positive = maps.detach().clamp(min=0).to(_widest_float(maps.device))
    inside = positive.masked_fill(~masks, 0).sum(dim=(1, 2))
    return inside / positive.sum(dim=(1, 2))


def rho(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the largest entry of a map lies inside the mask (section 4.2 of the paper).

    Where several entries are largest, all of them have to lie inside: which one a search meets first says nothing
    about the model. A map without a positive entry has no hit (its gamma is NaN, and the metric leaves it out).

    Args:
        maps: [R, H, W] signed attributions.
        masks: [R, H, W] bool, from `patch_mask`.

    Returns:
        [R] bool.

    Raises:
        ValueError: the shapes differ, or an attribution is not finite.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]], [[1.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
        >>> masks = torch.tensor([[[True, False], [True, False]]]).expand(3, 2, 2)
        >>> rho(maps, masks)
        tensor([ True, False, False])
    """
    _check_maps(maps, masks)
    largest = maps.detach().flatten(1).amax(dim=1)
    outside = maps.detach().masked_fill(masks, -torch.inf).flatten(1).amax(dim=1)
    return (largest > outside) & (largest > 0)


def box_attribution(maps: Tensor, masks: Tensor) -> Tensor:
    """The total attribution to a box, positive and negative together (sections 4.3 and 4.4 of the paper).

    Args:
        maps: [R, H, W] signed attributions.
        masks: [R, H, W] bool, from `patch_mask`.

    Returns:
        [R] float64 (float32 on devices without it), in the map's units.

    Raises:
        ValueError: the shapes differ, or an attribution is not finite.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]]])
        >>> box_attribution(maps, torch.tensor([[[True, False], [True, False]]]))
        tensor([-6.], dtype=torch.float64)
    """
    _check_maps(maps, masks)
    return maps.detach().to(_widest_float(maps.device)).masked_fill(~masks, 0).sum(dim=(1, 2))


@dataclass  # not frozen: torchmetrics copies what compute returns field by field
class ClassGrounding:
    """The grounding of a set of pairs; fractions in [0, 1], higher is better, NaN where there is no pair.

    Attributes:
        pairs: the pairs measured.
        gamma_mean: mean over pairs.
        gamma_std: sample standard deviation over pairs (divided by pairs - 1); NaN below two pairs.
        gamma_above_50: share of pairs with gamma > 0.5.
        gamma_above_80: share of pairs with gamma > 0.8.
        rho: share of pairs whose largest attribution lies inside the box.
        left_out: rows that were not measured, by reason (every reason of `Exclusion` but MEASURED, in lower case).
    """

    pairs: int
    gamma_mean: float
    gamma_std: float
    gamma_above_50: float
    gamma_above_80: float
    rho: float
    left_out: dict[str, int]

    def scalars(self) -> dict[str, float]:
        """The numbers to log, by name; the same names whether or not anything was measured."""
        return {
            "gamma_mean": self.gamma_mean,
            "gamma_above_50": self.gamma_above_50,
            "gamma_above_80": self.gamma_above_80,
            "rho": self.rho,
            "grounding_pairs": float(self.pairs),
        }


@dataclass
class GroundingSummary(ClassGrounding):
    """The grounding over all pairs, and the same per class.

    Attributes:
        per_class: label -> its grounding, for every label in the order given to the metric.
    """

    per_class: dict[str, ClassGrounding]


# gamma enters the sums as a fixed-point number. A square has up to 80 bits and is kept as the three products of the
# halves, so that it, too, is exact; 2^23 pairs with gamma = 1 (8 million a class) fill an int64.
_HALF_BITS = FRACTION_BITS // 2
_COLUMNS = 8  # pairs, gamma, high^2, high * low, low^2, gamma > 0.5, gamma > 0.8, hits


class GroundingMetric(Metric):
    """Accumulates gamma and rho per class; the same result on one process and on many.

    The states are int64 counts and fixed-point sums (a step of 2^-40, an error below 1e-12), so they need no float64
    on the device, and converting the model that holds the metric to another precision does not touch them.

    Args:
        label_names: the classes; `label` in `update` counts into this sequence.

    Raises:
        ValueError: a name is given twice.

    Example:
        >>> metric = GroundingMetric(["dog", "cat"])
        >>> reason = torch.tensor([Exclusion.MEASURED, Exclusion.MEASURED, Exclusion.SPAN_CUT_OFF])
        >>> metric.update(
        ...     torch.tensor([0.5, 0.75, 0.0]), torch.tensor([False, True, False]), torch.tensor([0, 0, 1]), reason
        ... )
        >>> summary = metric.compute()
        >>> summary.pairs, summary.gamma_mean, summary.gamma_above_50, summary.rho, summary.left_out["span_cut_off"]
        (2, 0.625, 0.5, 0.5, 1)
        >>> summary.per_class["cat"].pairs
        0
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    totals: Tensor
    reasons: Tensor

    def __init__(self, label_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_names = tuple(label_names)
        if len(set(self.label_names)) != len(self.label_names):
            repeated = sorted({name for name in self.label_names if self.label_names.count(name) > 1})
            raise ValueError(f"label names have to differ; given more than once: {repeated}")
        self.add_state("totals", torch.zeros(len(self.label_names), _COLUMNS, dtype=torch.int64), dist_reduce_fx="sum")
        reasons = torch.zeros(len(self.label_names), len(Exclusion), dtype=torch.int64)
        self.add_state("reasons", reasons, dist_reduce_fx="sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> GroundingMetric:
        """Does nothing: the states are integers at any precision."""
        return self

    def update(self, gamma: Tensor, hit: Tensor, label: Tensor, reason: Tensor) -> None:
        """Add rows; a measured row without a gamma (NaN) counts as NO_POSITIVE.

        Args:
            gamma: [R] float, in [0, 1] or NaN where measured; anything elsewhere.
            hit: [R] bool, from `rho`.
            label: [R] int64, index into `label_names`.
            reason: [R] int64, values of `Exclusion`, from `measurable`. Rows that are not MEASURED are only counted.

        Raises:
            ValueError: shapes differ, a measured row has a gamma outside [0, 1], or a label or reason is unknown.
        """
        shapes = [tuple(tensor.shape) for tensor in (gamma, hit, label, reason)]
        if gamma.ndim != 1 or len(set(shapes)) != 1:
            raise ValueError(f"GroundingMetric.update expects gamma, hit, label and reason, each [R]; got {shapes}")
        device = self.totals.device
        gamma, hit, label, reason = (tensor.detach().to(device) for tensor in (gamma, hit, label, reason))
        known = torch.arange(len(Exclusion), device=device)
        if not torch.isin(reason, known).all():
            raise ValueError(
                f"reason holds values that are not in Exclusion (0 to {len(Exclusion) - 1}): {reason.tolist()}"
            )
        if not ((label >= 0) & (label < len(self.label_names))).all():
            raise ValueError(
                f"label counts into the {len(self.label_names)} label names; "
                f"got values from {label.min()} to {label.max()}"
            )
        no_positive = (reason == Exclusion.MEASURED) & gamma.isnan()
        reason = reason.masked_fill(no_positive, int(Exclusion.NO_POSITIVE))
        measured = reason == Exclusion.MEASURED
        rows = self._rows(gamma[measured], hit[measured])
        # Out of place: a state made under inference_mode could not be changed outside of it.
        self.totals = self.totals.index_add(0, label[measured], rows)
        self.reasons = self.reasons.index_add(0, label, (reason[:, None] == known).long())

    def compute(self) -> GroundingSummary:
        """The grounding over everything added since the last reset, on all ranks; NaN where there is no pair."""
        totals: list[list[int]] = self.totals.tolist()
        reasons: list[list[int]] = self.reasons.tolist()
        # Summed as Python's integers, which have room for all classes together.
        overall = _grounding(_column_sums(totals, _COLUMNS), _column_sums(reasons, len(Exclusion)))
        per_class = {
            name: _grounding(row, counts) for name, row, counts in zip(self.label_names, totals, reasons, strict=True)
        }
        return GroundingSummary(**vars(overall), per_class=per_class)

    def _rows(self, gamma: Tensor, hit: Tensor) -> Tensor:
        """[n] each, all measured -> [n, columns] int64, what each pair adds to its class."""
        if not ((gamma >= 0) & (gamma <= 1)).all():
            raise ValueError(f"gamma is a fraction in [0, 1]; got values from {gamma.min()} to {gamma.max()}")
        fixed = to_fixed(gamma)
        high, low = fixed >> _HALF_BITS, fixed & (2**_HALF_BITS - 1)
        columns = [torch.ones_like(fixed), fixed, high * high, high * low, low * low, gamma > 0.5, gamma > 0.8, hit]
        return torch.stack([column.long() for column in columns], dim=1)


def _column_sums(rows: Sequence[Sequence[int]], columns: int) -> list[int]:
    return [sum(row[column] for row in rows) for column in range(columns)]


def _grounding(row: Sequence[int], reasons: Sequence[int]) -> ClassGrounding:
    """One row of the totals (exact integers) -> means; Python's integers do not overflow."""
    left_out = {why.name.lower(): reasons[why] for why in Exclusion if why is not Exclusion.MEASURED}
    pairs, total, high_high, high_low, low_low, above_50, above_80, hits = row
    if pairs == 0:
        return ClassGrounding(0, math.nan, math.nan, math.nan, math.nan, math.nan, left_out)
    squares = (high_high << 2 * _HALF_BITS) + (high_low << _HALF_BITS + 1) + low_low
    variance = (pairs * squares - total * total) / (pairs * (pairs - 1) << 2 * FRACTION_BITS) if pairs > 1 else math.nan
    return ClassGrounding(
        pairs=pairs,
        gamma_mean=total / (pairs << FRACTION_BITS),
        gamma_std=math.sqrt(variance),
        gamma_above_50=above_50 / pairs,
        gamma_above_80=above_80 / pairs,
        rho=hits / pairs,
        left_out=left_out,
    )


def _in_patches(
    boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes cut to the image, in units of patches: x0, y0, x1, y1, each [R]."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have to be [R, 4] (x0, y0, x1, y1) in pixels; got {tuple(boxes.shape)}")
    if not torch.isfinite(boxes).all():
        raise ValueError("a box is not finite; boxes have to be (x0, y0, x1, y1) in pixels of the transformed image")
    x0, y0, x1, y1 = boxes.detach().to(_widest_float(boxes.device)).unbind(dim=1)
    (rows, columns), (height, width) = grid, image_size
    return (
        (x0 * columns / width).clamp(0, columns),
        (y0 * rows / height).clamp(0, rows),
        (x1 * columns / width).clamp(0, columns),
        (y1 * rows / height).clamp(0, rows),
    )


def _covered(start: Tensor, end: Tensor, patches: int) -> Tensor:
    """Start and end [R] of an interval in patches -> [R, patches] bool."""
    # Not torch.round: it moves halves to the even neighbour, so equal boxes would differ in size by their position.
    first, last = (start + 0.5).floor(), (end + 0.5).floor()
    centre = ((start + end) / 2).floor().clamp(max=patches - 1)
    empty = last <= first
    first, last = torch.where(empty, centre, first), torch.where(empty, centre + 1, last)
    position = torch.arange(patches, device=start.device)
    return (position >= first[:, None]) & (position < last[:, None])


def _check_maps(maps: Tensor, masks: Tensor) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != torch.bool:
        raise ValueError(
            "expected maps [R, H, W] and bool masks of the same shape; got "
            f"{tuple(maps.shape)} and {tuple(masks.shape)} {masks.dtype}"
        )
    finite = torch.isfinite(maps).flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"the attribution of {int((~finite).sum())} of {len(maps)} rows is not finite (NaN or infinite); "
            "check the model's weights: a training run that diverged leaves NaN in them"
        )


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
