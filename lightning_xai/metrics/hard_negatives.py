"""Hard negatives: a box should lose attribution when the caption names something else (feature-pair paper, 4.4).

Shape suffix: N hard negatives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_xai.metrics.base import MetricSpec, NegativeTargets, ScoreMetric
from lightning_xai.metrics.grounding import box_attribution
from lightning_xai.results.record import Score

__all__ = ["SPEC", "HardNegativesMetric", "hard_negatives"]


def hard_negatives(targets: NegativeTargets) -> dict[str, Tensor]:
    """Compute delta, the attribution of a replacement to the true object's box minus that of the true phrase."""
    positive = box_attribution(targets.true_maps, targets.masks)
    negative = box_attribution(targets.replacement_maps, targets.masks)
    return {"positive": positive, "negative": negative, "delta": negative - positive}


SPEC = MetricSpec(
    name="hard_negatives",
    kind="negative",
    compute=hard_negatives,
    values=("positive", "negative", "delta"),
    scores=(
        Score(name="delta_negative", value="delta", reduce="share_below", heading="δ < 0", better="up", percent=True),
        Score(name="delta_mean", value="delta", heading="δ mean", better="down"),
    ),
    title="Hard negatives",
    note="δ: attribution of a replaced phrase to the true object's box, minus that of the true phrase.",
    needs_boxes=True,
    needs_sign=True,
    chart="distribution",
)


class HardNegativesMetric(ScoreMetric):
    """Share of negative deltas, and mean delta; the same on one process and on many.

    Example:
        >>> import torch
        >>> metric = HardNegativesMetric()
        >>> metric.update(torch.tensor([-0.5, 0.25]))
        >>> metric.compute()
        {'delta_negative': 0.5, 'delta_mean': -0.125}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(SPEC, **kwargs)

    def update(self, delta: Tensor) -> None:  # type: ignore[override]
        """Add hard negatives: `delta` [N], finite, as `hard_negatives` computes it."""
        if not delta.isfinite().all():
            raise ValueError(f"delta has to be finite; got {delta.tolist()}")
        super().update(delta=delta)
