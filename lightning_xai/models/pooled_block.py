"""The last block of a transformer, of which only one position is read.

Shape suffixes: B batch, N points of a path, T tokens, D hidden width, h heads, e width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import Attention, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_xai.models.at_layer import EmbeddingPath, foreign_hooks
from lightning_xai.models.token_pool import NormedPath


@dataclass(frozen=True)
class PooledBlock:
    """A last transformer block of which one position is read: queries, residual and MLP for that position only.

    Layer norm and the key and value projections are linear but for one number per token, the standard deviation, and
    hidden states on a path are `r + alpha * d`. So both are projected once, whatever the number of points: the key at
    alpha is `(Wr + alpha * Wd) / std(alpha)`. The key's bias shifts all scores of a query alike, which the softmax
    ignores.
    """

    block: ResidualAttentionBlock
    causal: bool

    @staticmethod
    def serves(block: nn.Module) -> bool:
        """Return whether the block is the plain pre-norm block this shortcut is exact for."""
        attention: Any = getattr(block, "attn", None)
        return (
            type(block) is ResidualAttentionBlock
            and not hasattr(block, "ln_1_kv")
            and is_plain_attention(attention)
            and attention.in_proj_weight is not None
            and not any(foreign_hooks(part) for part in block.modules())
        )

    def read(self, hidden_BTD: Tensor, pool_B: Tensor) -> Tensor:
        """The block's output at the pooled position [B, D], for its input at all positions."""
        attention, rows = self.block.attn, torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.num_heads
        width, normed_BTD = weight.shape[1], self.block.ln_1(hidden_BTD)
        query_B1D = linear(normed_BTD[rows, pool_B], weight[:width], bias[:width]).unsqueeze(1)
        key_BTD, value_BTD = linear(normed_BTD, weight[width:], bias[width:]).chunk(2, dim=2)
        query, key, value = (
            x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query_B1D, key_BTD, value_BTD)
        )
        seen = None
        if self.causal:
            positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
            seen = (positions_T <= pool_B[:, None])[:, None, None]
        context_BD = scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(1)
        residual_BD = hidden_BTD[rows, pool_B] + self.block.ls_1(attention.out_proj(context_BD))
        output_BD: Tensor = residual_BD + self.block.ls_2(self.block.mlp(self.block.ln_2(residual_BD)))
        return output_BD

    def path(self, hidden_BTD: Tensor, reference_BTD: Tensor, pool_B: Tensor) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> the block's output at the pooled position [B, N, D]."""
        attention, norm = self.block.attn, self.block.ln_1
        tokens, batch = NormedPath(hidden_BTD, reference_BTD, norm), len(hidden_BTD)
        project, rows = _Projection(attention, norm), torch.arange(batch, device=hidden_BTD.device)
        query_start_BD, query_slope_BD = (project.query(x[rows, pool_B]) for x in (tokens.starts, tokens.slope))
        # One reference serves the whole batch: it is projected once.
        key_start, value_start = (x.expand(batch, -1, -1, -1) for x in project.key_value(tokens.start))
        key_slope, value_slope = project.key_value(tokens.slope)
        hidden_start_BD = reference_BTD.expand_as(hidden_BTD)[rows, pool_B]
        hidden_slope_BD = hidden_BTD[rows, pool_B] - hidden_start_BD
        positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        hidden_from_query_BT = (positions_T > pool_B[:, None]) if self.causal else None

        def output(alpha_BNT: Tensor) -> Tensor:
            inverse_std_BNT = tokens.inverse_std(alpha_BNT)
            at_query = pool_B[:, None, None].expand(-1, alpha_BNT.shape[1], 1)
            alpha_query_BN1, inverse_std_query_BN1 = (x.gather(2, at_query) for x in (alpha_BNT, inverse_std_BNT))
            query = (query_start_BD[:, None] + alpha_query_BN1 * query_slope_BD[:, None]) * inverse_std_query_BN1
            query_BNhe = project.heads(query + project.query_constant)
            alpha_BN1T, inverse_std_BN1T = alpha_BNT.unsqueeze(2), inverse_std_BNT.unsqueeze(2)
            scores = torch.einsum("bnhe,bthe->bnht", query_BNhe, key_start)
            scores = scores + alpha_BN1T * torch.einsum("bnhe,bthe->bnht", query_BNhe, key_slope)
            scores = scores * inverse_std_BN1T * query_BNhe.shape[3] ** -0.5
            if hidden_from_query_BT is not None:
                scores = scores.masked_fill(hidden_from_query_BT[:, None, None], float("-inf"))
            weights_BNhT = scores.softmax(dim=3) * inverse_std_BN1T
            context = torch.einsum("bnht,bthe->bnhe", weights_BNhT, value_start)
            context = context + torch.einsum("bnht,bthe->bnhe", weights_BNhT * alpha_BN1T, value_slope)
            context_BND = context.flatten(2) + project.value_constant
            residual_BND = hidden_start_BD[:, None] + alpha_query_BN1 * hidden_slope_BD[:, None]
            residual_BND = residual_BND + self.block.ls_1(attention.out_proj(context_BND))
            output_BND: Tensor = residual_BND + self.block.ls_2(self.block.mlp(self.block.ln_2(residual_BND)))
            return output_BND

        return output


def is_plain_attention(attention: Any) -> bool:
    """Return whether this is PyTorch's attention, as open_clip 3 has it, or that of open_clip 4, without extras."""
    return _is_plain_torch(attention) or _is_plain_open_clip(attention)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Return whether a module is of just this class, its weights parametrized, as by low-rank adapters, or not."""
    plain: type[nn.Module] = type_before_parametrizations(module)
    return plain is kind


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


class _Projection:
    """Query, key and value projections of a block, with the layer norm's affine part folded in."""

    def __init__(self, attention: Any, norm: nn.LayerNorm) -> None:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        width = weight.shape[1]
        self._heads = attention.num_heads
        self._scale_D = norm.weight
        self._query_weight, self._key_value_weight = weight[:width], weight[width:]
        constant_3D = linear(norm.bias, weight, bias)
        self.query_constant, _, self.value_constant = constant_3D.chunk(3)

    def heads(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., h, e]."""
        return x.reshape(*x.shape[:-1], self._heads, -1)

    def query(self, centred_BD: Tensor) -> Tensor:
        """The query of centred hidden states, but for the standard deviation and the constant: [B, D]."""
        return linear(centred_BD * self._scale_D, self._query_weight)

    def key_value(self, centred_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise keys and values of all tokens, each [B, T, h, e]."""
        key, value = linear(centred_BTD * self._scale_D, self._key_value_weight).chunk(2, dim=2)
        return self.heads(key), self.heads(value)
