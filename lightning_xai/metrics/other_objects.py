"""Attributions to the boxes of other objects, which a phrase does not name.

Feature-pair paper, section 4.3 and Figure 12. Shape suffixes: R phrases, P pairs of phrases.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_xai.metrics.base import MetricSpec, PhrasePairTargets, ScoreMetric
from lightning_xai.metrics.grounding import box_attribution
from lightning_xai.results.record import Score

__all__ = ["SPEC", "OtherObjectsMetric", "directed_pairs", "other_objects"]


def directed_pairs(caption: Tensor, label: Tensor) -> Tensor:
    """Find every two phrases of one caption that name different classes, in both directions.

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


def other_objects(targets: PhrasePairTargets) -> dict[str, Tensor]:
    """Compute the total attribution of each phrase to its own box and to the other object's."""
    return {
        "own": box_attribution(targets.maps, targets.masks),
        "other": box_attribution(targets.maps, targets.other_masks),
    }


SPEC = MetricSpec(
    name="other_objects",
    kind="phrase_pair",
    compute=other_objects,
    values=("own", "other"),
    # Zero is neither positive nor negative.
    scores=(
        Score(
            name="own_positive",
            value="own",
            reduce="share_above",
            heading="own box positive",
            better="up",
            percent=True,
        ),
        Score(name="other_negative", value="other", reduce="share_below", heading="other box negative", percent=True),
    ),
    title="Signs of attributions",
    note="Share of phrases with a positive attribution to their own object, and with a negative one to another object "
    "that the caption names.",
    needs_boxes=True,
    needs_sign=True,
    chart="distribution",
)


class OtherObjectsMetric(ScoreMetric):
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
        super().__init__(SPEC, **kwargs)

    def update(self, own: Tensor, other: Tensor) -> None:  # type: ignore[override]
        """Add pairs of phrases.

        Args:
            own: [P], total attribution of each phrase to its own box.
            other: [P], to the box of the other object.
        """
        for name, value in (("own", own), ("other", other)):
            if not value.isfinite().all():
                raise ValueError(f"the attribution to the {name} box has to be finite; got {value.tolist()}")
        super().update(own=own, other=other)
