"""Feature-pair attribution: the tokens of a caption and the patches of an image that make their similarity (Eq. 10).

`A[s, p] = sum_k (sum_d (b - r_b)[s, d] J_b[k, s, d]) (sum_d (a - r_a)[p, d] J_a[k, p, d])`, with J the integrated
Jacobians of Eq. 9 at a layer's input. The inner sums factor, so that no Jacobian is ever built:

- the text side is one Jacobian-vector product for each selection of tokens: `u = J_b . ((b - r_b) * selection)`,
- the image side one vector-Jacobian product for each u: `A[p] = (a - r_a)[p] . (J_a^T u)[p]`.

Exact for any number of steps: it is the same finite sum, in another order. Two inputs of one modality are compared in
the same way, with the same tower on both sides (section 3, intra-modal attributions).

Shape suffixes: B pairs, S selections,
L tokens as given, T tokens run, P image tokens, K embedding width, H x W the patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.base import InteractionAttribution, check_batch, check_finite
from lightning_xai.attribution.caption_rows import CaptionRows
from lightning_xai.attribution.pairwise import (
    Captured,
    HiddenStates,
    IntraModalAttribution,
    PairwiseMethod,
    References,
    capture,
)
from lightning_xai.attribution.path_integral import (
    Rule,
    embeddings_at,
    integrated_jvp,
    integrated_vjp,
    jvp_with_embedding,
    quadrature,
)
from lightning_xai.attribution.presets import Preset, preset_setting
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.attribution.score import Question
from lightning_xai.attribution.targets import SIMILARITY, Target
from lightning_xai.models.at_layer import (
    EmbeddingPath,
    PathWithDerivatives,
    TowerAtLayer,
    as_constant,
    differentiable,
    refuse_rewriting,
)
from lightning_xai.models.encoder import TwoTowerEncoder


@dataclass(frozen=True)
class FeaturePairs(InteractionAttribution):
    """An attribution to pairs of token and patch whose sum is known."""

    completeness_error: Tensor


@dataclass(frozen=True)
class _Side:
    """One input of each pair: its path from the reference, and the embeddings at the path's ends.

    `moving_T` are the tokens that differ from the reference's in any pair. At the inputs of the towers, the token that
    starts a caption and padding do not, and have no part in any attribution.
    """

    path: EmbeddingPath
    hidden: Tensor
    moving_T: Tensor
    known_BK: Tensor | None = None
    reference_BK: Tensor | None = None

    @classmethod
    def of(
        cls,
        tower: TowerAtLayer,
        hidden: Tensor,
        reference: Tensor,
        inputs: Tensor | None,
        dtype: torch.dtype,
        *,
        directions: int = 1,
        with_reference: bool = False,
        embedding_BK: Tensor | None = None,
    ) -> _Side:
        hidden, reference = as_constant(hidden).to(dtype), as_constant(reference).to(dtype)
        # The reference is read at the caption's own EOT, as all points of the path are; else Eq. 2 would not hold.
        path = tower.path(hidden, reference, inputs, directions)
        moving_T = (hidden != reference).any(dim=1 if tower.is_feature_map else 2).flatten(1).any(dim=0)
        if with_reference:
            ends = embeddings_at(path, (1.0, 0.0), len(hidden), len(moving_T), hidden)
            return cls(path, hidden, moving_T, *ends.unbind(dim=1))
        known = embedding_BK is not None and embedding_BK.dtype == dtype
        return cls(path, hidden, moving_T, embedding_BK if known else None)

    @cached_property
    def embedding(self) -> Tensor:
        """The embedding of the input [B, K]."""
        if self.known_BK is not None:
            return self.known_BK
        return embeddings_at(self.path, (1.0,), len(self.hidden), self.tokens, self.hidden)[:, 0]

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.moving_T)

    @property
    def norm(self) -> Tensor:
        """Norm of the embedding [B, 1, 1], by which attributions are divided, as a constant."""
        norms: Tensor = self.embedding.norm(dim=1)
        return norms[:, None, None]

    def every_token(self) -> Tensor:
        """[B, T, T]: each token alone as a selection."""
        return torch.eye(self.tokens).to(self.hidden).expand(len(self.hidden), -1, -1)

    def change(self) -> Tensor:
        """Difference of the embedding from the reference's [B, K], of a side that was made with its reference."""
        assert self.reference_BK is not None
        return self.embedding - self.reference_BK


class FeaturePairAttribution(PairwiseMethod):
    """Attributions between the tokens of a caption and the patches of an image (feature-pair paper, Eq. 10).

    Args:
        encoder: the dual encoder to explain, or a sentence encoder, for `attribute_texts` alone.
        image_layer: the image tower's layer whose input is attributed to, counted as open_clip counts its blocks
            (-1: the last; a ResNet's stages are 1 to 4; one more than the last is the head, where that pools patches).
            None: the preset's.
        text_layer: likewise for the text tower.
        steps: integration points N; None: the preset's.
        rule: quadrature; None: the preset's. The midpoint rule needs fewer steps than the paper's for the same
            completeness.
        preset: what holds for layers, steps and rule that you leave out. `"paper"`: the input of both last blocks and
            the right Riemann sum of 10 steps. `"fast"`: the layers that the embeddings are read from (the last block
            where one token is read, the head where tokens are pooled) and 5 midpoints. `"inputs"`: the inputs of both
            towers and 3 midpoints.
        image_reference: `"zeros"` (zero after normalisation, as the authors' package has it), `"black"` (black pixels,
            as the paper writes), `"features"` (zero hidden states), or an image [3, H, W] as the encoder takes it.
        text_reference: `"padding"` (BOS, one padding token, EOT, padding), `"features"`, or token ids [L].
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: an unsupported tower; `"inputs"` of a tower whose layers begin later.
        ValueError: a layer or preset that does not exist, a head that reads no patch, fewer steps than the rule needs.
    """

    signed = True
    intra_modal = True

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        encoder: TwoTowerEncoder,
        image_layer: int | None = None,
        text_layer: int | None = None,
        steps: int | None = None,
        *,
        rule: Rule | None = None,
        preset: Preset = "paper",
        image_reference: ImageReference | Literal["features"] | Tensor = "zeros",
        text_reference: Literal["padding", "features"] | Tensor = "padding",
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        refuse_rewriting(encoder)
        chosen = preset_setting(preset)
        self.preset = preset
        self.rule, self.steps = chosen.points(rule, steps)
        self._image_layer = image_layer
        self._text_layer = chosen.layer(encoder.text_at_layer()) if text_layer is None else text_layer
        self.text = encoder.text_at_layer(self._text_layer)
        self._points, self._weights = (as_constant(numbers) for numbers in quadrature(self.rule, self.steps))
        if encoder.has_image_tower:
            self.image.check_patches_read()
            self.grid = self.image.grid
        self._image_reference = image_reference
        self._text_reference = text_reference

    @property
    def resolved_options(self) -> dict[str, Any]:
        """The options that the preset holds for, with the values that are used."""
        layers = {"image_layer": self.image_layer, "text_layer": self._text_layer}
        return layers | {"steps": self.steps, "rule": self.rule, "preset": self.preset}

    @cached_property
    def image_layer(self) -> int:
        """The image layer that was given, or that the preset takes; -1 where there is no image tower."""
        if self._image_layer is not None:
            return self._image_layer
        return preset_setting(self.preset).layer(self.encoder.image_at_layer()) if self.encoder.has_image_tower else -1

    @cached_property
    def image(self) -> TowerAtLayer:
        """The image tower at its layer."""
        return self.encoder.image_at_layer(self.image_layer)

    def attribute(self, images: Tensor, tokens: Tensor, target: Target = SIMILARITY) -> FeaturePairs:
        """All pairs of tokens and patches; see `AttributionMethod.attribute`."""
        result = super().attribute(images, tokens, target)
        assert isinstance(result, FeaturePairs)
        return result

    def _compared(self, images: Tensor, question: Question) -> tuple[FeaturePairs, Tensor]:
        """The attribution from what the model's own pass has computed of the images, and the similarity it gives."""
        tokens, results, own = question.tokens, list[FeaturePairs](), []
        references = self.references(tokens.shape[1])
        for rows in self._chunks(len(images)):
            with self.capturing() as captured:
                own.append(self.encoder.own_similarity(images[rows], tokens[rows]))
            states = self.hidden_states(images[rows], tokens[rows], captured)
            if question.is_similarity:
                results.append(self.attribute_states(states, references))
            else:
                results.append(cast(FeaturePairs, self._to_target(states.image, question[rows])))
        return FeaturePairs.concatenate(results), torch.cat(own)

    def _attribute(self, images: Tensor, tokens: Tensor) -> FeaturePairs:
        return self._compared(images, Question.of(SIMILARITY, self.encoder, tokens))[0]

    def image_map(self, images: Tensor, tokens: Tensor, target: Target = SIMILARITY) -> Tensor:
        """The image map of `attribute` alone, [B, H, W].

        It costs what a span map costs, and a Jacobian-vector product through the text tail for each other caption:
        what all captions make of the image is one direction of its embedding.
        """
        check_batch(images, tokens)
        self._check_images(images)
        self._check_target(target)
        with differentiable(self.encoder):
            question = Question.of(target, self.encoder, tokens)
            maps = [self._image_map(images[rows], question[rows]) for rows in self._chunks(len(images))]
        check_finite(torch.cat(maps), "image map", self.label)
        return torch.cat(maps)

    def _image_map(self, images: Tensor, question: Question) -> Tensor:
        image = _Side.of(self.image, self.image_states(images), self._image_reference_states(), None, self._dtype)
        changes, texts = [], []
        for tokens in question.captions:
            hidden = self.text_states(tokens)
            reference = self._text_reference_states(tokens.shape[1])[:, : hidden.shape[1]]
            text = _Side.of(self.text, hidden, reference, tokens, self._dtype)
            visible_B1L = self.text.visible(tokens).to(text.hidden).unsqueeze(1)
            change_B1K, embedding_BK = self._change(text, self.text.on_caption(visible_B1L, text.tokens))
            changes.append(change_B1K)
            texts.append(embedding_BK)
        texts_BCK = torch.stack(texts, dim=1)
        factors_BC = question.coefficients(cosine_similarity(image.embedding[:, None], texts_BCK, dim=2))
        # Norms are constants, as everywhere.
        factors_BC = factors_BC / (image.embedding.norm(dim=1, keepdim=True) * texts_BCK.norm(dim=2))
        direction_B1K = torch.einsum("bc,bcsk->bsk", factors_BC, torch.stack(changes, dim=1))
        matrix_B1P = integrated_vjp(image.path, self._points, self._weights, direction_B1K, image.tokens)
        return self.image.on_grid(matrix_B1P)[:, 0]

    def attribute_states(self, states: HiddenStates, references: References) -> FeaturePairs:
        """`attribute` of hidden states that a forward pass has already made."""
        with differentiable(self.encoder):
            return self._interactions(states, references)

    def attribute_images(
        self, images: Tensor, others: Tensor, by: FeaturePairAttribution | None = None
    ) -> IntraModalAttribution:
        """All pairs of patches of two images, by the image tower alone.

        Args:
            images: [B, 3, height, width].
            others: [B, 3, height, width]; other i is compared with image i.
            by: the method of an encoder that ends in the same space, if that is what the others are inputs of, such as
                sounds. Its layer and reference are taken for them, this method's steps and rule for both.
        """
        by = by or self
        self._check_image_pair(images, others, by)

        def side(method: FeaturePairAttribution, batch: Tensor, reference: Tensor) -> _Side:
            hidden = method.image_states(batch)
            patches = method.image.count(hidden)
            return _Side.of(
                method.image, hidden, reference, None, method._dtype, directions=patches, with_reference=True
            )

        with differentiable(self.encoder), differentiable(by.encoder):
            reference, other_reference = self._image_reference_states(), by._image_reference_states()
            parts = []
            for rows in self._chunks(len(images)):
                first = side(self, images[rows], reference)
                second = side(by, others[rows], other_reference)
                parts.append(self._compare(first, second, first.every_token()))
        matrix_BPP, similarity, error = (torch.cat(part) for part in zip(*parts, strict=True))
        first_last = by.image.on_grid(matrix_BPP).movedim(1, -1)
        interactions = self.image.on_grid(first_last).movedim((1, 2), (3, 4))
        check_finite(interactions, "attribution", self.label)
        return IntraModalAttribution(interactions, similarity, error)

    def attribute_texts(self, tokens: Tensor, others: Tensor) -> IntraModalAttribution:
        """All pairs of tokens of two captions, by the text tower alone.

        Args:
            tokens: [B, L] token ids.
            others: [B, L]; other i is compared with caption i.
        """
        if tokens.ndim != 2 or tokens.shape != others.shape or not len(tokens):
            raise ValueError(f"expected two batches of captions of one shape; got {[*tokens.shape]}, {[*others.shape]}")

        def side(rows: slice, batch: Tensor) -> _Side:
            hidden = self.text_states(batch[rows])
            start = reference[:, : hidden.shape[1]]
            return _Side.of(self.text, hidden, start, batch[rows], self._dtype, directions=length, with_reference=True)

        def compare(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            first, second = side(rows, tokens), side(rows, others)
            firsts, seconds = self._rows(tokens[rows], first.tokens), self._rows(others[rows], second.tokens)
            selections_BST, others_BST = firsts.selections(first.hidden), seconds.selections(first.hidden)
            matrix_BST, similarity, error = self._compare(first, second, selections_BST)
            # The second caption's padding shares its sum as the first one's does.
            matrix_BTS = firsts.spread(matrix_BST @ others_BST.mT)
            matrix_BTL = self.text.on_caption(seconds.spread(matrix_BTS.mT), length)
            return self.text.on_caption(matrix_BTL.mT, length), similarity, error

        length = tokens.shape[1]
        with differentiable(self.encoder):
            reference = self._text_reference_states(length)
            parts = [compare(rows) for rows in self._chunks(len(tokens))]
        matrix_BLL, similarity, error = (torch.cat(part) for part in zip(*parts, strict=True))
        check_finite(matrix_BLL, "attribution", self.label)
        return IntraModalAttribution(matrix_BLL, similarity, error)

    def span_maps_of(
        self, states: HiddenStates, images: Tensor, captions: Tensor, span_masks: Tensor, references: References
    ) -> Tensor:
        """`span_map` of R spans; those of one caption share its path, those of one image the image's."""
        if not len(images):
            return states.image.new_zeros(0, *self.grid, dtype=self._dtype)
        self._check_span(states.tokens[captions], span_masks)
        order = torch.argsort(images, stable=True)
        parts = []
        with differentiable(self.encoder):
            for rows in (order[chunk] for chunk in self._chunks(len(order))):
                changes_RK = self._span_changes(states, captions[rows], span_masks[rows], references)
                parts.append((rows, self._span_maps(states, images[rows], changes_RK, references)))
        return _put_back(parts)

    def capturing(self) -> AbstractContextManager[Captured]:
        """Inside, keep what enters the layers that are attributed to, in the model's own forward passes."""
        return capture(self.image, self.text)

    def hidden_states(self, images: Tensor, tokens: Tensor, captured: Captured | None = None) -> HiddenStates:
        """As for every pairwise method; of captions only the tokens that are needed, where a model's pass ran more."""
        self._check_length(tokens)
        states = super().hidden_states(images, tokens, captured)
        return replace(states, text=states.text[:, : self.text.needed(tokens)])

    @torch.no_grad()
    def image_states(self, images: Tensor) -> Tensor:
        """Hidden states at the image layer: [B, P, D], or [B, C, H, W] for feature maps."""
        return self.image.features_before(images)

    @torch.no_grad()
    def text_states(self, tokens: Tensor) -> Tensor:
        """Hidden states at the text layer: [B, T, D].

        Raises:
            ValueError: captions without their padding, of a tower that reads it.
        """
        self._check_length(tokens)
        return self.text.features_before(tokens)

    def _check_length(self, tokens: Tensor) -> None:
        length, whole = tokens.shape[1], self.encoder.tokenizer.context_length
        if length < whole and self.text.needed(tokens) is None:
            raise ValueError(
                f"this text tower reads all {whole} positions of a caption, padding included; got captions of {length} "
                "tokens: pass them as encoder.tokenizer.encode returns them"
            )

    def references(self, length: int | None = None) -> References:
        """Hidden states of both references; of the text's first `length` tokens (default: the context length)."""
        with differentiable(self.encoder):
            text = self._text_reference_states(length or self.encoder.tokenizer.context_length)
            return References(self._image_reference_states(), text)

    @torch.no_grad()
    def _image_reference_states(self) -> Tensor:
        weight = next(self.encoder.parameters())
        image = self.image.features_before(self._reference_image().to(weight)[None])
        return torch.zeros_like(image) if self._is(self._image_reference, "features") else image

    @torch.no_grad()
    def _text_reference_states(self, length: int) -> Tensor:
        device = next(self.encoder.parameters()).device
        text = self.text.features_before(self._reference_tokens(length).to(device)[None], length)
        return torch.zeros_like(text) if self._is(self._text_reference, "features") else text

    def _visible(self, tokens: Tensor) -> Tensor:
        return self.text.visible(tokens)

    @staticmethod
    def _is(reference: str | Tensor, kind: str) -> bool:
        return isinstance(reference, str) and reference == kind

    def _reference_image(self) -> Tensor:
        shape = self.encoder.image_shape
        if isinstance(self._image_reference, Tensor):
            if self._image_reference.shape != shape:
                raise ValueError(f"image_reference has to be {[*shape]}; got {[*self._image_reference.shape]}")
            return self._image_reference
        if self._image_reference == "features":
            return torch.zeros(shape)
        if self._image_reference in ("zeros", "black"):
            return reference_image(self.encoder, self._image_reference)
        raise ValueError(f"image_reference is 'zeros', 'black', 'features' or an image; got {self._image_reference!r}")

    def _reference_tokens(self, length: int) -> Tensor:
        if isinstance(self._text_reference, Tensor):
            if self._text_reference.ndim != 1 or len(self._text_reference) < length:
                raise ValueError(f"text_reference needs {length} token ids; got {list(self._text_reference.shape)}")
            return self._text_reference[:length]
        if self._text_reference not in ("padding", "features"):
            raise ValueError(f"text_reference is 'padding', 'features' or token ids; got {self._text_reference!r}")
        return self.encoder.tokenizer.padding_caption()[:length]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def _text_side(
        self,
        states: HiddenStates,
        references: References,
        captions: Tensor | slice,
        directions: int,
        *,
        with_reference: bool = False,
    ) -> _Side:
        hidden, tokens = states.text[captions], states.tokens[captions]
        start = references.text[:, : hidden.shape[1]]
        return _Side.of(
            self.text, hidden, start, tokens, self._dtype, directions=directions, with_reference=with_reference
        )

    @torch.no_grad()
    def _change(self, side: _Side, selections_BST: Tensor) -> tuple[Tensor, Tensor]:
        """Change of the embedding by each selection of tokens [B, S, K], and the embedding [B, K]."""
        if side.known_BK is None and isinstance(side.path, PathWithDerivatives):
            return jvp_with_embedding(side.path, self._points, self._weights, selections_BST)
        return integrated_jvp(side.path, self._points, self._weights, selections_BST), side.embedding

    def _changes(self, side: _Side, selections_BST: Tensor) -> Tensor:
        """Change of the unit embedding by each selection of tokens [B, S, K]; the norm counts as a constant."""
        change_BSK, embedding_BK = self._change(side, selections_BST)
        norms: Tensor = embedding_BK.norm(dim=1)
        return change_BSK / norms[:, None, None]

    def _columns(self, side: _Side, changes_BSK: Tensor) -> Tensor:
        """What each token adds to the products of the unit embedding with changes of the other one [B, S, T]."""
        return integrated_vjp(side.path, self._points, self._weights, changes_BSK / side.norm, side.tokens)

    def _span_changes(
        self, states: HiddenStates, captions_R: Tensor, span_masks_RL: Tensor, references: References
    ) -> Tensor:
        """Change of each caption's embedding by the tokens of a span [R, K]."""
        parts = []
        for captions_G, rows_GS in _by_owner(captions_R):
            side = self._text_side(states, references, captions_G, rows_GS.shape[1])
            selections_GST = self.text.on_caption(span_masks_RL[rows_GS].to(side.hidden), side.tokens)
            parts.append((rows_GS, self._changes(side, selections_GST)))
        return _put_back(parts)

    def _span_maps(self, states: HiddenStates, images_R: Tensor, changes_RK: Tensor, references: References) -> Tensor:
        """What each patch of an image adds to the product with a change of a caption's embedding [R, H, W]."""
        parts = []
        for images_G, rows_GS in _by_owner(images_R):
            own = None if states.image_embeddings is None else states.image_embeddings[images_G]
            hidden = states.image[images_G]
            side = _Side.of(
                self.image,
                hidden,
                references.image,
                None,
                self._dtype,
                directions=rows_GS.shape[1],
                embedding_BK=own,
            )
            parts.append((rows_GS, self.image.on_grid(self._columns(side, changes_RK[rows_GS]))))
        return _put_back(parts)

    def _rows(self, tokens: Tensor, run: int) -> CaptionRows:
        """The selections of the tokens of captions, of which so many are run."""
        return CaptionRows.of(self.text, self.encoder.tokenizer, tokens, run)

    def _compare(self, rows: _Side, columns: _Side, selections_BST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs of selections and tokens [B, S, P], the similarity [B] and the completeness error [B]."""
        matrix_BSP = selections_BST.new_zeros(*selections_BST.shape[:2], columns.tokens)
        moving_S = (selections_BST[:, :, rows.moving_T] != 0).any(dim=2).any(dim=0)
        if moving_S.any():
            matrix_BSP[:, moving_S] = self._columns(columns, self._changes(rows, selections_BST[:, moving_S]))
        norms: Tensor = (rows.norm * columns.norm)[:, 0, 0]
        similarity = (rows.embedding * columns.embedding).sum(dim=1) / norms
        # f(a,b) - f(r,b) - f(a,r) + f(r,r) of Eq. 2, factored.
        expected = (rows.change() * columns.change()).sum(dim=1) / norms
        return matrix_BSP, similarity, matrix_BSP.sum(dim=(1, 2)) - expected

    def _interactions(self, states: HiddenStates, references: References) -> FeaturePairs:
        every, tokens, prefix = slice(None), states.tokens, self.image.prefix_tokens
        rows = self._rows(tokens, states.text.shape[1])
        selections_BST = rows.selections(states.text)
        count = selections_BST.shape[1]
        text = self._text_side(states, references, every, count, with_reference=True)
        image = _Side.of(
            self.image, states.image, references.image, None, self._dtype, directions=count, with_reference=True
        )
        matrix_BSP, similarity, error = self._compare(text, image, selections_BST.to(text.hidden))
        matrix_BPL = self.text.on_caption(rows.spread(matrix_BSP).mT, tokens.shape[1])
        interactions = self.image.on_grid(matrix_BPL.mT)
        return FeaturePairs(
            image=interactions.sum(dim=1),
            text=interactions.sum(dim=(2, 3)),
            similarity=similarity,
            interactions=interactions,
            prefix=matrix_BPL[:, :prefix].sum(dim=1),
            completeness_error=error,
        )


def _by_owner(owners_R: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Owners [G] that have the same number S of rows, and their rows [G, S], for each such number."""
    order = torch.argsort(owners_R, stable=True)
    owners, counts = torch.unique_consecutive(owners_R[order], return_counts=True)
    firsts = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        found = counts == count
        yield owners[found], order[firsts[found][:, None] + torch.arange(count, device=order.device)]


def _put_back(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Values [R, ...] in the order of their rows, from parts of both: rows [G] or [G, S], values [*rows, ...]."""
    rows = torch.cat([rows.flatten() for rows, _ in parts])
    return torch.cat([values.flatten(0, rows.ndim - 1) for rows, values in parts])[torch.argsort(rows)]


class SimilarityGradCAM(FeaturePairAttribution):
    """GradCAM for similarity: gradient times input at one point, a rough estimate (feature-pair paper, Eq. 16).

    The same as `FeaturePairAttribution` with N = 1 and zero hidden states as references.

    A transformer's block normalises each token first, so that scaling a token changes nothing but its own residual: at
    the input of the last block, of which one position is read, gradient times input is zero for all other tokens,
    whatever the model has learned. Transformers are therefore attributed to one block earlier.

    Args:
        encoder: the dual encoder to explain.
        image_layer: as for `FeaturePairAttribution`; None for the last stage of a convolutional tower, and the block
            before the last one of a transformer.
        text_layer: as for `FeaturePairAttribution`; None for the block before the last one.
        internal_batch_size: pairs computed at a time, None for all.
    """

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        image_layer: int | None = None,
        text_layer: int | None = None,
        *,
        internal_batch_size: int | None = None,
    ) -> None:
        if image_layer is None:
            image_layer = _before_the_last(encoder.image_at_layer()) if encoder.has_image_tower else -1
        super().__init__(
            encoder,
            image_layer,
            _before_the_last(encoder.text_at_layer()) if text_layer is None else text_layer,
            steps=1,
            rule="right",
            image_reference="features",
            text_reference="features",
            internal_batch_size=internal_batch_size,
        )

    @property
    def resolved_options(self) -> dict[str, Any]:
        """None: there are no presets of this method."""
        return {}


def _before_the_last(last: TowerAtLayer) -> int:
    return last.layer if last.is_feature_map else max(last.layer - 1, 0)
