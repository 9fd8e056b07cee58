"""Integrated Gradients (Sundararajan et al., 2017) of the similarity, by pixels and by token embeddings.

Shape suffixes: B pairs, T tokens run, L tokens as given, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_xai.attribution.one_tower import Input, Mapped, OneTowerMethod
from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.attribution.path_integral import Rule, quadrature
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder

IntegrationRule = Literal["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
"""Quadrature rules by Captum's names."""
# Captum's own trapezoid has weights of sum (n - 1) / n (version 0.9), so that a part of every attribution is lost.
_RULES: dict[str, Rule] = {
    "gausslegendre": "gauss_legendre",
    "riemann_left": "left",
    "riemann_right": "right",
    "riemann_middle": "midpoint",
    "riemann_trapezoid": "trapezoid",
}


class IntegratedGradients(OneTowerMethod):
    """Gradients of the target, integrated along the straight path from a reference.

    `(x - r) * integral of ds/dx(r + alpha (x - r)) d alpha` ("Axiomatic Attribution for Deep Networks", Eq. 1), where x
    are pixels, summed over channels and patch, or token embeddings (with their positions), summed over their width.
    Signed. By completeness the image map sums to `s(image) - s(reference)`, with the caption held fixed; likewise the
    text map. The text's reference are the embeddings of a caption of padding, read at the caption's own end.

    `completeness_error` of a pair is the image map's sum minus that difference, or the text map's, whichever is
    larger in magnitude.

    Args:
        encoder: the model to explain.
        steps: integration points.
        rule: quadrature.
        image_reference: `"zeros"` (zero after normalisation) or `"black"` (black pixels).
        internal_batch_size: points of paths, of all pairs together, that pass through a tower at a time; None: all.

    Raises:
        ValueError: fewer steps than the rule needs, an unknown rule or reference, an unsupported tower.
    """

    signed = True

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        steps: int = 50,
        rule: IntegrationRule = "gausslegendre",
        image_reference: ImageReference = "zeros",
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        if rule not in get_args(IntegrationRule):
            raise ValueError(f"unknown quadrature rule {rule!r}; known: {', '.join(get_args(IntegrationRule))}")
        self._points, self._weights = quadrature(_RULES[rule], steps)
        reference_image(encoder, image_reference)
        self._patches = PatchGrid(self.grid)
        self._text = encoder.text_at_layer(0)
        self._image_reference = image_reference

    def _image_map(self, image: Input, score: Score) -> Mapped:
        def value(pixels: Tensor, rows: slice | Tensor) -> Tensor:
            return score[rows](self.encoder.encode_image(pixels))

        reference = reference_image(self.encoder, self._image_reference).expand_as(image.batch)
        gradients, error = self._integrate(value, image.batch, reference)
        return self._patches.sums(gradients.sum(dim=1)), error

    def _text_map(self, text: Input, score: Score) -> Mapped:
        tokens, length = text.batch, text.batch.shape[1]

        def value(hidden_BTD: Tensor, rows: slice | Tensor) -> Tensor:
            return score[rows](self._text.embed_from(hidden_BTD, tokens[rows]))

        padding_1L = self.encoder.tokenizer.padding_caption()[None, :length].to(tokens.device)
        with torch.no_grad():
            hidden_BTD = self._text.features_before(tokens)
            reference_1TD = self._text.features_before(padding_1L, length)[:, : hidden_BTD.shape[1]]
        gradients, error = self._integrate(value, hidden_BTD, reference_1TD.expand_as(hidden_BTD))
        # Tokens that the embedding cannot depend on have no gradient, so that their zeros need no mask.
        return self._text.on_caption(gradients.sum(dim=2), length), error

    def _integrate(
        self, value: Callable[[Tensor, slice | Tensor], Tensor], inputs: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Integrated gradients, in the inputs' shape, and what their sums [B] are off; `value` takes rows as well."""
        batch, delta, total = len(inputs), inputs - reference, torch.zeros_like(inputs)
        points, weights = self._points.to(inputs), self._weights.to(inputs)
        every = torch.arange(batch * len(points), device=inputs.device)
        for chunk in self._chunks(len(every)):
            row, point = every[chunk] % batch, every[chunk] // batch
            shape = (-1, *[1] * (inputs.ndim - 1))
            place = (reference[row] + points[point].reshape(shape) * delta[row]).requires_grad_()
            (gradient,) = torch.autograd.grad(value(place, row).sum(), place)
            total.index_add_(0, row, weights[point].reshape(shape) * gradient)
        gradients = total * delta
        with torch.no_grad():
            chunks = self._chunks(batch)
            changes = [value(inputs[rows], rows) - value(reference[rows], rows) for rows in chunks]
        return gradients, gradients.flatten(1).sum(dim=1) - torch.cat(changes)
