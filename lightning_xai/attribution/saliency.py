"""Saliency (Simonyan et al., 2014): how fast the similarity changes with each pixel and each token embedding.

Shape suffixes: B pairs, T tokens run, L tokens as given, D hidden width.
"""

from __future__ import annotations

import captum.attr
import torch
from torch import Tensor

from lightning_xai.attribution.one_tower import Input, Mapped, OneTowerMethod
from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder


class Saliency(OneTowerMethod):
    """Magnitude of the target's gradient, computed by Captum.

    Image: the absolute gradient by the pixels, of each pixel's channels the largest ("Deep Inside Convolutional
    Networks", section 3.1), averaged over each patch. Text: the Euclidean norm of the gradient by each token's
    embedding (with its position), since words have no gradient. Both are non-negative: how much a small
    change matters, not in which direction.

    Args:
        encoder: the model to explain.
        internal_batch_size: pairs at a time, None for all.

    Raises:
        ValueError: an unsupported tower.
    """

    def __init__(self, encoder: TwoTowerEncoder, *, internal_batch_size: int | None = None) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self._patches = PatchGrid(self.grid)
        self._text = encoder.text_at_layer(0)

    def _image_map(self, image: Input, score: Score) -> Mapped:
        # Another tensor, which requires gradients, so that Captum neither warns nor touches the caller's.
        leaf = image.batch.detach().requires_grad_()
        gradient: Tensor = captum.attr.Saliency(lambda x: score(self.encoder.encode_image(x))).attribute(leaf)
        return self._patches.means(gradient.amax(dim=1)), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        with torch.no_grad():
            hidden_BTD = self._text.features_before(text.batch)
        leaf = hidden_BTD.detach().requires_grad_()
        by_hidden = captum.attr.Saliency(lambda hidden: score(self._text.embed_from(hidden, text.batch)))
        gradient_BTD: Tensor = by_hidden.attribute(leaf)
        # Tokens that the embedding cannot depend on have no gradient, so that their zeros need no mask.
        return self._text.on_caption(gradient_BTD.norm(dim=2), text.batch.shape[1]), None
