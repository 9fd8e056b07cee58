"""Whether a method's maps agree with those of a referee, of the same phrases.

A referee is a method that one trusts more, at a cost: perturbation, which knows of no layer, judges the layers that
attributions are read at. Nothing here says that the referee is right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import MetricSpec, PhraseTargets
from lightning_xai.metrics.map_similarity import spearman
from lightning_xai.results.record import Score

__all__ = ["SPEC", "agreement"]


def agreement(targets: PhraseTargets) -> dict[str, Tensor]:
    """Correlate the ranks of each phrase's map with those of the referee's map of the phrase (Spearman; ties averaged).

    On different grids both are averaged to the coarser one first.

    Returns:
        `agreement` [M] in [-1, 1], higher is more alike; NaN where a map is constant, or there is none of a referee.
    """
    referee = targets.referee
    if referee is None:
        return {"agreement": targets.maps.new_full((len(targets),), torch.nan)}
    if referee.shape != targets.maps.shape:
        grid = (min(targets.maps.shape[1], referee.shape[1]), min(targets.maps.shape[2], referee.shape[2]))
        return {"agreement": spearman(*(adaptive_avg_pool2d(maps, grid) for maps in (targets.maps, referee)))}
    return {"agreement": spearman(targets.maps, referee)}


SPEC = MetricSpec(
    name="agreement",
    kind="phrase",
    compute=agreement,
    values=("agreement",),
    scores=(Score(name="agreement", value="agreement", heading="rank correlation", better="up", bounds=(-1, 1)),),
    title="Agreement of maps with the referee",
    note=(
        "The rank correlation (Spearman) of a phrase's map with the referee's, by patches. A referee that draws random "
        "numbers is compared with itself at its other seeds, which shows how much of a difference is chance."
    ),
    needs_boxes=True,
    needs_referee=True,
    empty={"agreement": Exclusion.NO_COMPARISON},
    chart="bars",
)
