"""How much of an attribution sits on CLS and registers, and so on no part of the image at all."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.results.record import Score

__all__ = ["SPEC", "prefix_share"]


def prefix_share(targets: CaptionTargets) -> dict[str, Tensor]:
    """Compare what the image's prefix tokens add to the similarity with all that is attributed.

    Gamma and rho speak of the patches alone. At the last block of a transformer much of what the patches have said is
    in CLS already; at the towers' inputs CLS says nothing, since it is the same for every image.

    Returns:
        `prefix_share` [M]: the prefix tokens' sum over the sum of all; above 1 where the patches' sum is negative, NaN
        where nothing is attributed. `prefix` [M]: the former alone, in units of the similarity.
    """
    prefix = targets.prefix.sum(dim=1)
    total = prefix + targets.image_maps.flatten(1).sum(dim=1)
    return {"prefix_share": (prefix / total).masked_fill(total == 0, torch.nan), "prefix": prefix}


SPEC = MetricSpec(
    name="prefix_share",
    kind="caption",
    compute=prefix_share,
    values=("prefix_share", "prefix"),
    scores=(
        Score(name="prefix_share", value="prefix_share", heading="on CLS and registers", percent=True),
        Score(name="prefix", value="prefix", heading="in units of the similarity"),
    ),
    title="Attribution to no part of the image",
    note=(
        "The share of the attribution that sits on CLS and registers, which are no part of the image; gamma and rho "
        "speak of the rest."
    ),
    needs_interactions=True,
    chart="bars",
)
