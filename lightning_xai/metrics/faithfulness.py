"""Whether an attribution's terms tell what the model says of parts: of random coalitions of patches and tokens.

After FIxLIP (Baniecki et al., NeurIPS 2025), section 4: an explanation is faithful where the sum of the terms that are
present in a coalition is what the model says of it.

Shape suffixes: M targets, N coalitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.metrics.map_similarity import spearman
from lightning_xai.results.record import Score

__all__ = ["SPEC", "determination", "faithfulness", "kendall"]


def faithfulness(
    targets: CaptionTargets,
    *,
    image_coalitions: int = 128,
    text_coalitions: int = 64,
    p: float = 0.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compare the sums of present terms with the similarities of coalitions, both less those of the empty coalition.

    Each patch and each token is present with probability p, so that plain means over coalitions are p-weighted. Absent
    patches are zero after normalisation, absent tokens padding. Coalitions of patches and of tokens are embedded once
    for all methods, and joined to several pairs each.

    Args:
        targets: whole captions with their images.
        image_coalitions: coalitions of patches that are embedded.
        text_coalitions: coalitions of tokens that are embedded.
        p: the probability that a patch or a token is present, between 0 and 1.
        seed: of the draws, which no method shares.

    Returns:
        `r2`, `spearman` and `kendall`, see `determination`, `spearman` and `kendall`; NaN where the model says the same
        of all coalitions, or the attribution does.

    Raises:
        ValueError: fewer than two coalitions; p is not between 0 and 1.
    """
    if min(image_coalitions, text_coalitions) < 2:
        raise ValueError(f"a comparison needs two coalitions of each; got {image_coalitions} and {text_coalitions}")
    if not 0 < p < 1:
        raise ValueError(f"p is the probability that a patch or token is present, between 0 and 1; got {p}")
    found = targets.coalitions(image_coalitions, text_coalitions, p, seed)
    value = found.similarity.double() - found.empty_similarity.double()[:, None]
    explained = found.explained.double() - found.empty_explained.double()[:, None]
    return {
        "r2": determination(value, explained),
        "spearman": spearman(value, explained),
        "kendall": kendall(value, explained),
    }


def determination(value: Tensor, explained: Tensor) -> Tensor:
    """The coefficient of determination, 1 - sum (v - e)^2 / sum (v - mean v)^2, of [M, N] along N: at most 1.

    One where the sums are the values, 0 for a method that says no more than the mean, and below that for methods whose
    maps are in other units than the similarity. NaN where the value is constant.

    >>> determination(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor([0.5000])
    """
    spread = (value - value.mean(dim=1, keepdim=True)).square().sum(dim=1)
    ratio = 1 - (value - explained).square().sum(dim=1) / spread
    return ratio.masked_fill(spread == 0, torch.nan)


def kendall(value: Tensor, explained: Tensor) -> Tensor:
    """Kendall's tau-b of [M, N] along N, in [-1, 1]; NaN where one is constant.

    >>> kendall(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, 9.0, 7.0]]))
    tensor([0.3333])
    """
    taus = [torch.nan] * len(value)
    for row, (one, other) in enumerate(zip(value, explained, strict=True)):  # a matrix [N, N] of one target at a time
        signs, others = (torch.sign(part[:, None] - part[None]) for part in (one, other))
        taus[row] = float((signs * others).sum() / (signs.norm() * others.norm()))
    return value.new_tensor(taus)


SPEC = MetricSpec(
    name="faithfulness",
    kind="caption",
    compute=faithfulness,
    values=("r2", "spearman", "kendall"),
    scores=(
        Score(name="r2", value="r2", heading="R2", better="up"),
        Score(name="spearman", value="spearman", heading="Spearman", better="up"),
        Score(name="kendall", value="kendall", heading="Kendall", better="up"),
    ),
    title="Faithfulness",
    note=(
        "How well the sum of the terms of present patches and tokens tells the similarity of random parts of image and "
        "caption. R2 needs maps in units of the similarity; rank correlations do not."
    ),
    by_default=False,
    chart="distribution",
)
