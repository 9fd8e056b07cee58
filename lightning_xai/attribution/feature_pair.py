"""Feature-pair attribution: which tokens of a caption and which patches of an image make their similarity (Eq. 10).

`A[s, p] = sum_k (sum_d (b - r_b)[s, d] J_b[k, s, d]) (sum_d (a - r_a)[p, d] J_a[k, p, d])`, with J the integrated
Jacobians of Eq. 9 at a layer's input. The inner sums factor, so that no Jacobian is ever built:

- the text side is one Jacobian-vector product for each selection of tokens: `u = J_b . ((b - r_b) * selection)`,
- the image side one vector-Jacobian product for each u: `A[p] = (a - r_a)[p] . (J_a^T u)[p]`.

Exact for any number of steps: it is the same finite sum, in another order. Shape suffixes: B pairs, S selections,
L tokens as given, T tokens run, P image tokens, K embedding width, H x W the patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_xai.attribution.base import Attribution
from lightning_xai.attribution.path_integral import Rule, embedding_at, integrated_jvp, integrated_vjp, quadrature
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.towers import Path, as_constant, differentiable


@dataclass(frozen=True)
class HiddenStates:
    """What enters the layers that are attributed to: made by a forward pass, or captured from one.

    Attributes:
        image: [B, P, D], or [B, C, H, W] for a ResNet.
        text: [B, T, D].
        text_pool: [B], the position each caption's embedding is read at.
    """

    image: Tensor
    text: Tensor
    text_pool: Tensor

    def __getitem__(self, rows: slice) -> HiddenStates:
        return HiddenStates(self.image[rows], self.text[rows], self.text_pool[rows])


@dataclass(frozen=True)
class References:
    """Hidden states of the two uninformative references, [1, ...] each; valid while the weights stay as they are."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class _Sides:
    """The two paths of a batch, and the embeddings at their ends."""

    image_path: Path
    text_path: Path
    image_BK: Tensor
    text_BK: Tensor
    batch: int
    image_tokens: int
    text_tokens: int

    def norms(self) -> Tensor:
        """Product of the embeddings' norms [B], by which attributions are divided, as constants."""
        norms: Tensor = self.image_BK.norm(dim=1) * self.text_BK.norm(dim=1)
        return norms


class FeaturePairAttribution:
    """Attributions between the tokens of a caption and the patches of an image (feature-pair paper, Eq. 10).

    Args:
        encoder: the dual encoder to explain.
        image_layer: the image tower's layer whose input is attributed to, counted as open_clip counts its blocks
            (-1: the last; a ResNet's stages are 1 to 4).
        text_layer: likewise for the text tower.
        steps: integration points N.
        rule: quadrature; the default is the paper's Riemann sum. Others need fewer steps for the same completeness.
        image_reference: `"zeros"` (zero after normalisation, as the authors' package has it), `"black"` (black pixels,
            as the paper writes), or an image [3, H, W] as the encoder takes it.
        text_reference: `"padding"` (BOS, one padding token, EOT, padding), or token ids [L].
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        ValueError: a layer that does not exist, fewer steps than the rule needs, a tower that cannot be split.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        image_layer: int = -1,
        text_layer: int = -1,
        steps: int = 10,
        *,
        rule: Rule = "right",
        image_reference: Literal["zeros", "black"] | Tensor = "zeros",
        text_reference: Literal["padding"] | Tensor = "padding",
        internal_batch_size: int | None = None,
    ) -> None:
        if internal_batch_size is not None and internal_batch_size < 1:
            raise ValueError(f"internal_batch_size has to be at least 1, or None; got {internal_batch_size}")
        self.encoder = encoder
        self.image = encoder.split_image(image_layer)
        self.text = encoder.split_text(text_layer)
        self._points, self._weights = quadrature(rule, steps)
        self._image_reference = image_reference
        self._text_reference = text_reference
        self._internal_batch_size = internal_batch_size

    def attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        """All pairs of tokens and patches.

        Args:
            images: [B, 3, H, W], as `encoder.image_transform` makes them.
            tokens: [B, L] token ids; caption i belongs to image i.

        Returns:
            `pairs` [B, L, H, W]: similarity units, signed, zero behind a caption's last token; with similarity and
            completeness error.
        """
        _check_batch(images, tokens)
        with self._differentiable():
            states, references = self.hidden_states(images, tokens), self.references(tokens.shape[1])
            parts = [self._pairs(states[rows], references) for rows in self._chunks(len(images))]
        matrix_BTP, similarity, error = (torch.cat(part) for part in zip(*parts, strict=True))
        behind = torch.arange(matrix_BTP.shape[1], device=tokens.device) > states.text_pool[:, None]
        matrix_BTP = matrix_BTP.masked_fill(behind[..., None], 0.0)
        padding = matrix_BTP.new_zeros(len(tokens), tokens.shape[1] - matrix_BTP.shape[1], matrix_BTP.shape[2])
        matrix_BLP = torch.cat([matrix_BTP, padding], dim=1)
        prefix = self.image.prefix_tokens
        return Attribution(
            pairs=matrix_BLP[:, :, prefix:].reshape(len(tokens), -1, *self.image.grid),
            prefix=matrix_BLP[:, :, :prefix].sum(dim=2),
            similarity=similarity,
            completeness_error=error,
        )

    def span_map(self, images: Tensor, tokens: Tensor, span_mask: Tensor) -> Tensor:
        """How much the tokens of a span, together, match each patch: the sum of their rows of `attribute`, far cheaper.

        Args:
            images: [B, 3, H, W].
            tokens: [B, L] token ids.
            span_mask: [B, L] bool, the tokens of the span.

        Returns:
            [B, H, W], signed, in units of the similarity.

        Raises:
            ValueError: shapes do not match, or a row selects no token of its caption.
        """
        _check_batch(images, tokens)
        if span_mask.shape != tokens.shape:
            raise ValueError(
                f"span_mask has to be of the tokens' shape {tuple(tokens.shape)}; got {tuple(span_mask.shape)}"
            )
        with self._differentiable():
            return self.span_map_of(self.hidden_states(images, tokens), span_mask, self.references(tokens.shape[1]))

    def span_map_of(self, states: HiddenStates, span_mask: Tensor, references: References) -> Tensor:
        """`span_map` of hidden states that a forward pass has already made; span_mask is [B, L], L >= T."""
        span_BT = span_mask[:, : states.text.shape[1]]
        positions = torch.arange(span_BT.shape[1], device=span_BT.device)
        empty = ~(span_BT & (positions <= states.text_pool[:, None])).any(dim=1)
        if empty.any():
            raise ValueError(f"rows {empty.nonzero()[:, 0].tolist()} of span_mask select no token of their caption")
        with self._differentiable():
            parts = [self._span_map(states[rows], span_BT[rows], references) for rows in self._chunks(len(span_BT))]
        return torch.cat(parts).reshape(-1, *self.image.grid)

    @torch.no_grad()
    def hidden_states(self, images: Tensor, tokens: Tensor) -> HiddenStates:
        """Run both stems: everything before the layers that are attributed to."""
        return HiddenStates(self.image.stem(images), self.text.stem(tokens), self.text.pool_positions(tokens))

    @torch.no_grad()
    def references(self, length: int | None = None) -> References:
        """Hidden states of both references; of the text's first `length` tokens (default: the context length)."""
        weight = next(self.encoder.parameters())
        length = length or self.encoder.tokenizer.context_length
        with self._differentiable(), torch.no_grad():
            image = self._reference_image().to(weight)
            tokens = self._reference_tokens(length).to(weight.device)
            return References(self.image.stem(image[None]), self.text.stem(tokens[None], length))

    def _reference_image(self) -> Tensor:
        height, width = self.encoder.image_transform.size
        if isinstance(self._image_reference, Tensor):
            if self._image_reference.shape != (3, height, width):
                shape = list(self._image_reference.shape)
                raise ValueError(f"image_reference has to be [3, {height}, {width}]; got {shape}")
            return self._image_reference
        if self._image_reference == "zeros":
            return torch.zeros(3, height, width)
        if self._image_reference == "black":
            transform = self.encoder.image_transform
            black = -torch.tensor(transform.mean) / torch.tensor(transform.std)
            return black[:, None, None].expand(3, height, width)
        raise ValueError(f"image_reference is 'zeros', 'black' or an image; got {self._image_reference!r}")

    def _reference_tokens(self, length: int) -> Tensor:
        if isinstance(self._text_reference, Tensor):
            if self._text_reference.ndim != 1 or len(self._text_reference) < length:
                raise ValueError(f"text_reference needs {length} token ids; got {list(self._text_reference.shape)}")
            return self._text_reference[:length]
        if self._text_reference != "padding":
            raise ValueError(f"text_reference is 'padding' or token ids; got {self._text_reference!r}")
        # A caption of one token gives the tokenizer's own BOS, EOT and padding, around the place for the padding token.
        context = self.encoder.tokenizer.encode(["a"])[0]
        reference = context.clone()
        reference[1] = context[-1]
        return reference[:length]

    def _chunks(self, batch: int) -> list[slice]:
        size = self._internal_batch_size or max(batch, 1)
        return [slice(start, start + size) for start in range(0, batch, size)]

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        with differentiable(self.encoder.model):
            yield

    def _sides(self, states: HiddenStates, references: References) -> _Sides:
        dtype = next(self.encoder.parameters()).dtype
        image, text, image_reference, text_reference = (
            as_constant(hidden).to(dtype) for hidden in (states.image, states.text, references.image, references.text)
        )
        image_path = self.image.path(image, image_reference)
        # The reference is read at the caption's own EOT, as all points of the path are; else Eq. 2 would not hold.
        text_path = self.text.path(text, text_reference[:, : text.shape[1]], states.text_pool)
        batch = len(image)
        image_tokens = self.image.prefix_tokens + self.image.grid[0] * self.image.grid[1]
        ends = [
            embedding_at(path, 1.0, batch, tokens, hidden)
            for path, tokens, hidden in ((image_path, image_tokens, image), (text_path, text.shape[1], text))
        ]
        return _Sides(image_path, text_path, ends[0], ends[1], batch, image_tokens, text.shape[1])

    def _matrix(self, sides: _Sides, selections_BST: Tensor) -> Tensor:
        """Attributions of each selection of tokens to all image tokens [B, S, P]."""
        with torch.no_grad():
            cotangents_BSK = integrated_jvp(sides.text_path, self._points, self._weights, selections_BST)
            cotangents_BSK = cotangents_BSK / sides.norms()[:, None, None]
        return integrated_vjp(sides.image_path, self._points, self._weights, cotangents_BSK, sides.image_tokens)

    def _span_map(self, states: HiddenStates, span_BT: Tensor, references: References) -> Tensor:
        sides = self._sides(states, references)
        selection = span_BT.to(sides.text_BK).unsqueeze(1)
        return self._matrix(sides, selection)[:, 0, self.image.prefix_tokens :]

    def _pairs(self, states: HiddenStates, references: References) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs [B, T, P], the similarity [B] and the completeness error [B]."""
        sides = self._sides(states, references)
        every_token = torch.eye(sides.text_tokens).to(sides.text_BK).expand(sides.batch, -1, -1)
        matrix_BTP = self._matrix(sides, every_token)
        image_zero = embedding_at(sides.image_path, 0.0, sides.batch, sides.image_tokens, sides.image_BK)
        text_zero = embedding_at(sides.text_path, 0.0, sides.batch, sides.text_tokens, sides.text_BK)
        # f(a,b) - f(r,b) - f(a,r) + f(r,r) of Eq. 2, factored.
        expected = ((sides.image_BK - image_zero) * (sides.text_BK - text_zero)).sum(dim=1) / sides.norms()
        similarity = (sides.image_BK * sides.text_BK).sum(dim=1) / sides.norms()
        return matrix_BTP, similarity, matrix_BTP.sum(dim=(1, 2)) - expected


def _check_batch(images: Tensor, tokens: Tensor) -> None:
    if images.ndim != 4 or tokens.ndim != 2 or len(images) != len(tokens):
        raise ValueError(
            "expected images [B, 3, H, W] and tokens [B, L], one caption an image; "
            f"got {list(images.shape)} and {list(tokens.shape)}"
        )
