"""Drop and increase in confidence: what is left of a pair's similarity when only the important part is kept.

M2IB paper, section 4.4, Eqs. 17 and 18. The formulas stand here once, as functions; the class only averages them.

Shape suffix: N pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_xai.metrics.exact_means import ExactMeans

__all__ = ["ConfidenceMetric", "confidence_drop", "confidence_increase"]


def confidence_drop(original: Tensor, kept: Tensor) -> Tensor:
    """max(0, o - s), what a pair loses when only the important part is kept (Eq. 17); lower is better.

    Args:
        original: [N], cosine similarity o of the pair.
        kept: [N], cosine similarity s with only the important part of one modality.

    Returns:
        [N] in [0, 2]; the paper prints its mean in percent.

    >>> confidence_drop(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
    tensor([0.2500, 0.0000])
    """
    return (original - kept).clamp(min=0)


def confidence_increase(original: Tensor, kept: Tensor) -> Tensor:
    """Whether a pair gains when only the important part is kept, o < s (Eq. 18); more is better.

    Returns:
        [N] bool.

    >>> confidence_increase(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.75, 0.5]))
    tensor([False,  True, False])
    """
    return kept > original


class ConfidenceMetric(ExactMeans):
    """Mean drop and share of increases, for images and for texts; the same on one process and on many.

    `compute` gives `image_drop` and `text_drop` (in units of the cosine similarity, lower is better) and
    `image_increase` and `text_increase` (fractions, higher is better).

    Example:
        >>> metric = ConfidenceMetric()
        >>> metric.update(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.625]))
        >>> metric.compute()
        {'image_drop': 0.125, 'image_increase': 0.5, 'text_drop': 0.0, 'text_increase': 0.5}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("image_drop", "image_increase", "text_drop", "text_increase"), **kwargs)

    def update(self, original: Tensor, image_kept: Tensor, text_kept: Tensor) -> None:  # type: ignore[override]
        """Add pairs.

        Args:
            original: [N], similarity of each pair; finite.
            image_kept: [N], with only the important part of the image.
            text_kept: [N], with only the important tokens; NaN for a caption that has none.

        Raises:
            ValueError: the shapes differ, or a pair has no similarity.
        """
        shapes = [list(part.shape) for part in (original, image_kept, text_kept)]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
            raise ValueError(f"expected similarities original, image_kept and text_kept, each [N]; got {shapes}")
        if not original.isfinite().all():
            raise ValueError(f"the similarity of a pair has to be finite; got {original.tolist()}")
        values = {}
        for name, kept in (("image", image_kept), ("text", text_kept)):
            missing = kept.isnan()
            values[f"{name}_drop"] = confidence_drop(original, kept)
            values[f"{name}_increase"] = torch.where(
                missing, torch.nan, confidence_increase(original, kept).to(original.dtype)
            )
        super().update(values)
