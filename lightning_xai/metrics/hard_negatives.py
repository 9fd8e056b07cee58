"""Hard negatives: does a box lose attribution when the caption names something else (feature-pair paper, 4.4)?

Shape suffix: N hard negatives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_xai.metrics.exact_means import ExactMeans

__all__ = ["HardNegativesMetric", "attribution_difference"]


def attribution_difference(negative: Tensor, positive: Tensor) -> Tensor:
    """delta: what a replacement attributes to the true object's box, minus what the true phrase does; lower is better.

    Args:
        negative: [N], of the replacement in the wrong caption.
        positive: [N], of the true phrase in the true caption.

    >>> import torch
    >>> attribution_difference(torch.tensor([-0.25]), torch.tensor([0.5]))
    tensor([-0.7500])
    """
    return negative - positive


class HardNegativesMetric(ExactMeans):
    """Share of negative deltas, and mean delta; the same on one process and on many.

    Example:
        >>> import torch
        >>> metric = HardNegativesMetric()
        >>> metric.update(torch.tensor([-0.5, 0.25]))
        >>> metric.compute()
        {'delta_negative': 0.5, 'delta_mean': -0.125}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("delta_negative", "delta_mean"), **kwargs)

    def update(self, delta: Tensor) -> None:  # type: ignore[override]
        """Add hard negatives: `delta` [N], finite, from `attribution_difference`."""
        if not delta.isfinite().all():
            raise ValueError(f"delta has to be finite; got {delta.tolist()}")
        super().update({"delta_negative": (delta < 0).double(), "delta_mean": delta})
