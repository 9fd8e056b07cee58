"""GradCAM (Selvaraju et al., 2017): the features that the similarity rises with, where they are active.

Shape suffixes: B pairs, T tokens run, L tokens as given, D hidden width (channels), H x W the grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_xai.attribution.one_tower import AtLayerMethod, Input, Mapped
from lightning_xai.attribution.score import Score
from lightning_xai.models.at_layer import TowerAtLayer
from lightning_xai.models.encoder import TwoTowerEncoder


class GradCAM(AtLayerMethod):
    """GradCAM of a layer's hidden states.

    Each feature is weighted by the mean of the target's gradient over all places; the map is the positive part of
    the weighted sum of features at each place ("Grad-CAM", Eqs. 1 and 2). For a transformer the places are the image
    tokens without CLS and registers; for text they are the tokens that the embedding can depend on, so that padding
    changes nothing.

    Args:
        encoder: the model to explain.
        image_layer: the layer whose input is used, counted as for `encoder.image_at_layer`. None: where the last
            feature maps enter the head, as in the paper, and for towers that pass on tokens the last block, since
            after it only what the head reads has a gradient.
        text_layer: likewise for the text tower; None: the last block.
        internal_batch_size: pairs at a time, None for all.

    Raises:
        ValueError: no such layer, a head that reads no patch, or an unsupported tower.
    """

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        image_layer: int | None = None,
        text_layer: int | None = None,
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self.image = _image_at_the_end(encoder) if image_layer is None else encoder.image_at_layer(image_layer)
        self.image.check_patches_read()
        self.grid = self.image.grid
        self.text = encoder.text_at_layer(-1 if text_layer is None else text_layer)

    def _image_map(self, image: Input, score: Score) -> Mapped:
        hidden: Tensor = image.seen
        if self.image.is_feature_map:
            return _grad_cam(hidden, lambda maps_BDHW: score(self.image.embed_from(maps_BDHW))), None
        prefix_BTD, patches_BTD = hidden.tensor_split([self.image.prefix_tokens], dim=1)

        def value(maps_BDT: Tensor) -> Tensor:
            return score(self.image.embed_from(torch.cat([prefix_BTD, maps_BDT.mT], dim=1)))

        maps_BT = _grad_cam(patches_BTD.mT, value)
        return self.image.on_grid(pad(maps_BT, (self.image.prefix_tokens, 0))), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        tokens, hidden_BTD = text.batch, text.seen
        visible_BL = self.text.visible(tokens)
        visible_BT1 = self.text.on_caption(visible_BL, hidden_BTD.shape[1]).unsqueeze(2)

        def value(maps_BDT: Tensor) -> Tensor:
            return score(self.text.embed_from(torch.where(visible_BT1, maps_BDT.mT, hidden_BTD), tokens))

        # The mean runs over all tokens of the batch, but only the visible ones have a gradient: they share it.
        maps_BT = _grad_cam(hidden_BTD.mT, value) * hidden_BTD.shape[1] / visible_BT1.sum(dim=1)
        return self.text.on_caption(maps_BT, tokens.shape[1]) * visible_BL, None


def _image_at_the_end(encoder: TwoTowerEncoder) -> TowerAtLayer:
    last = encoder.image_at_layer()
    # Of tokens after the last block only what the head reads has a gradient.
    return encoder.image_at_layer(last.layer + 1) if last.is_feature_map else last


def _grad_cam(features: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """GradCAM of features [B, D, ...] for the score [B] that they lead to: [B, ...], not negative."""
    leaf = features.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    weights = gradient.mean(dim=tuple(range(2, gradient.ndim)), keepdim=True)
    return (weights * leaf.detach()).sum(dim=1).relu()
