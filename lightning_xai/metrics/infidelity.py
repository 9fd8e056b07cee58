"""How far a map is from the changes of the similarity when random parts are taken away: infidelity.

Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019, Eq. 1, with parts as perturbations.

Shape suffixes: M targets, N coalitions, F patches or tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.metrics.base import CaptionTargets, MetricSpec
from lightning_xai.results.record import Score

__all__ = ["SPEC", "infidelity", "squared_error"]


def infidelity(
    targets: CaptionTargets,
    *,
    image_coalitions: int = 128,
    text_coalitions: int = 64,
    p: float = 0.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compare what a map says of absent parts with what their absence takes from the similarity.

    Each patch is present with probability p, others are zero after normalisation; the caption is whole. The same with
    tokens, others being padding, and the whole image. With the options of `faithfulness`, the embeddings are shared.

    Args:
        targets: whole captions with their images.
        image_coalitions: coalitions of patches.
        text_coalitions: coalitions of tokens.
        p: the probability that a patch or a token is present, between 0 and 1.
        seed: of the draws, which no method shares.

    Returns:
        Each [M], lower is better: `image_infidelity` and `text_infidelity`, mean squares in squared units of the
        similarity; `image_infidelity_scaled` and `text_infidelity_scaled` in [0, 1] for maps in other units, see
        `squared_error`. NaN where the similarity never changes, and for captions without words.

    Raises:
        ValueError: no coalitions; p is not between 0 and 1.
    """
    if min(image_coalitions, text_coalitions) < 1:
        raise ValueError(f"infidelity needs a coalition of each; got {image_coalitions} and {text_coalitions}")
    if not 0 < p < 1:
        raise ValueError(f"p is the probability that a patch or token is present, between 0 and 1; got {p}")
    shown, of_images = targets.image_coalitions(image_coalitions, p, seed)
    said, of_texts = targets.text_coalitions(text_coalitions, p, seed)
    values: dict[str, Tensor] = {}
    for modality, present_MNF, left, maps in (
        ("image", shown.flatten(2), of_images, targets.image_maps.flatten(1)),
        ("text", said, of_texts, targets.text_maps),
    ):
        explained = torch.einsum("mnf,mf->mn", (~present_MNF).double(), maps.double())
        change = targets.similarity.double().unsqueeze(1) - left.double()
        plain, scaled = squared_error(change, explained)
        if modality == "text":
            # Nothing is ever absent: what changes is rounding.
            plain, scaled = (each.masked_fill(~targets.content.any(dim=1), torch.nan) for each in (plain, scaled))
        values |= {f"{modality}_infidelity": plain, f"{modality}_infidelity_scaled": scaled}
    return values


def squared_error(change: Tensor, explained: Tensor) -> tuple[Tensor, Tensor]:
    """The mean square of explained - change along N: [M, N] each -> [M], and the same at the best scale.

    The second is the least of the mean squares of a * explained - change over all a >= 0, over that of change: 0 for
    changes that are right up to a factor, 1 for a map that says nothing, or the opposite. (Captum's normalisation takes
    any a, so that an attribution with the wrong sign is as good as the right one.)

    >>> change = torch.tensor([[1.0, 2.0]])
    >>> squared_error(change, 3 * change)[1].item(), squared_error(change, -3 * change)[1].item()
    (0.0, 1.0)
    """
    spread = change.square().sum(dim=1)
    product, size = (explained * change).sum(dim=1).clamp(min=0), explained.square().sum(dim=1)
    scale = torch.where(size > 0, product / size.where(size > 0, 1), 0)
    scaled = (scale.unsqueeze(1) * explained - change).square().sum(dim=1) / spread
    plain = (explained - change).square().mean(dim=1)
    nothing = spread == 0
    return plain.masked_fill(nothing, torch.nan), scaled.masked_fill(nothing, torch.nan)


SPEC = MetricSpec(
    name="infidelity",
    kind="caption",
    compute=infidelity,
    values=("image_infidelity", "text_infidelity", "image_infidelity_scaled", "text_infidelity_scaled"),
    scores=(
        Score(name="image_infidelity", value="image_infidelity", heading="image", better="down"),
        Score(name="text_infidelity", value="text_infidelity", heading="text", better="down"),
        Score(name="image_infidelity_scaled", value="image_infidelity_scaled", heading="image, scaled", better="down"),
        Score(name="text_infidelity_scaled", value="text_infidelity_scaled", heading="text, scaled", better="down"),
    ),
    title="Infidelity",
    note=(
        "Mean square of what maps say of random absent parts less what the similarity loses without them. Scaled: at "
        "the best positive scale of each map, as a share of the mean square of the losses."
    ),
    by_default=False,
    chart="bars",
)
