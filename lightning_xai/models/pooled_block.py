"""The last block of a transformer, of which only one position is read.

Shape suffixes: B batch, N points of a path, S directions, T tokens, D hidden width, h heads, e width of a head,
K embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import Attention, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_xai.models import derivatives
from lightning_xai.models.at_layer import EmbeddingPath, PathWithDerivatives, foreign_hooks
from lightning_xai.models.derivatives import is_mlp, is_norm, is_plain, is_scale
from lightning_xai.models.token_pool import NormedPath


@dataclass(frozen=True)
class PooledBlock:
    """A last transformer block of which one position is read: queries, residual and MLP for that position only.

    Attributes:
        block: the block.
        norm: the layer norm of what is read.
        projection: gives what is normalised its projection at the time, a weight [D, K] or a linear layer, or None.
        causal: whether a position attends to no later one.
    """

    block: ResidualAttentionBlock
    norm: nn.LayerNorm
    projection: Callable[[], nn.Linear | Tensor | None]
    causal: bool

    @classmethod
    def of(cls, block: nn.Module, norm: Any, projection: Callable[[], Any], *, causal: bool) -> PooledBlock | None:
        """The block with what follows it, where all of it is plain pre-norm, of which this shortcut is exact."""
        last = projection()
        known = last is None or isinstance(last, Tensor) or is_plain(last, nn.Linear)
        if not (known and is_norm(norm) and _serves(block)):
            return None
        hooked = any(foreign_hooks(part) for part in (norm, last) if isinstance(part, nn.Module))
        return None if hooked else cls(block, norm, projection, causal)

    def read(self, hidden_BTD: Tensor, pool_B: Tensor) -> Tensor:
        """Embeddings [B, K] of the pooled positions, for the block's input at all positions."""
        attention, rows = self.block.attn, torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        (query_weight, weight), (query_bias, bias) = _split(attention.in_proj_weight), _split(attention.in_proj_bias)
        normed_BTD = self.block.ln_1(hidden_BTD)
        query_B1D = linear(normed_BTD[rows, pool_B], query_weight, query_bias).unsqueeze(1)
        key_BTD, value_BTD = linear(normed_BTD, weight, bias).chunk(2, dim=2)
        query, key, value = (
            x.reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2) for x in (query_B1D, key_BTD, value_BTD)
        )
        seen = None
        if self.causal:
            positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
            seen = (positions_T <= pool_B[:, None])[:, None, None]
        context_BD = scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(1)
        residual_BD = hidden_BTD[rows, pool_B] + self.block.ls_1(attention.out_proj(context_BD))
        return self.finish(residual_BD.unsqueeze(1))[:, 0]

    def finish(self, both: Tensor) -> Tensor:
        """Embeddings [B, 1 + S, ..., K] of the residual at the pooled position, with derivatives [B, 1 + S, ..., D]."""
        block: Any = self.block
        both = both + block.ls_2(derivatives.mlp(derivatives.norm(both, block.ln_2), block.mlp))
        both = derivatives.norm(both, self.norm)
        projection = self.projection()
        if isinstance(projection, nn.Linear):
            return derivatives.linear(both, projection.weight, projection.bias)
        return both if projection is None else both @ projection

    def path(self, hidden_BTD: Tensor, reference_BTD: Tensor, pool_B: Tensor, directions: int = 1) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]; see `TowerAtLayer.path`."""
        return _PooledPath(self, hidden_BTD, reference_BTD, pool_B, directions)


class _PooledPath(PathWithDerivatives):
    """The path of a pooled block, written out with its derivatives.

    Layer norm and the key and value projections are linear but for one number per token, the standard deviation, and
    hidden states on a path are `r + alpha * d`. So the key at alpha is `(Wr + alpha * Wd) / std(alpha)`, and no key
    and no value is made for each point. The key's bias shifts all scores of a query alike, which the softmax ignores.

    What is called both is a value and its derivatives, [B, 1 + S, N, ...]; see `derivatives`.
    """

    def __init__(
        self, pooled: PooledBlock, hidden_BTD: Tensor, reference_BTD: Tensor, pool_B: Tensor, directions: int
    ) -> None:
        self._pooled, self._pool_B, self._directions = pooled, pool_B, directions
        attention: Any = pooled.block.attn
        norm, (weight, self._values_weight) = pooled.block.ln_1, _split(attention.in_proj_weight)
        query_bias, bias = _split(attention.in_proj_bias)
        self._bias = None if bias is None else bias.chunk(2)[1]
        self._heads, self._norm, self._tokens = attention.num_heads, norm, NormedPath(hidden_BTD, reference_BTD, norm)
        rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        # All that a query is made of together, so that its weights are read once. Axes for directions and for points.
        read = [x[rows, pool_B] * norm.weight for x in (self._tokens.starts, self._tokens.slope)]
        projected_B3D = linear(torch.stack([*read, norm.bias.expand_as(read[0])], dim=1), weight)
        self._query_start, self._query_slope, constant = projected_B3D[:, None].chunk(3, dim=2)
        self._query_constant = constant if query_bias is None else constant + query_bias
        start_BD = reference_BTD.expand_as(hidden_BTD)[rows, pool_B]
        self._hidden_start = start_BD[:, None, None]
        self._hidden_slope = (hidden_BTD[rows, pool_B] - start_BD)[:, None, None]
        self._unseen = None
        if pooled.causal:
            positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
            self._unseen = (positions_T > pool_B[:, None])[:, None, None, None]
        self._projected: _Projected | None = None
        self._with_graph = torch.is_grad_enabled()

    def __call__(self, alpha_BNT: Tensor) -> Tensor:
        """The embeddings [B, N, K]."""
        return self.with_derivatives(alpha_BNT, alpha_BNT[:, :0])[:, 0]

    def with_derivatives(self, alpha_BNT: Tensor, directions_BST: Tensor) -> Tensor:
        """The embeddings and their derivatives along directions [B, 1 + S, N, K]; see `PathWithDerivatives`."""
        points, block = alpha_BNT.shape[1], self._pooled.block
        alpha, along = alpha_BNT.unsqueeze(1), directions_BST.unsqueeze(2)
        std = self._tokens.inverse_std(alpha_BNT).unsqueeze(1)
        std_along = along
        if along.shape[1]:
            std_along = self._tokens.inverse_std_slope(alpha_BNT).unsqueeze(1) * along
        alpha_at, along_at, std_at, std_along_at = map(self._at_query, (alpha, along, std, std_along))
        query = self._query_start + alpha_at * self._query_slope
        query_along = along_at * self._query_slope * std_at + query * std_along_at
        both = torch.cat([query * std_at + self._query_constant, query_along], dim=1)
        keys = self._keys_and_values(points)
        weights, slopes = self._weights(keys.scores(both), (alpha, along), (std, std_along))
        attended, out = keys.context(weights, slopes), block.attn.out_proj
        hidden_along = (along_at * self._hidden_slope).expand(-1, -1, points, -1)
        hidden = torch.cat([self._hidden_start + alpha_at * self._hidden_slope, hidden_along], dim=1)
        return self._pooled.finish(hidden + block.ls_1(derivatives.linear(attended, out.weight, out.bias)))

    def _weights(
        self,
        products: tuple[Tensor, Tensor],
        alpha_and_along: tuple[Tensor, Tensor],
        std_and_along: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What the values of the reference are weighted with, and those of the change: both [B, 1 + S, N, h, T]."""
        start, slope = products
        alpha, along, std, std_along = (x.unsqueeze(3) for x in (*alpha_and_along, *std_and_along))
        scale = (self._norm.weight.shape[0] // self._heads) ** -0.5
        raw = start + alpha * slope
        scores = raw[:, :1] * (std * scale)
        if self._unseen is not None:
            scores = scores.masked_fill(self._unseen, float("-inf"))
        share = scores.softmax(dim=4)
        weights = share * std
        if not along.shape[1]:
            return weights, weights * alpha
        inner = ((raw[:, 1:] + along * slope[:, :1]) * std + raw[:, :1] * std_along) * scale
        share_along = share * (inner - (share * inner).sum(dim=4, keepdim=True))
        weights_along = share_along * std + share * std_along
        slopes_along = weights_along * alpha + weights * along
        return torch.cat([weights, weights_along], dim=1), torch.cat([weights * alpha, slopes_along], dim=1)

    def _at_query(self, x: Tensor) -> Tensor:
        """Values of the tokens [B, ..., T] at the pooled position, [B, ..., 1]."""
        index = self._pool_B.reshape(-1, *[1] * (x.ndim - 1))
        return x.gather(-1, index.expand(*x.shape[:-1], 1))

    def _keys_and_values(self, points: int) -> _KeysAndValues:
        queries, (tokens, width) = self._directions * points, self._tokens.slope.shape[1:]
        options = (self._tokens, self._values_weight, self._bias, self._norm, self._heads)
        # Products with weights: folded, two of each query and four of all of the width of each token; else four of each
        # token, as two reach from the reference and two from the change, whatever the number of queries.
        if queries * (2 * width + 4 * tokens * self._heads) < 4 * tokens * width:
            return _Folded(*options)
        if self._projected is None:
            # With the graph of the rest of the path, also where the first to ask for them needs none.
            with torch.set_grad_enabled(self._with_graph):
                self._projected = _Projected(*options)
        return self._projected


def _split(in_proj: Tensor | None) -> tuple[Any, Any]:
    """The query's part of a projection's weight or bias, and that of keys and values; None where there is no bias."""
    if in_proj is None:
        return None, None
    width = len(in_proj) // 3
    return in_proj[:width], in_proj[width:]


class _KeysAndValues(ABC):
    """What queries attend to, but for the standard deviation of each token."""

    @abstractmethod
    def scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Products of queries [B, 1 + S, N, D] with keys: of the reference and of the change, each [B, 1 + S, N, h, T].

        Without what is the same for all tokens.
        """

    @abstractmethod
    def context(self, weights: Tensor, slopes: Tensor) -> Tensor:
        """Weighted sums of values, of the reference and of the change, both [B, 1 + S, N, h, T] -> [B, 1 + S, N, D].

        With what is the same for all tokens, whose weights are one in all.
        """


class _Projected(_KeysAndValues):
    """Keys and values of each token are made: for many queries."""

    def __init__(self, tokens: NormedPath, weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm, heads: int) -> None:
        def project(x_BTD: Tensor) -> list[Tensor]:
            parts = linear(x_BTD * norm.weight, weight).chunk(2, dim=2)
            return [part.reshape(*part.shape[:2], heads, -1).expand(len(tokens.slope), -1, -1, -1) for part in parts]

        # One reference serves the whole batch: it is projected once.
        self._key_start, self._value_start = project(tokens.start)
        self._key_slope, self._value_slope = project(tokens.slope)
        self._constant = linear(norm.bias, weight.chunk(2)[1], bias)
        self._heads = heads

    def scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See `_KeysAndValues.scores`."""
        by_head = queries.reshape(*queries.shape[:3], self._heads, -1)
        start, slope = (torch.einsum("bsnhe,bthe->bsnht", by_head, key) for key in (self._key_start, self._key_slope))
        return start, slope

    def context(self, weights: Tensor, slopes: Tensor) -> Tensor:
        """See `_KeysAndValues.context`."""
        sums = torch.einsum("bsnht,bthe->bsnhe", weights, self._value_start)
        sums = (sums + torch.einsum("bsnht,bthe->bsnhe", slopes, self._value_slope)).flatten(3)
        return derivatives.shift(sums, self._constant)


class _Folded(_KeysAndValues):
    """No key and no value is made: queries are taken through the key projection, sums through that of values."""

    def __init__(self, tokens: NormedPath, weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm, heads: int) -> None:
        self._tokens, self._bias, self._norm, self._heads = tokens, bias, norm, heads
        self._key_heD, self._value_heD = weight.reshape(2, heads, -1, weight.shape[1])

    def scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See `_KeysAndValues.scores`."""
        by_head = queries.reshape(*queries.shape[:3], self._heads, -1)
        folded = torch.einsum("bsnhe,hed->bsnhd", by_head, self._key_heD) * self._norm.weight
        ends = (self._tokens.starts, self._tokens.slope)
        start, slope = (torch.einsum("bsnhd,btd->bsnht", folded, x) for x in ends)
        return start, slope

    def context(self, weights: Tensor, slopes: Tensor) -> Tensor:
        """See `_KeysAndValues.context`."""
        sums = torch.einsum("bsnht,btd->bsnhd", weights, self._tokens.starts)
        sums = sums + torch.einsum("bsnht,btd->bsnhd", slopes, self._tokens.slope)
        sums = derivatives.shift(sums * self._norm.weight, self._norm.bias)
        context = torch.einsum("bsnhd,hed->bsnhe", sums, self._value_heD).flatten(3)
        return context if self._bias is None else derivatives.shift(context, self._bias)


def _serves(block: Any) -> bool:
    attention: Any = getattr(block, "attn", None)
    return (
        type(block) is ResidualAttentionBlock
        and not hasattr(block, "ln_1_kv")
        and is_plain_attention(attention)
        and attention.in_proj_weight is not None
        and all(is_norm(part) for part in (block.ln_1, block.ln_2))
        and all(is_scale(part) for part in (block.ls_1, block.ls_2))
        and is_mlp(block.mlp)
        and not any(foreign_hooks(part) for part in block.modules())
    )


def is_plain_attention(attention: Any) -> bool:
    """Return whether this is PyTorch's attention, as open_clip 3 has it, or that of open_clip 4, without extras."""
    return _is_plain_torch(attention) or _is_plain_open_clip(attention)


def _is_plain_torch(attention: Any) -> bool:
    return (
        is_plain(attention, nn.MultiheadAttention)
        # An adapter in its place is passed over by nn.MultiheadAttention, which reads the weights alone.
        and is_plain(attention.out_proj, NonDynamicallyQuantizableLinear)
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def _is_plain_open_clip(attention: Any) -> bool:
    # Its parameters have PyTorch's names.
    return (
        is_plain(attention, Attention)
        and hasattr(attention, "in_proj_weight")
        and all(getattr(attention, name, None) is None for name in ("logit_scale", "head_scale"))
        and all(type(getattr(attention, name, None)) is nn.Identity for name in ("ln_q", "ln_k", "ln_inner"))
        and is_plain(attention.out_proj, nn.Linear)
    )
