"""Attributions to the boxes of other objects: does a phrase speak against what it does not name?

Feature-pair paper, section 4.3 and Figure 12. Shape suffixes: R phrases, P pairs of phrases.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_xai.metrics.exact_means import ExactMeans

__all__ = ["OtherObjectsMetric", "directed_pairs"]


def directed_pairs(caption: Tensor, label: Tensor) -> Tensor:
    """Every two phrases of one caption that name different classes, in both directions.

    Args:
        caption: [R] int64, the caption of each phrase.
        label: [R] int64, the class that it names.

    Returns:
        [P, 2] int64: rows of the phrase that is selected and of the other object's.

    >>> import torch
    >>> directed_pairs(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 5, 3, 3])).tolist()
    [[0, 1], [1, 0]]
    """
    together = (caption[:, None] == caption) & (label[:, None] != label)
    return together.nonzero()


class OtherObjectsMetric(ExactMeans):
    """Share of positive attributions to the own box, and of negative ones to the other object's; on any processes.

    Zero is neither positive nor negative.

    Example:
        >>> import torch
        >>> metric = OtherObjectsMetric()
        >>> metric.update(torch.tensor([0.2, 0.1]), torch.tensor([-0.1, 0.3]))
        >>> metric.compute()
        {'own_positive': 1.0, 'other_negative': 0.5}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("own_positive", "other_negative"), **kwargs)

    def update(self, own: Tensor, other: Tensor) -> None:  # type: ignore[override]
        """Add pairs.

        Args:
            own: [P], total attribution of each phrase to its own box.
            other: [P], to the box of the other object.
        """
        for name, value in (("own", own), ("other", other)):
            if not value.isfinite().all():
                raise ValueError(f"the attribution to the {name} box has to be finite; got {value.tolist()}")
        super().update({"own_positive": (own > 0).double(), "other_negative": (other < 0).double()})
