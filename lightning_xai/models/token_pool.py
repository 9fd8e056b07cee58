"""Heads that pool tokens, read along a path at little more than the cost of the one vector that they make of them.

Hidden states on a path are `r + alpha * d`, and a layer norm divides each token by one number. So keys and
values are linear in alpha but for that number, and no key, no value and no token is ever made for each point: the
query is taken through the key projection instead, and what the attention weighs is summed before it is projected.

Shape suffixes: B batch, N points of a path, T tokens, D hidden width, h heads, e width of a head, K embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_xai.models.at_layer import EmbeddingPath


class NormedPath:
    """Hidden states on a path after a layer norm, but for its scale and shift: `(start + alpha * slope) / std(alpha)`.

    Args:
        hidden_BTD: where the path ends.
        reference_BTD: where it starts, of a batch of 1 or B.
        norm: None for hidden states as they are.

    Attributes:
        start: [1 or B, T, D], without the mean where there is a norm.
        slope: [B, T, D], likewise.
    """

    def __init__(self, hidden_BTD: Tensor, reference_BTD: Tensor, norm: nn.LayerNorm | None) -> None:
        self.start, self.slope = reference_BTD, hidden_BTD - reference_BTD
        self._norm = norm
        if norm is not None:
            self.start, self.slope = (x - x.mean(dim=2, keepdim=True) for x in (self.start, self.slope))
            # Half precision would lose what is left of large squares that cancel.
            wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
            start, slope = self.start.to(wide), self.slope.to(wide)
            factors = ((start, start), (start, slope), (slope, slope))
            self._mean_squares = [(a * b).mean(dim=2).unsqueeze(1) for a, b in factors]

    @property
    def starts(self) -> Tensor:
        """`start` of each path, [B, T, D]."""
        return self.start.expand_as(self.slope)

    def inverse_std(self, alpha_BNT: Tensor) -> Tensor:
        """What each token is multiplied by at each point: [B, N, T]; 1 without a norm."""
        if self._norm is None:
            return torch.ones_like(alpha_BNT)
        return self._inverse_std(alpha_BNT, self._norm.eps).to(alpha_BNT.dtype)

    def inverse_std_slope(self, alpha_BNT: Tensor) -> Tensor:
        """The derivative of `inverse_std` by alpha: [B, N, T]."""
        if self._norm is None:
            return torch.zeros_like(alpha_BNT)
        _, mixed, slope = self._mean_squares
        half_BNT = mixed + alpha_BNT * slope
        return (-half_BNT * self._inverse_std(alpha_BNT, self._norm.eps) ** 3).to(alpha_BNT.dtype)

    def _inverse_std(self, alpha_BNT: Tensor, eps: float) -> Tensor:
        start, mixed, slope = self._mean_squares
        square_BNT = start + alpha_BNT * (2 * mixed + alpha_BNT * slope)
        # Rounding makes it negative where a path passes through zero.
        return torch.rsqrt(square_BNT.clamp(min=0) + eps)

    def weighted(self, weights_BNhT: Tensor, alpha_BNT: Tensor) -> Tensor:
        """Sums of all tokens `start + alpha * slope` with weights: [B, N, h, D]."""
        sums = torch.einsum("bnht,btd->bnhd", weights_BNhT, self.starts)
        return sums + torch.einsum("bnht,btd->bnhd", weights_BNhT * alpha_BNT.unsqueeze(2), self.slope)


class TokenPool(ABC):
    """A head that makes one vector of all tokens, for hidden states after the last block."""

    @abstractmethod
    def path(self, hidden: Tensor, reference: Tensor) -> EmbeddingPath:
        """The path from a reference (batch of 1 or B) to hidden states: alpha [B, N, T] -> embeddings [B, N, K]."""


@dataclass(frozen=True)
class PoolWeights:
    """The weights of an attention pool: its query, already divided by the square root of e, and its projections."""

    query_he: Tensor
    key_heD: Tensor
    value_heD: Tensor
    value_bias_he: Tensor | None

    @classmethod
    def of(cls, attention: nn.MultiheadAttention, query_D: Tensor) -> PoolWeights:
        """Those of PyTorch's attention, for a query that is not yet projected."""
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        packed: Tensor | None = attention.in_proj_weight
        query, key, value = [getattr(attention, name) for name in names] if packed is None else packed.chunk(3)
        bias: Tensor | None = attention.in_proj_bias
        query_bias, _, value_bias = (None, None, None) if bias is None else bias.chunk(3)
        heads = attention.num_heads
        query_he = linear(query_D, query, query_bias).reshape(heads, -1)
        key_heD, value_heD = (weight.reshape(*query_he.shape, -1) for weight in (key, value))
        value_bias_he = None if value_bias is None else value_bias.reshape(heads, -1)
        return cls(query_he * query_he.shape[1] ** -0.5, key_heD, value_heD, value_bias_he)


@dataclass(frozen=True)
class LatentPool(TokenPool):
    """An attention pool whose one query is a weight, on tokens that a layer norm may come before.

    The key's bias shifts all scores of the query alike, which the softmax ignores.

    Attributes:
        norm: of each token; None where there is none.
        prefix: the number of first tokens that the pool is not given.
        weights: those that the pool has when it is called.
        finish: what the query attends to, of all heads [B, N, D] -> embeddings [B, N, K].
    """

    norm: nn.LayerNorm | None
    prefix: int
    weights: Callable[[], PoolWeights]
    finish: Callable[[Tensor], Tensor]

    def path(self, hidden: Tensor, reference: Tensor) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        weights, norm = self.weights(), self.norm
        tokens = NormedPath(hidden[:, self.prefix :], reference[:, self.prefix :], norm)
        key_hD = torch.einsum("he,hed->hd", weights.query_he, weights.key_heD)
        value_heD, constant_he = weights.value_heD, weights.value_bias_he
        if norm is not None:
            shift_he = value_heD @ norm.bias
            constant_he = shift_he if constant_he is None else shift_he + constant_he
            key_hD, value_heD = key_hD * norm.weight, value_heD * norm.weight
        score_start, score_slope = ((x @ key_hD.mT).mT.unsqueeze(1) for x in (tokens.start, tokens.slope))

        def embed(alpha_BNT: Tensor) -> Tensor:
            alpha_BNT = alpha_BNT[..., self.prefix :]
            inverse_std_BN1T = tokens.inverse_std(alpha_BNT).unsqueeze(2)
            scores_BNhT = (score_start + alpha_BNT.unsqueeze(2) * score_slope) * inverse_std_BN1T
            pooled_BNhD = tokens.weighted(scores_BNhT.softmax(dim=3) * inverse_std_BN1T, alpha_BNT)
            context_BNhe = torch.einsum("bnhd,hed->bnhe", pooled_BNhD, value_heD)
            return self.finish((context_BNhe if constant_he is None else context_BNhe + constant_he).flatten(2))

        return embed


@dataclass(frozen=True)
class MeanPool(TokenPool):
    """An average of tokens, which a layer norm may come before.

    Attributes:
        norm: as of `LatentPool`.
        prefix: likewise.
        finish: the average [B, N, D] -> embeddings [B, N, K].
    """

    norm: nn.LayerNorm | None
    prefix: int
    finish: Callable[[Tensor], Tensor]

    def path(self, hidden: Tensor, reference: Tensor) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        tokens = NormedPath(hidden[:, self.prefix :], reference[:, self.prefix :], self.norm)

        def embed(alpha_BNT: Tensor) -> Tensor:
            alpha_BNT = alpha_BNT[..., self.prefix :]
            weights_BN1T = tokens.inverse_std(alpha_BNT).unsqueeze(2) / alpha_BNT.shape[2]
            mean_BND = tokens.weighted(weights_BN1T, alpha_BNT)[:, :, 0]
            return self.finish(mean_BND if self.norm is None else mean_BND * self.norm.weight + self.norm.bias)

        return embed


@dataclass(frozen=True)
class MeanQueryPool(TokenPool):
    """The attention pool of CLIP's ResNet, whose query is the mean of all places, one token more.

    Attributes:
        pool: open_clip's `AttentionPool2d`.
    """

    pool: Any

    def path(self, hidden: Tensor, reference: Tensor) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K], T the places of feature maps [B, D, H, W]."""
        pool, heads = self.pool, self.pool.num_heads
        hidden_BTD, reference_BTD = (x.flatten(2).mT for x in (hidden, reference))
        position_D, positions_TD = pool.positional_embedding[0], pool.positional_embedding[1:]
        tokens = NormedPath(hidden_BTD + positions_TD, reference_BTD + positions_TD, None)
        mean_start_D = reference_BTD.mean(dim=1, keepdim=True) + position_D
        key_heD, value_heD = (
            part.weight.reshape(heads, -1, hidden_BTD.shape[2]) for part in (pool.k_proj, pool.v_proj)
        )

        def embed(alpha_BNT: Tensor) -> Tensor:
            mean_BND = mean_start_D + alpha_BNT @ tokens.slope / alpha_BNT.shape[2]
            query_BNhe = pool.q_proj(mean_BND).reshape(*mean_BND.shape[:2], heads, -1)
            # The key's bias changes nothing here either.
            key_BNhD = torch.einsum("bnhe,hed->bnhd", query_BNhe, key_heD) * query_BNhe.shape[3] ** -0.5
            start, slope = (torch.einsum("bnhd,btd->bnht", key_BNhD, x) for x in (tokens.starts, tokens.slope))
            mean_BN1D = mean_BND.unsqueeze(2)
            of_mean_BNh1 = (key_BNhD * mean_BN1D).sum(dim=3, keepdim=True)
            weights = torch.cat([of_mean_BNh1, start + alpha_BNT.unsqueeze(2) * slope], dim=3).softmax(dim=3)
            pooled_BNhD = weights[..., :1] * mean_BN1D + tokens.weighted(weights[..., 1:], alpha_BNT)
            context_BND = torch.einsum("bnhd,hed->bnhe", pooled_BNhD, value_heD).flatten(2) + pool.v_proj.bias
            embedding_BNK: Tensor = pool.c_proj(context_BND)
            return embedding_BNK

        return embed
