"""LeGrad: gradients by the attention of each block, of a similarity that is read after that block.

Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity" (2024).
With Z^l the tokens after block l and A^l its attention,

    s^l = cos(other, proj(ln_post(mean over tokens of Z^l))),
    E^l_p = mean over heads and queries of relu(d s^l / d A^l),

summed over blocks and scaled to [0, 1] over patches. A tower that ends in an attention pool is asked with that pool:
s^l is the similarity that it reads from Z^l, and A^l its attention.

Shape suffixes: B pairs, h heads, Q queries, T tokens run (keys), D hidden width, K embedding width.
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
from lightning_xai.heat_maps import min_max
from lightning_xai.models.encoder import TwoTowerEncoder


class LeGrad(AttentionMethod):
    """LeGrad of all blocks, or of those from one on.

    The mean runs over all tokens, CLS and registers included; these have no place in the map. No gradient runs further
    than through one block. The paper explains images; captions are explained by the same formula, with means over the
    tokens that the embedding can depend on, and zero but for the caption's own tokens. Each map is scaled to [0, 1].

    Args:
        encoder: the dual encoder to explain.
        start_layer: the first block of the sum; one number for both towers, or one for the image tower and one for the
            text tower. 0 is all of them, -1 the last alone. CLIP's ResNet has one attention, its pool's.
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: a tower whose attention cannot be seen.
        ValueError: no such layer.
    """

    has_zero = False

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
        maps = self._of_pool(seen, score) if seen.tower.pools else self._of_blocks(seen, score)
        total = seen.maps(maps)
        if seen.tokens is None:
            return min_max(total)
        own_BL = seen.tower.content(seen.tokens)
        low_B1 = total.masked_fill(~own_BL, torch.inf).amin(dim=1, keepdim=True)
        return min_max((total - low_B1).masked_fill(~own_BL, 0.0), dims=1)

    @staticmethod
    def _of_blocks(seen: TowerPass, score: Score) -> Tensor:
        """The sum over blocks [B, T]."""
        total_BT = None
        for block in seen.calls:
            attentions: list[Tensor] = []
            with AttentionReplaced(recording(attentions)):
                output_BTD = block.again()
            mean_BT = seen.visible(output_BTD.shape[1]).to(output_BTD)
            mean_BT = mean_BT / mean_BT.sum(dim=1, keepdim=True)
            embedding_BK = seen.embed_each(mean_BT[:, None] @ output_BTD)[:, 0]
            (gradient_BhQT,) = torch.autograd.grad(score(embedding_BK).sum(), attentions)
            # What a mask hides has no attention to change.
            seen_BhQT = gradient_BhQT.relu().where(attentions[0] > 0, 0.0)
            map_BT = (mean_BT[:, None] @ seen_BhQT.mean(dim=1))[:, 0]
            total_BT = map_BT if total_BT is None else total_BT + map_BT
        assert total_BT is not None, "a tower without blocks has a pool"
        return total_BT

    @staticmethod
    def _of_pool(seen: TowerPass, score: Score) -> Tensor:
        """The sum over what each block passes on to the pool [B, T]."""
        total_BT = None
        for hidden in [*(block.hidden for block in seen.calls[1:]), seen.output]:
            attentions: list[Tensor] = []
            with AttentionReplaced(recording(attentions)):
                embedding_BK = seen.embed(hidden)
            (gradient_BhQT,) = torch.autograd.grad(score(embedding_BK).sum(), attentions)
            map_BT = gradient_BhQT.relu().mean(dim=(1, 2))
            total_BT = map_BT if total_BT is None else total_BT + map_BT
        assert total_BT is not None, "the last block's output is among them"
        return total_BT
