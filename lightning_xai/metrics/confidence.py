"""Drop and increase in confidence: what is left of a pair's similarity when only the important part is kept.

M2IB paper, section 4.4, Eqs. 17 and 18.

Shape suffixes: N pairs of image and caption, L tokens, h x w pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_xai.heat_maps import important_pixels, important_tokens, min_max, upsample
from lightning_xai.metrics.base import CaptionTargets, HiddenImage, MetricSpec, ScoreMetric
from lightning_xai.results.record import Score

__all__ = ["SPEC", "ConfidenceMetric", "confidence", "confidence_drop", "confidence_increase"]


def confidence_drop(original: Tensor, kept: Tensor) -> Tensor:
    """Compute max(0, o - s), what a pair loses when only the important part is kept (Eq. 17); lower is better.

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
    """Find the pairs that gain when only the important part is kept, o < s (Eq. 18); more is better.

    Returns:
        [N] bool.

    >>> confidence_increase(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.75, 0.5]))
    tensor([False,  True, False])
    """
    return kept > original


def confidence(
    targets: CaptionTargets,
    *,
    keep_tokens: float = 0.5,
    keep_pixels: float | None = None,
    hidden_image: HiddenImage = "zeros",
) -> dict[str, Tensor]:
    """Compute the similarity of each pair with only the important part of the image, or of the caption.

    Args:
        targets: captions with their images.
        keep_tokens: share of a caption's tokens that is kept, in [0, 1], rounded up to whole tokens.
        keep_pixels: share of an image's pixels that is kept, those with the largest values of its map. None: as in the
            paper, the image is multiplied by its map in [0, 1], which lets a map that is high everywhere keep more of
            the image than one that points at something.
        hidden_image: what is seen where an image is not kept: "zeros" (the mean colour) or "black".
    """
    for name, share in (("keep_tokens", keep_tokens), ("keep_pixels", keep_pixels)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} has to be in [0, 1]; got {share}")
    original = targets.similarity.double()
    image_kept = [original[:0]]
    for rows in targets.slices():
        heat_Nhw = upsample(targets.image_maps[rows], targets.image_size)
        shown_Nhw = _shown(heat_Nhw, keep_pixels, signed=targets.signed)
        image_kept.append(targets.similarity_of_images(rows, shown_Nhw, hidden_image).double())
    kept_NL = important_tokens(targets.text_maps, targets.content, keep_tokens, round_up=True)
    kept = {"image": torch.cat(image_kept), "text": targets.similarity_of_texts(kept_NL).double()}
    values = {"similarity": original}
    for modality, similarity in kept.items():
        values[f"{modality}_kept"] = similarity
        values |= _changes(modality, original, similarity)
    return values


def _shown(heat_Nhw: Tensor, keep_pixels: float | None, *, signed: bool) -> Tensor:
    """Share of each pixel that is kept, in [0, 1]."""
    if keep_pixels is not None:
        return important_pixels(heat_Nhw, keep_pixels).to(heat_Nhw)
    # What speaks against the caption is as little to be kept as what says nothing.
    return min_max(heat_Nhw.clamp(min=0) if signed else heat_Nhw)


def _changes(modality: str, original: Tensor, kept: Tensor) -> dict[str, Tensor]:
    increase = confidence_increase(original, kept).to(original).masked_fill(kept.isnan(), torch.nan)
    return {f"{modality}_drop": confidence_drop(original, kept), f"{modality}_increase": increase}


SPEC = MetricSpec(
    name="confidence",
    kind="caption",
    compute=confidence,
    values=(
        "similarity",
        "image_kept",
        "text_kept",
        "image_drop",
        "image_increase",
        "text_drop",
        "text_increase",
    ),
    scores=(
        Score(name="image_drop", value="image_drop", heading="image drop", better="down", percent=True),
        Score(name="image_increase", value="image_increase", heading="image increase", better="up", percent=True),
        Score(name="text_drop", value="text_drop", heading="text drop", better="down", percent=True),
        Score(name="text_increase", value="text_increase", heading="text increase", better="up", percent=True),
    ),
    title="Confidence",
    note="Drop and increase of the similarity of image and caption when only the important part of one is kept.",
    chart="bars",
)


class ConfidenceMetric(ScoreMetric):
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
        super().__init__(SPEC, **kwargs)

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
        original = original.double()
        values = _changes("image", original, image_kept.double()) | _changes("text", original, text_kept.double())
        super().update(**values)
