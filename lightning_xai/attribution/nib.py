"""NIB: gradients of the similarity along the path from an empty hidden state (Zhu et al., ICLR 2025).

"Narrowing Information Bottleneck Theory for Multimodal Image-Text Representations Interpretability" narrows a layer's
hidden states x by one factor alpha, without noise, and adds up what the similarity gains as alpha goes from 0 to 1:

    a_p = sum_d x_pd * integral of d cos / d x_pd (alpha x) d alpha.

Shape suffixes: B pairs, N points, T tokens run (or positions of a feature map), L tokens as given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.attribution.one_tower import AtLayerMethod, Input, Mapped
from lightning_xai.attribution.path_integral import Rule, quadrature
from lightning_xai.attribution.score import Score
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer
from lightning_xai.models.encoder import TwoTowerEncoder


class NIB(AtLayerMethod):
    """Integrated gradients of the target from a zero hidden state at a block's input, in both towers.

    Signed, in units of the similarity: with the other embedding held fixed, the values of all tokens, CLS, registers
    and marks of start and end included, sum to the similarity less that of the zero state, where it has one.
    `completeness_error` of a pair is that sum less the difference, of the tower where it is larger in magnitude.

    Each image is explained with its own caption, never with others of the batch.

    Args:
        encoder: the dual encoder to explain.
        layer: the block whose *input* is narrowed, counted as open_clip counts its blocks (negative from the end); one
            number for both towers, or one for the image tower and one for the text tower. None for three quarters of
            the way up, 9 of 12 blocks counted from 0, and at least one block before the last, at whose input the
            patches of a tower that is read at CLS get next to nothing.
        steps: points of the path.
        rule: quadrature; see `quadrature`.
        internal_batch_size: points of paths, of all pairs together, that pass through a tower at a time; None: all.

    Raises:
        ValueError: no such layer, fewer steps than the rule needs, an unknown rule, an unsupported tower.
    """

    signed = True

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        layer: int | tuple[int | None, int | None] | None = None,
        steps: int = 10,
        rule: Rule = "right",
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self._points, self._weights = quadrature(rule, steps)
        image, text = layer if isinstance(layer, tuple) else (layer, layer)
        self.image = encoder.image_at_layer(_layer(image, encoder.image_at_layer()))
        self.text = encoder.text_at_layer(_layer(text, encoder.text_at_layer()))
        self.grid = self.image.grid

    def _image_map(self, image: Input, score: Score) -> Mapped:
        values_BT, error = self._narrowed(self.image, image, score, None)
        return self.image.on_grid(values_BT), error

    def _text_map(self, text: Input, score: Score) -> Mapped:
        values_BT, error = self._narrowed(self.text, text, score, text.batch)
        # Tokens that the embedding cannot depend on have no gradient, so that their zeros need no mask.
        return self.text.on_caption(values_BT, text.batch.shape[1]), error

    def _narrowed(
        self, tower: TowerAtLayer, given: Input, score: Score, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The values of one tower's tokens [B, T], and what their sums [B] are off."""
        hidden: Tensor = given.seen
        batch, points = len(hidden), self._points.to(hidden)
        weights = self._weights.to(hidden)
        total_BT = hidden.new_zeros(batch, tower.count(hidden))

        def value(alpha_NT: Tensor, row: Tensor) -> Tensor:
            own = None if tokens is None else tokens[row]
            path = tower.path(hidden[row], torch.zeros_like(hidden[row]), own)
            return score[row](path(alpha_NT[:, None])[:, 0])

        every = torch.arange(batch * len(points), device=hidden.device)
        for chunk in self._chunks(len(every)):
            row, point = every[chunk] % batch, every[chunk] // batch
            alpha_NT = points[point, None].repeat(1, total_BT.shape[1]).requires_grad_()
            (gradient_NT,) = torch.autograd.grad(value(alpha_NT, row).sum(), alpha_NT)
            total_BT.index_add_(0, row, weights[point, None] * gradient_NT)
        with torch.no_grad():
            starts = [value(torch.zeros_like(total_BT[rows]), every[:batch][rows]) for rows in self._chunks(batch)]
            change_B = score(given.embedding) - torch.cat(starts)
        return total_BT, total_BT.sum(dim=1) - change_B


def _layer(layer: int | None, last: TowerAtLayer | TextTowerAtLayer) -> int:
    """The number of the block whose input is narrowed (None: the default)."""
    blocks = last.layers
    return blocks[max(0, min(3 * len(blocks) // 4, len(blocks) - 2))] if layer is None else layer
