"""Self-attention on tokens that are contiguous in memory.

Shape suffixes: B batch, T tokens, D hidden width, h heads, e width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["ContiguousTokens"]


class ContiguousTokens(TorchFunctionMode):
    """Inside, attention and linear layers are given tokens that lie one after another in memory.

    `nn.MultiheadAttention` puts the axis of tokens first. PyTorch would then multiply token by token, each by its own
    copy of the weights, wherever weights are frozen or derivatives along a direction are taken. Elsewhere it copies
    what goes into the projections and what comes from them.

    The numbers are the same up to rounding.
    """

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer."""
        return linear(x.contiguous(), weight, bias)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or the same on contiguous tokens."""
        kwargs = kwargs or {}
        if function is linear and not kwargs:
            return self.linear(*args)
        if function is multi_head_attention_forward and _is_plain(args, kwargs):
            with self:
                return _self_attention(args[0], args[4], args[5:7], args[11:13], kwargs["attn_mask"]), None
        return function(*args, **kwargs)


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether `nn.MultiheadAttention` asks for self-attention without extras, as blocks of a tower do."""
    mask, known = kwargs.get("attn_mask"), {"training", "attn_mask", "average_attn_weights", "is_causal"}
    return (
        len(args) == 13
        and args[0] is args[1] is args[2]
        and args[0].ndim == 3
        and all(extra is None for extra in args[7:9])
        and not args[9]
        and not (args[10] and kwargs.get("training", True))  # dropout
        and (mask.ndim == 2 and mask.is_floating_point() if mask is not None else not kwargs.get("is_causal"))
        and not any(value is not None and value is not False for name, value in kwargs.items() if name not in known)
    )


def _self_attention(x_TBD: Tensor, heads: int, project: Any, project_out: Any, mask_TT: Tensor | None) -> Tensor:
    projected_BTD = linear(x_TBD.transpose(0, 1), *project)
    query, key, value = (
        part.reshape(*part.shape[:2], heads, part.shape[2] // heads).transpose(1, 2)
        for part in projected_BTD.chunk(3, dim=2)
    )
    context_BhTe = scaled_dot_product_attention(query, key, value, attn_mask=mask_TT)
    return linear(context_BhTe.transpose(1, 2).flatten(2), *project_out).transpose(0, 1)
