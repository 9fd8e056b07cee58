"""Whether a caption's attribution finds its image in a collage of four: pointing-game recognition.

After FIxLIP (Baniecki et al., NeurIPS 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import CollageTargets, MetricSpec
from lightning_xai.results.record import Score

__all__ = ["SPEC", "pointing_game"]


def pointing_game(targets: CollageTargets) -> dict[str, Tensor]:
    """Compare what is attributed to the quarter of a caption's own image with what is attributed to the collage.

    A patch between quarters counts by the share of it that lies inside, so that chance is 0.25 on any grid.

    Returns:
        `quarter_share` [M] in [0, 1], the share of the positive attribution in the quarter; `quarter_hit` [M] in
        [0, 1], how much of the patch with the largest value lies in it (the mean over equal ones). NaN where nothing
        is positive. Higher is better.

    >>> maps = torch.tensor([[[3.0, 1.0], [-2.0, 0.0]]])
    >>> pointing_game(CollageTargets(maps, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])))["quarter_share"].item()
    0.75
    """
    maps, inside = targets.maps.double().flatten(1), targets.inside.double().flatten(1)
    positive = maps.clamp(min=0)
    total = positive.sum(dim=1)
    largest = (maps == maps.amax(dim=1, keepdim=True)).double()
    hit = (largest * inside).sum(dim=1) / largest.sum(dim=1)
    return {
        "quarter_share": (positive * inside).sum(dim=1) / total,
        "quarter_hit": hit.masked_fill(total == 0, torch.nan),
    }


SPEC = MetricSpec(
    name="pointing_game",
    kind="collage",
    compute=pointing_game,
    values=("quarter_share", "quarter_hit"),
    scores=(
        Score(name="quarter_share", value="quarter_share", heading="share in the quarter", better="up", percent=True),
        Score(name="quarter_hit", value="quarter_hit", heading="largest in the quarter", better="up", percent=True),
    ),
    title="Pointing game",
    note=(
        "Attribution of a caption in a collage of its image and three others: the share of what is positive, and the "
        "largest value, in its quarter. Chance is 25 %."
    ),
    empty={"quarter_share": Exclusion.NO_POSITIVE, "quarter_hit": Exclusion.NO_POSITIVE},
    by_default=False,
    chart="bars",
)
