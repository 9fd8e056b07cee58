"""How much a map changes at most when the image hardly does: max-sensitivity.

Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019, Eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.results.record import Score

__all__ = ["SPEC", "max_sensitivity"]


def max_sensitivity(
    targets: CaptionTargets, *, samples: int = 10, radius: float = 0.02, seed: int = 0
) -> dict[str, Tensor]:
    """Attribute images with a little noise, and take the largest relative change of the map.

    The noise of each pixel is uniform within the radius, and the same for all methods.

    Args:
        targets: whole captions with their images.
        samples: noisy images of each target, each of which is attributed.
        radius: of the noise, in units of normalised pixels; above 0.
        seed: of the noise, together with the item.

    Returns:
        `max_sensitivity` [M], the largest of |map(x + noise) - map(x)| / |map(x)| over the samples, Euclidean norms;
        at least 0, lower is better; NaN for a map of zeros. It does not say whether a map is right: that of a
        Gaussian that is always at the centre is 0.

    Raises:
        ValueError: fewer than one sample; a radius that is not positive.
    """
    if samples < 1 or not radius > 0:
        raise ValueError(f"max_sensitivity needs samples >= 1 and radius > 0; got {samples} and {radius}")
    found = [targets.similarity.double()[:0]]
    for rows in targets.slices():
        images, maps = targets.pixels(rows), targets.image_maps[rows].double().flatten(1)
        changes = []
        for sample in range(samples):
            noise = targets.noise(rows, images.shape[1:], seed, sample, torch.rand).to(images)
            changed = targets.attribute(rows, images + radius * (2 * noise - 1))
            changes.append((changed.double().flatten(1) - maps).norm(dim=1))
        size = maps.norm(dim=1)
        found.append((torch.stack(changes).amax(dim=0) / size).masked_fill(size == 0, torch.nan))
    return {"max_sensitivity": torch.cat(found)}


SPEC = MetricSpec(
    name="max_sensitivity",
    kind="caption",
    compute=max_sensitivity,
    values=("max_sensitivity",),
    scores=(Score(name="max_sensitivity", value="max_sensitivity", heading="max-sensitivity", better="down"),),
    title="Max-sensitivity",
    note="The largest relative change of a map under noise that is hardly seen.",
    by_default=False,
    chart="bars",
)
