"""How far an attribution's sum is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.results.record import Score

__all__ = ["SPEC", "completeness"]


def completeness(targets: CaptionTargets) -> dict[str, Tensor]:
    """The size of the completeness error, in units of the similarity; of paths it falls with the integration steps.

    Returns:
        `completeness_error` [M], at least 0, lower is better; NaN for methods without a sum that they have to reach.
    """
    error = targets.completeness_error
    if error is None:
        error = targets.similarity.new_full((len(targets),), torch.nan)
    return {"completeness_error": error.abs()}


SPEC = MetricSpec(
    name="completeness",
    kind="caption",
    compute=completeness,
    values=("completeness_error",),
    scores=(Score(name="completeness_error", value="completeness_error", heading="error", better="down"),),
    title="Completeness",
    note="How far the sum of an attribution is from what it should be, in units of the similarity.",
    by_default=False,
    chart="bars",
)
