"""Weighted Banzhaf interactions of patches and tokens, by a regression that factorises over both towers.

Shape suffixes: B pairs, N coalitions of patches, M of tokens, F players, L tokens, K embedding width, H x W the patch
grid. States of an input have rows R: the constant, one for each patch or token, and the whole input's own embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.attribution.base import InteractionAttribution, check_finite
from lightning_xai.attribution.coalitions import (
    Coalitions,
    ImageMasking,
    TextMasking,
    embed_without_tokens,
    masked_images,
)
from lightning_xai.attribution.pairwise import HiddenStates, PairwiseMethod, References, weighted
from lightning_xai.attribution.perturbation import forward_only, wide_dtype
from lightning_xai.attribution.score import Question
from lightning_xai.models.at_layer import differentiable
from lightning_xai.models.encoder import TwoTowerEncoder

__all__ = ["BanzhafAttribution", "BanzhafInteractions"]


@dataclass(frozen=True, kw_only=True)
class BanzhafAttribution(InteractionAttribution):
    """Banzhaf interactions, with the terms of lower order that a coalition's value is the sum of.

    Attributes:
        patches: [B, H, W], what each patch adds to the similarity with the caption of which nothing is said.
        tokens: [B, L], what each token adds to the similarity with the image of which nothing shows.
        constant: [B], the similarity of both.
    """

    patches: Tensor
    tokens: Tensor
    constant: Tensor

    def of_coalitions(self, shown: Tensor, said: Tensor) -> Tensor:
        """The fit at coalitions: the constant, and the terms of present patches, tokens and their pairs."""
        patches = torch.einsum("bnhw,bhw->bn", shown, self.patches.to(shown))
        tokens = torch.einsum("bnl,bl->bn", said, self.tokens.to(said))
        return super().of_coalitions(shown, said) + patches + tokens + self.constant.to(said)[:, None]


class BanzhafInteractions(PairwiseMethod):
    """How much a token and a patch add together to the similarity: weighted Banzhaf interactions, without gradients.

    Each patch and each token of the caption is present with probability p, independently of the others, and a
    coalition's value is the cosine similarity of the image and the caption of which it is left. The weighted
    least-squares fit of values by a constant, a term for each patch and each token and one for each pair of them
    (FIxLIP, Baniecki et al., NeurIPS 2025) has the interactions as coefficients of pairs. Values are inner products of
    unit embeddings, and the weights products of both sides', so that the fit is the product of a regression of
    embeddings on either side: `Phi = (A_img Z_img)(A_txt Z_txt)'`. No matrix of image by text coalitions is ever made,
    and an image is regressed once for all its captions.

    Where all coalitions of a side are no more than its samples, all are taken with their probabilities, and the side is
    exact; else they are drawn at random, the same ones for every input. With a few times as many samples as patches the
    interactions are off by tens of percent: compare seeds.

    No layer is chosen, and nothing is attributed to CLS. There is no sum that interactions have to give, so that
    `completeness_error` is None. Signed.

    Args:
        encoder: the model to explain.
        p: the probability that a patch or a token is present, between 0 and 1: small for what a part does nearly alone,
            large for what it does among all others.
        image_samples: coalitions of patches.
        text_samples: coalitions of tokens.
        masking: what absent patches show (`"zeros"` after normalisation, the `"mean"` colour of the image, or the image
            with a `"blur"`), and what becomes of absent tokens (`"padding"` in their place, or `"removed"` from the
            attention, with all positions kept). Start and end of a caption always stay.
        seed: of the draws.
        internal_batch_size: masked inputs that pass through a tower at a time; None: as many as there are samples.

    Raises:
        ValueError: p is not between 0 and 1, an unknown masking, fewer samples than unknowns, an unsupported tower.
    """

    signed = True
    stochastic = True

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        p: float = 0.5,
        image_samples: int = 2048,
        text_samples: int = 256,
        masking: tuple[ImageMasking, TextMasking] = ("zeros", "padding"),
        seed: int = 0,
        internal_batch_size: int | None = 64,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        self._image_masking, self._text_masking = masking
        for name, known in ((masking[0], get_args(ImageMasking)), (masking[1], get_args(TextMasking))):
            if name not in known:
                raise ValueError(f"masking is one of {', '.join(known)} there; got {name!r} in {masking}")
        self._p, self._text_samples, self._seed = p, text_samples, seed
        rows, columns = self.grid
        self._patches = Coalitions.draw(rows * columns, image_samples, p, seed)
        self._patch_fit = self._patches.regression("patches", "image_samples")
        self._token_fits: dict[int, tuple[Coalitions, Tensor]] = {}

    def _attribute(self, images: Tensor, tokens: Tensor) -> BanzhafAttribution:
        return self.attribute_states(self.hidden_states(images, tokens), self.references())

    def image_states(self, images: Tensor) -> Tensor:
        """Regressed unit embeddings: [B, 1 + H * W + 1, K]."""
        present_NHW = self._patches.present.reshape(-1, *self.grid)

        def embed(image: Tensor, rows: slice) -> Tensor:
            return self.encoder.encode_image(masked_images(self.encoder, image, present_NHW[rows], self._image_masking))

        with differentiable(self.encoder), forward_only():
            own_BK = torch.cat([self.encoder.encode_image(images[rows]) for rows in self._chunks(len(images))])
            fitted_BRK = torch.stack([self._fitted(self._patch_fit, embed, image) for image in images])
            return torch.cat([fitted_BRK, normalize(own_BK.to(fitted_BRK), dim=1).unsqueeze(1)], dim=1)

    def text_states(self, tokens: Tensor) -> Tensor:
        """Regressed unit embeddings: [B, 1 + L + 1, K], zero for tokens that are not the caption's own."""
        content_BL = self.encoder.tokenizer.content_mask(tokens)
        with differentiable(self.encoder), forward_only():
            return torch.stack([self._caption(*caption) for caption in zip(tokens, content_BL, strict=True)])

    def _caption(self, tokens_L: Tensor, content_L: Tensor) -> Tensor:
        coalitions, fit = self._token_fit(int(content_L.sum()))
        present_ML = (~content_L).repeat(len(coalitions.present), 1)
        present_ML[:, content_L] = coalitions.present.to(tokens_L.device)

        def embed(tokens_L: Tensor, rows: slice) -> Tensor:
            return embed_without_tokens(self.encoder, tokens_L, present_ML[rows], self._text_masking)

        fitted_RK = self._fitted(fit, embed, tokens_L)
        states_RK = fitted_RK.new_zeros(len(tokens_L) + 2, fitted_RK.shape[1])
        states_RK[0] = fitted_RK[0]
        states_RK[1:-1][content_L] = fitted_RK[1:]
        states_RK[-1] = normalize(self.encoder.encode_text(tokens_L[None])[0].to(fitted_RK), dim=0)
        return states_RK

    def _token_fit(self, players: int) -> tuple[Coalitions, Tensor]:
        if players not in self._token_fits:
            coalitions = Coalitions.draw(players, self._text_samples, self._p, self._seed)
            self._token_fits[players] = coalitions, coalitions.regression("tokens", "text_samples")
        return self._token_fits[players]

    def _fitted(self, fit_RN: Tensor, embed: Callable[[Tensor, slice], Tensor], item: Tensor) -> Tensor:
        """The regression of one input's unit embeddings [R, K], summed chunk by chunk."""
        total = None
        for rows in self._chunks(fit_RN.shape[1]):
            embeddings = embed(item, rows)
            unit = normalize(embeddings.to(wide_dtype(embeddings)), dim=1)
            part = fit_RN[:, rows].to(unit) @ unit
            total = part if total is None else total + part
        assert total is not None
        return total

    def _combined(self, found: Sequence[InteractionAttribution], question: Question) -> InteractionAttribution:
        """With the terms of lower order, in which all tokens of the other captions are present."""
        combined, terms = super()._combined(found, question), cast(Sequence[BanzhafAttribution], found)
        first, *rest = terms
        factors_BC = question.coefficients(torch.stack([each.similarity for each in found], dim=1))
        patches = [each.patches for each in terms]
        constant = [first.constant, *(each.constant + each.tokens.sum(dim=1) for each in rest)]
        return replace(
            cast(BanzhafAttribution, combined),
            patches=weighted(patches, factors_BC),
            tokens=factors_BC[:, :1] * first.tokens,
            constant=weighted(constant, factors_BC),
        )

    def attribute_states(self, states: HiddenStates, references: References) -> BanzhafAttribution:
        """The interactions: inner products of both sides' regressed embeddings.

        Raises:
            ValueError: a regression is not finite, since the model is not on some masked input.
        """
        phi_BLP = states.text[:, :-1] @ states.image[:, :-1].mT
        check_finite(phi_BLP, "regression", self.label)
        interactions = phi_BLP[:, 1:, 1:].reshape(*phi_BLP[:, 1:, 0].shape, *self.grid)
        return BanzhafAttribution(
            image=interactions.sum(dim=1),
            text=interactions.sum(dim=(2, 3)),
            similarity=(states.image[:, -1] * states.text[:, -1]).sum(dim=1),
            interactions=interactions,
            prefix=torch.zeros_like(phi_BLP[:, 1:, 0]),
            patches=phi_BLP[:, 0, 1:].reshape(-1, *self.grid),
            tokens=phi_BLP[:, 1:, 0],
            constant=phi_BLP[:, 0, 0],
        )

    def span_maps_of(
        self, states: HiddenStates, images: Tensor, captions: Tensor, span_masks: Tensor, references: References
    ) -> Tensor:
        """`span_map` of R spans, from the sum of their tokens' rows."""
        self._check_span(states.tokens[captions], span_masks)
        span_RK = torch.einsum("rl,rlk->rk", span_masks.to(states.text), states.text[captions, 1:-1])
        return torch.einsum("rk,rpk->rp", span_RK, states.image[images, 1:-1]).reshape(-1, *self.grid)
