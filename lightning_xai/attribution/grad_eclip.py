"""Grad-ECLIP: the gradient by an attention's result, times the values that it mixes (Zhao et al., ICML 2024).

With o the result of a block's attention (before its output projection) at the token that the embedding is read from,
g = d cos / d o, v_p the values of token p, and s_p the cosine of the read token's query and the key of p, scaled to
[0, 1] over tokens,

    H_p = relu( sum_d g_d v_pd s_p ),

summed over the explained blocks.

Shape suffixes: B pairs, h heads, Q queries, T tokens run (keys), e width of a head, D = h * e, K embedding width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from lightning_xai.attribution.attention import (
    Attention,
    AttentionMethod,
    AttentionReplaced,
    TowerPass,
    merged,
    with_gradient,
)
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder

Heads = Literal["model", "single"]


class GradECLIP(AttentionMethod):
    """Grad-ECLIP of images and captions: gradient times value times a loosened attention.

    Images are read at CLS, captions at their end; a tower that ends in an attention pool (SigLIP, CoCa, CLIP's ResNet)
    is explained at that pool alone, whose query reads. The scaling of s runs over the patches of an image, without CLS
    and registers, and over the tokens of a caption with its marks of start and end, without padding; where all are
    alike, s is zero. Maps are not negative and larger is more; those of text are zero but for the caption's own tokens.

    Args:
        encoder: the dual encoder to explain.
        start_layer: the first of the explained blocks, whose maps are summed; one number for both towers, or one for
            the image tower and one for the text tower. -1, the paper's, is the last block alone.
        heads: `"model"` takes the gradient of the model's own cosine. `"single"` computes the explained attentions with
            one head, as the published code does: the cosine whose gradient is taken is then not the model's.
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: a tower that averages its tokens, so that no one query reads, or whose attention cannot
            be seen.
        ValueError: no such layer, or unknown `heads`.
    """

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        start_layer: int | tuple[int, int] = -1,
        heads: Heads = "model",
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        if heads not in get_args(Heads):
            raise ValueError(f"unknown heads {heads!r}; known: {', '.join(get_args(Heads))}")
        self._single = heads == "single"
        self._attend(start_layer, _check_one_is_read)

    def _map(self, seen: TowerPass, own_BK: Tensor, score: Score) -> Tensor:
        calls: list[Attention] = []
        contexts: list[Tensor] = []

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            call = Attention(*args, **kwargs)
            calls.append(call)
            contexts.append(with_gradient(_attended(call, single=self._single)))
            # One head's result, cut into those that the block expects.
            return contexts[-1].reshape(*contexts[-1].shape[:2], call.value.shape[1], -1).transpose(1, 2)

        hidden = seen.output
        with AttentionReplaced(attend):
            if not seen.tower.pools:
                hidden = seen.calls[0].hidden
                for block in seen.calls:
                    hidden = block.again(hidden)
            embedding_BK = seen.embed(hidden)
        gradients = torch.autograd.grad(score(embedding_BK).sum(), contexts)
        read_B = seen.read().argmax(dim=1)
        with torch.no_grad():
            maps = [self._of(call, g, read_B, seen) for call, g in zip(calls, gradients, strict=True)]
            return seen.maps(torch.stack(maps).sum(dim=0))

    @staticmethod
    def _of(call: Attention, gradient_BQD: Tensor, read_B: Tensor, seen: TowerPass) -> Tensor:
        """The map of one attention [B, T]."""
        rows = torch.arange(len(read_B), device=read_B.device)
        query_BD, gradient_BD = (
            x.expand(len(read_B), -1, -1)[rows, read_B] for x in (merged(call.query), gradient_BQD)
        )
        key_BTD, value_BTD = merged(call.key), merged(call.value)
        similarity_BT = cosine_similarity(query_BD[:, None], key_BTD, dim=2)
        value_BT = (value_BTD @ gradient_BD[:, :, None]).squeeze(2)
        return (value_BT * _scaled(similarity_BT, seen.scored(similarity_BT.shape[1]))).relu()


def _check_one_is_read(seen: TowerPass) -> None:
    """Raise an UnsupportedTowerError where the embedding is read from several queries."""
    if int(seen.read().gt(0).sum()) != 1:
        raise seen.tower.unsupported("averages its tokens, so that no one query reads them")


def _attended(call: Attention, *, single: bool) -> Tensor:
    """The result of an attention [B, Q, D], or what it would be with one head in place of its own."""
    if single:
        one = [merged(x).unsqueeze(1) for x in (call.query, call.key, call.value)]
        mask = call.attn_mask
        if mask is not None and mask.ndim == 4:
            mask = mask[:, :1]
        call = replace(call, query=one[0], key=one[1], value=one[2], attn_mask=mask, scale=None)
    return merged(
        scaled_dot_product_attention(
            call.query, call.key, call.value, call.attn_mask, is_causal=call.is_causal, scale=call.scale
        )
    )


def _scaled(values_BT: Tensor, own_BT: Tensor) -> Tensor:
    """Values from 0, the least of the own ones, to 1; 0 where all are alike."""
    low = values_BT.masked_fill(~own_BT, torch.inf).amin(dim=1, keepdim=True)
    high = values_BT.masked_fill(~own_BT, -torch.inf).amax(dim=1, keepdim=True)
    return ((values_BT - low) / torch.where(high > low, high - low, 1.0)).masked_fill(~own_BT, 0.0)
