"""Attention rollout: the attention of all blocks, multiplied (Abnar and Zuidema, ACL 2020).

With A^l the attention of block l, averaged over heads, and half of each token passed on by the residual connection,

    R <- (0.5 A^l + 0.5 I) R,      R = I before the first block,

and the map is the row of R that the embedding is read from. It is taken from the last factor on: a row times a matrix.

Shape suffixes: B pairs, h heads, Q queries, T tokens run (keys), K embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.attribution.attention import (
    AttentionMethod,
    AttentionReplaced,
    TowerPass,
    recording,
)
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder


class AttentionRollout(AttentionMethod):
    """Attention rollout of both towers: the same image map for every caption, the same text map for every image.

    The row is that of the token that the embedding is read from (CLS, the end of text), or the mean row of those that
    are averaged; the attention of a pool is one more step without residual connection, since its query is no token.
    Maps are shares in [0, 1]. CLS and registers, marks of start and end, and padding have their share, but no place.

    Args:
        encoder: the dual encoder to explain.
        start_layer: the first block of the product; one number for both towers, or one for the image tower and one for
            the text tower. 0, the paper's, is all of them.
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: a tower whose attention cannot be seen.
        ValueError: no such layer.
    """

    explains = "similarity"  # maps that ignore the captions cannot distinguish them

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        start_layer: int | tuple[int, int] = 0,
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self._attend(start_layer)

    def _map(self, seen: TowerPass, own_BK: Tensor, score: Score) -> Tensor:
        row = seen.read()
        with torch.no_grad():
            attentions: list[Tensor] = []
            with AttentionReplaced(recording(attentions)):
                for block in seen.calls:
                    block.again()
                seen.embed(seen.output)
            for number in reversed(range(len(attentions))):
                passed_BT = (row[:, None] @ attentions[number].mean(dim=1))[:, 0]
                # A pool's query is no token, and has no residual connection to one.
                row = passed_BT if number >= len(seen.calls) else (passed_BT + row) / 2
            return seen.maps(row)
