"""Share of a phrase's attribution in the box of the object it names: gamma and rho.

Definitions: "Explaining caption-image interactions in CLIP models with second-order attributions", section 4.2.

Shapes: R rows (a phrase and the object it names), H x W the patch grid of the map, h x w the image in pixels.
Boxes are (x0, y0, x1, y1) in pixels of the image that the model saw, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import MetricSpec, PhraseTargets, ScoreMetric
from lightning_xai.results.record import Score

__all__ = [
    "SPEC",
    "GroundingMetric",
    "GroundingSummary",
    "box_attribution",
    "gamma",
    "grounding",
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


def measurable(reason: Tensor, boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Turn MEASURED into SMALLER_THAN_PATCH where a box's part inside the image has no more area than one patch.

    Args:
        reason: [R] int64, values of `Exclusion`.
        boxes: [R, 4] pixels.
        grid: (H, W).
        image_size: (h, w) pixels.

    Returns:
        [R] int64; every other reason is kept.

    Raises:
        ValueError: boxes are not [R, 4] or not finite.

    Example:
        >>> reason = torch.tensor([Exclusion.MEASURED, Exclusion.MEASURED, Exclusion.NOT_MENTIONED])
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 5.0, 5.0]])
        >>> [Exclusion(value).name for value in measurable(reason, boxes, (4, 4), (32, 32)).tolist()]
        ['MEASURED', 'SMALLER_THAN_PATCH', 'NOT_MENTIONED']
    """
    x0, y0, x1, y1 = _in_patches(boxes, grid, image_size)
    small = (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0) <= 1
    return reason.masked_fill(small & (reason == Exclusion.MEASURED), int(Exclusion.SMALLER_THAN_PATCH))


def gamma(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the share of a map's positive part inside the mask (section 4.2 of the paper).

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
    """Find the maps whose largest entry is inside the mask (section 4.2 of the paper).

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


def grounding(targets: PhraseTargets) -> dict[str, Tensor]:
    """Compute gamma and rho of phrases, both NaN where a map has no positive entry."""
    shares = gamma(targets.maps, targets.masks)
    hits = rho(targets.maps, targets.masks).to(shares)
    return {"gamma": shares, "rho": hits.masked_fill(shares.isnan(), torch.nan)}


def grounding_scores(suffix: str = "") -> tuple[Score, ...]:
    """Sum up gamma and rho as section 4.2 of the paper does, of values whose names end in `suffix`."""
    value = f"gamma{suffix}"
    above = (
        Score(
            name=f"{value}_above_{round(100 * threshold)}",
            value=value,
            reduce="share_above",
            threshold=threshold,
            heading=f"γ > {threshold}",
            better="up",
            percent=True,
        )
        for threshold in (0.5, 0.8)
    )
    return (
        Score(name=f"{value}_mean", value=value, heading="γ mean", better="up", bounds=(0, 1)),
        Score(name=f"{value}_std", value=value, reduce="std", heading="γ std"),
        *above,
        Score(name=f"rho{suffix}", value=f"rho{suffix}", heading="ρ", better="up", percent=True, bounds=(0, 1)),
    )


SPEC = MetricSpec(
    name="grounding",
    kind="phrase",
    compute=grounding,
    values=("gamma", "rho"),
    scores=grounding_scores(),
    title="Visual-linguistic grounding",
    note="γ: share of a phrase's positive attribution that lies in the box of its object; ρ: share of phrases whose "
    "largest attribution lies in it.",
    needs_boxes=True,
    empty={"gamma": Exclusion.NO_POSITIVE, "rho": Exclusion.NO_POSITIVE},
    chart="cumulative",
)


@dataclass  # not frozen: torchmetrics copies what compute returns field by field
class GroundingSummary:
    """The grounding of a set of phrases; fractions in [0, 1], higher is better, NaN where nothing was measured.

    Attributes:
        targets: the phrases measured.
        gamma_mean: mean over phrases.
        gamma_std: sample standard deviation over phrases (divided by phrases - 1); NaN below two.
        gamma_above_50: share of phrases with gamma above one half.
        gamma_above_80: share of phrases with gamma above 0.8.
        rho: share of phrases whose largest attribution lies inside the box.
        excluded: phrases that were not measured, by reason (every reason of `Exclusion` but MEASURED, in lower case).
        per_class: label -> its grounding, for every label in the order given to the metric; empty for a class.
    """

    targets: int
    gamma_mean: float
    gamma_std: float
    gamma_above_50: float
    gamma_above_80: float
    rho: float
    excluded: dict[str, int]
    per_class: dict[str, GroundingSummary] = field(default_factory=dict)


class GroundingMetric(ScoreMetric):
    """Collects gamma and rho by class; the same result on one process and on many.

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
        >>> summary.targets, summary.gamma_mean, summary.gamma_above_50, summary.rho, summary.excluded["span_cut_off"]
        (2, 0.625, 0.5, 0.5, 1)
        >>> summary.per_class["cat"].targets
        0
    """

    higher_is_better = True

    def __init__(self, label_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(SPEC, ("gamma", "rho", "label", "reason"), **kwargs)
        self.label_names = tuple(label_names)
        if len(set(self.label_names)) != len(self.label_names):
            repeated = sorted({name for name in self.label_names if self.label_names.count(name) > 1})
            raise ValueError(f"label names have to differ; given more than once: {repeated}")

    def update(self, gamma: Tensor, hit: Tensor, label: Tensor, reason: Tensor) -> None:  # type: ignore[override]
        """Add phrases; a measured one without a gamma (NaN) counts as NO_POSITIVE.

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
        gamma, hit, label, reason = (tensor.detach().cpu() for tensor in (gamma, hit, label, reason))
        if not ((reason >= 0) & (reason < len(Exclusion))).all():
            raise ValueError(
                f"reason holds values that are not in Exclusion (0 to {len(Exclusion) - 1}): {reason.tolist()}"
            )
        if not ((label >= 0) & (label < len(self.label_names))).all():
            raise ValueError(
                f"label counts into the {len(self.label_names)} label names; "
                f"got values from {label.min()} to {label.max()}"
            )
        reason = reason.masked_fill((reason == Exclusion.MEASURED) & gamma.isnan(), int(Exclusion.NO_POSITIVE))
        shares = gamma.double().masked_fill(reason != Exclusion.MEASURED, torch.nan)
        if not (shares.isnan() | ((shares >= 0) & (shares <= 1))).all():
            raise ValueError(f"gamma is a fraction in [0, 1]; got {gamma.tolist()}")
        super().update(gamma=shares, rho=hit, label=label, reason=reason)

    def compute(self) -> GroundingSummary:
        """The grounding over all phrases of all ranks; NaN where nothing was measured."""
        rows = self.rows()
        summary = self._summary(rows)
        label = self.values.index("label")
        summary.per_class = {
            name: self._summary(rows[rows[:, label] == number]) for number, name in enumerate(self.label_names)
        }
        return summary

    def _summary(self, rows: Tensor) -> GroundingSummary:
        columns = dict(zip(self.values, rows.unbind(dim=1), strict=True))
        reasons = columns["reason"].tolist()
        measured = columns["reason"] == Exclusion.MEASURED
        scores: dict[str, Any] = {
            score.name: score.of(columns[score.value][measured].tolist()) for score in SPEC.scores
        }
        return GroundingSummary(
            targets=int(measured.sum()),
            **scores,
            excluded={why.key: reasons.count(why) for why in Exclusion if why is not Exclusion.MEASURED},
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
