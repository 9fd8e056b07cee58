"""MaskCLIP: every patch embedded by the way of the last attention's values (Zhou et al., ECCV 2022).

The last attention is left out: each patch gets the output projection of its own value, in place of a mixture of all,
and passes through the final layer norm and the projection. The map is its cosine similarity with the caption.

Shape suffixes: B pairs, T tokens run, K embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.attribution.attention import (
    AttentionMethod,
    AttentionReplaced,
    TowerPass,
    values,
)
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder


class MaskCLIP(AttentionMethod):
    """Cosine similarity of each patch with the caption, by the last attention's values.

    Maps are cosine similarities, in [-1, 1], with the sign as they are: larger is more alike. (The image-text
    similarity map, ITSM, is another one: of the tokens that the unchanged last block gives, whose similarities stand
    out where the object is not, so that others publish it with the opposite sign.)

    A tower that ends in an attention pool is read by the way of that pool's values, as the paper does it with CLIP's
    ResNet; both settings of `residual` are then the same. The paper explains images; the text map is of each token,
    by the same way, with the image, and zero but for the caption's own tokens.

    Args:
        encoder: the dual encoder to explain.
        residual: whether the last block's residual connection and MLP are kept, a variant that is published as well;
            False, the paper's formula, is the projected value alone.
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: a tower whose attention cannot be seen.
    """

    signed = True
    has_zero = False

    def __init__(
        self, encoder: TwoTowerEncoder, *, residual: bool = False, internal_batch_size: int | None = None
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self._residual = residual
        self._attend(-1, self._embeddings_of)

    @torch.no_grad()
    def _map(self, seen: TowerPass, own_BK: Tensor, score: Score) -> Tensor:
        return seen.maps(score.each(self._embeddings_of(seen)))

    def _embeddings_of(self, seen: TowerPass) -> Tensor:
        """Embeddings of all tokens [B, T, K]."""
        if seen.tower.pools:
            return seen.values_of_pool()
        last = seen.calls[-1]
        if not self._residual:
            return seen.embed_each(last.projected(values))
        with AttentionReplaced(values):
            return seen.embed_each(last.again())
