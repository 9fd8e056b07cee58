"""Saliency (Simonyan et al., 2014): how fast the similarity changes with each pixel and each token embedding.

Shape suffixes: B pairs, T tokens run, L tokens as given, D hidden width, K embedding width.
"""

from __future__ import annotations

import captum.attr
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.base import Attribution, AttributionMethod
from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.models.encoder import TwoTowerEncoder


class Saliency(AttributionMethod):
    """Magnitude of the similarity's gradient, computed by Captum.

    Image: the absolute gradient by the pixels, of each pixel's channels the largest ("Deep Inside Convolutional
    Networks", section 3.1), averaged over each patch. Text: the Euclidean norm of the gradient by each token's
    embedding (with its position), since words have no gradient of their own. Both are non-negative and tell how much a
    small change matters, not in which direction.

    Args:
        encoder: the model to explain.
        internal_batch_size: pairs at a time, None for all.

    Raises:
        ValueError: a tower that cannot be split (patches and token embeddings are found by splits).
    """

    def __init__(self, encoder: TwoTowerEncoder, *, internal_batch_size: int | None = None) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self._patches = PatchGrid(self.grid)
        self._text = encoder.text_at_layer(0)

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        return Attribution.concatenate(
            [self._explain(images[rows], tokens[rows]) for rows in self._chunks(len(images))]
        )

    def _explain(self, images: Tensor, tokens: Tensor) -> Attribution:
        image_BK, text_BK = self._embeddings(images, tokens)
        with torch.no_grad():
            hidden_BTD = self._text.features_before(tokens)
        return Attribution(
            image=self._patches.means(self._image_gradient(images, text_BK).amax(dim=1)),
            # Tokens that the embedding cannot depend on have no gradient, so that their zeros need no mask.
            text=self._text.on_caption(self._text_gradient(hidden_BTD, image_BK, tokens).norm(dim=2), tokens.shape[1]),
            similarity=cosine_similarity(image_BK, text_BK),
        )

    def _image_gradient(self, images: Tensor, text_BK: Tensor) -> Tensor:
        def score(pixels: Tensor, text_BK: Tensor) -> Tensor:
            return cosine_similarity(self.encoder.encode_image(pixels), text_BK)

        # A tensor of its own that requires gradients, so that Captum neither warns nor touches the caller's.
        leaf = images.detach().requires_grad_()
        gradient: Tensor = captum.attr.Saliency(score).attribute(leaf, additional_forward_args=(text_BK,))
        return gradient

    def _text_gradient(self, hidden_BTD: Tensor, image_BK: Tensor, tokens: Tensor) -> Tensor:
        def score(hidden_BTD: Tensor, image_BK: Tensor, tokens: Tensor) -> Tensor:
            return cosine_similarity(self._text.embed_from(hidden_BTD, tokens), image_BK)

        leaf = hidden_BTD.detach().requires_grad_()
        gradient: Tensor = captum.attr.Saliency(score).attribute(leaf, additional_forward_args=(image_BK, tokens))
        return gradient
