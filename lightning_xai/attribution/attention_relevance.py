"""Attention relevance: attention weighted by its gradient, carried through the blocks of both towers.

Chefer, Gur and Wolf, "Generic Attention-Model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers" (2021), Eqs. 5 and 6, as their CLIP notebook applies them: from R = I, each block adds

    R <- R + mean_h(relu(A * d logit / dA)) R,      logit = exp(logit_scale) * cosine,

and the map is the row of R that the embedding is read from. No other row is needed, so the product is taken from its
last factor: one row times a matrix for each block, never a matrix times a matrix.

Shape suffixes: B pairs, h heads, Q queries, T tokens run (keys), L caption tokens as given, e width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_xai.attribution.attention import AttentionReplaced, recording, refuse_head
from lightning_xai.attribution.one_tower import Input, Mapped, OneTowerMethod
from lightning_xai.attribution.score import Score
from lightning_xai.models.at_layer import TowerAtLayer, UnsupportedTowerError, differentiable
from lightning_xai.models.encoder import TwoTowerEncoder

_At = TypeVar("_At", bound=TowerAtLayer)


class AttentionRelevance(OneTowerMethod):
    """Relevance of patches and tokens by attention times its gradient (Chefer et al. 2021, Eqs. 5 and 6).

    The image map is the row of R of the position that the embedding is read from (CLS), without CLS and registers;
    where a tower averages, the mean row of the tokens that it averages. The pooling attention of a tower that has one
    (SigLIP, CoCa) is one more step: its query is no token, so `R <- mean_h(relu(A * dA)) R`, and the
    query's row is read. The text map is the row of the token that is read (end of text, CLS, the last), zero for the
    marks of start and end and for padding. Maps are not negative and larger is more; they have no unit.

    Args:
        encoder: the dual encoder to explain; both towers have to be transformers.
        start_layer: the first block of the product, in both towers. -1, as in the notebook, is the last block alone;
            0 is all of them, for which gradients run through the whole towers.
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: a tower without self-attention over one sequence of tokens (ResNet, ConvNeXt, Swin), or
            whose blocks do not call PyTorch's `scaled_dot_product_attention` once each.
        ValueError: no such layer.
    """

    def __init__(
        self, encoder: TwoTowerEncoder, *, start_layer: int = -1, internal_batch_size: int | None = None
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        image = encoder.image_at_layer(start_layer)
        refuse_head(image, "image")
        text = encoder.text_at_layer(start_layer)
        refuse_head(text, "text")
        self.grid = image.grid
        self._image = _Tower("image", image, encoder.image_at_layer(-1))
        self._text = _Tower("text", text, encoder.text_at_layer(-1))
        weight = next(encoder.parameters())
        with differentiable(encoder):
            # Refuse what cannot be served now, not after an hour of other methods.
            self._image.run(weight.new_zeros(1, *encoder.image_shape))
            self._text.run(encoder.tokenizer.padding_caption()[None].to(weight.device))

    def _read_image(self, images: Tensor) -> Input:
        forward = self._image.run(images)
        return Input(images, forward.embedding_BK.detach(), forward)

    def _read_text(self, tokens: Tensor) -> Input:
        forward = self._text.run(tokens)
        return Input(tokens, forward.embedding_BK.detach(), forward)

    def _image_map(self, image: Input, score: Score) -> Mapped:
        return self._image.first.on_grid(self._relevance(self._image, image.seen, score)), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        own = self.encoder.tokenizer.content_mask(text.batch)
        relevance_BT = self._relevance(self._text, text.seen, score)
        return self._text.first.on_caption(relevance_BT, text.batch.shape[1]) * own, None

    def _relevance(self, tower: _Tower[Any], forward: _Forward, score: Score) -> Tensor:
        # Similarities are taken as logits, and a target that is linear in them likewise.
        factor = score.pair.scale if score.target.linear else 1.0
        # Attentions of different pairs do not meet, so one backward pass of the sum serves the whole batch.
        value = (factor * score(forward.embedding_BK)).sum()
        return tower.relevance(forward, torch.autograd.grad(value, forward.attentions))


@dataclass(frozen=True)
class _Forward:
    """The results of a tower's forward pass that its relevance needs.

    Attributes:
        inputs: images or token ids.
        hidden_BTD: the input of the first block of the product.
        embedding_BK: with its graph back to `attentions`.
        attentions: probabilities [B, h, Q, T] of each attention that ran, in order; nodes of the graph.
    """

    inputs: Tensor
    hidden_BTD: Tensor
    embedding_BK: Tensor
    attentions: list[Tensor]


class _Tower(Generic[_At]):
    """One tower at the first block of the product, and at its last block."""

    def __init__(self, name: str, first: _At, last: TowerAtLayer) -> None:
        self._name, self.first, self._last = name, first, last
        self._blocks = last.layer - first.layer + 1

    def run(self, inputs: Tensor) -> _Forward:
        """The embeddings of images or token ids, with the graph that relevance needs, and none before.

        Raises:
            UnsupportedTowerError: its blocks do not attend over one sequence of tokens, or not so that it can be seen.
        """
        with torch.no_grad():
            hidden = self.first.features_before(inputs)
        if hidden.ndim == 4:
            raise self._unsupported("passes on feature maps, without self-attention over one sequence of tokens")
        attentions: list[Tensor] = []
        # What attends after the last block is a pool. A last block that is not called as a whole has none after it.
        in_blocks: list[int] = []
        assert self._last.block is not None, "only feature maps have a head without a module"
        handle = self._last.block.register_forward_hook(lambda *_: in_blocks.append(len(attentions)))
        try:
            with AttentionReplaced(recording(attentions)):
                embedding_BK = self.first.embed_from(hidden, inputs)
        finally:
            handle.remove()
        if (in_blocks or [len(attentions)]) != [self._blocks]:
            raise self._unsupported(
                "does not call scaled_dot_product_attention, whose probabilities are needed, once in each block"
            )
        if any(attention.shape[3] != hidden.shape[1] for attention in attentions[: self._blocks]):
            raise self._unsupported("attends to learned keys that are no tokens (add_bias_kv)")
        return _Forward(inputs, hidden, embedding_BK, attentions)

    def relevance(self, forward: _Forward, gradients: Sequence[Tensor]) -> Tensor:
        """The row of R that the embedding is read from [B, T], given d logit / dA for each attention that ran."""
        # Queries that the embedding does not read have no gradient at all. Several are read where they are averaged.
        read_BQ = gradients[-1].ne(0).any(dim=3).any(dim=1).to(forward.embedding_BK)
        row = read_BQ / read_BQ.sum(dim=1, keepdim=True).clamp(min=1)
        for number in reversed(range(len(gradients))):
            step_BQT = (forward.attentions[number].detach() * gradients[number]).relu().mean(dim=1)
            passed_BT = (row.unsqueeze(1) @ step_BQT).squeeze(1)
            is_pool = number >= self._blocks
            if is_pool:
                row = passed_BT
            elif row.shape == passed_BT.shape:
                row = row + passed_BT
            else:
                row = self._position_read(forward) + passed_BT
        return row

    def _position_read(self, forward: _Forward) -> Tensor:
        """One at the token whose query was the only one that the last block computed, else zero: [B, T].

        With the result of attention taken as a constant, a token reaches the embedding by its own residual connection
        or not at all, so that the gradient is zero for all tokens but the one that is read.
        """

        def constant(*args: Any, **keywords: Any) -> Tensor:
            return scaled_dot_product_attention(*args, **keywords).detach()

        hidden = forward.hidden_BTD.detach().requires_grad_()
        with AttentionReplaced(constant):
            # One number of the embedding is enough; their sum may be constant after a layer norm.
            component_B = self._last.embed_from(hidden, forward.inputs)[:, 0]
        (gradient_BTD,) = torch.autograd.grad(component_B.sum(), hidden)
        return gradient_BTD.ne(0).any(dim=2).to(hidden)

    def _unsupported(self, reason: str) -> UnsupportedTowerError:
        return UnsupportedTowerError(
            f"AttentionRelevance cannot explain this {self._name} tower, which {reason}; use a method that needs no "
            "attention, such as FeaturePairAttribution or GradCAM"
        )
